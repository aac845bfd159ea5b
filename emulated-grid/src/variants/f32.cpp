// The project's kernels, compiled for precision f32.
#define PRECISION 0
#define VARIANT f32
#include "variant.h"

namespace variant_f32 {
#include "all.cu"
}

EXPORT_VARIANT
