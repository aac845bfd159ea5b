// The grid's own test kernels.
#define PRECISION 2
#define VARIANT tests
#include "variant.h"

namespace variant_tests {
#include "kernels.cu"
}

EXPORT_VARIANT
