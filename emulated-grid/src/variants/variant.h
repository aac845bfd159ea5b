// What a variant's translation unit needs around its kernels. Kernels are wrapped in a namespace of the variant, since
// the same names mean another thing in each; the headers come before it, so that their names stay outside.
#pragma once

#define GLUE_(a, b) a##b
#define GLUE(a, b) GLUE_(a, b)
#define QUOTE_(a) #a
#define QUOTE(a) QUOTE_(a)

#include "device.cuh"

// A variant's shared arrays are all that lies in its .bss, where the grid fills them before each block; these are both
// ends. (A section of their own would do, but GCC 12 forgets it for arrays in templates.)
asm(".pushsection .bss, 0\n" QUOTE(GLUE(shared_start_, VARIANT)) ":\n.popsection");
asm(".pushsection .bss, 8192\n" QUOTE(GLUE(shared_end_, VARIANT)) ":\n.popsection");
extern "C" char GLUE(shared_start_, VARIANT)[], GLUE(shared_end_, VARIANT)[];

#define EXPORT_VARIANT                                                                        \
  emulated::Variant GLUE(emulated::variant_, VARIANT)() {                                     \
    return {emulated::last_kernel, GLUE(shared_start_, VARIANT), GLUE(shared_end_, VARIANT)}; \
  }
