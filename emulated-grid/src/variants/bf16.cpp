// The project's kernels, compiled for precision bf16.
#define PRECISION 2
#define VARIANT bf16
#include "variant.h"

namespace variant_bf16 {
#include "all.cu"
}

EXPORT_VARIANT
