// The project's kernels, compiled for precision tf32.
#define PRECISION 1
#define VARIANT tf32
#include "variant.h"

namespace variant_tf32 {
#include "all.cu"
}

EXPORT_VARIANT
