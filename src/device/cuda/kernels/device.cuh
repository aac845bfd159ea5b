// The words that kernels are written in: for a card (NVRTC, which has no headers but what it brings along), and for the
// host, where `emulated-grid` runs the same kernels to test them. Blocks are one-dimensional, a multiple of 32 threads;
// every thread of a block reaches every barrier, and every lane of a warp every collective.
//
// On both: threadIdx, blockIdx, blockDim, gridDim; __syncthreads(), __syncwarp(), __shfl_sync and __shfl_xor_sync over
// whole warps; __uint_as_float, __float_as_uint; float2, float4, int2, int4, uint2, uint4 and their make_; expf, logf,
// tanhf, erfcf, sqrtf, fmaf, fabsf, fmaxf, fminf; min and max of int, unsigned and u64; __shared__ arrays, without
// initial values; __align__(bytes). No kernel is compiled with fast-math.
#pragma once

#ifdef __CUDACC__

// A function that kernels call.
#define DEVICE static __device__ __forceinline__
// A kernel, found by its name: KERNEL(name, (params)) { body }. Parameters are pointers, int, unsigned, float or u64.
#define KERNEL(name, params) extern "C" __global__ void name params
// The same for blocks of at most so many threads.
#define KERNEL_BOUNDS(threads, name, params) extern "C" __global__ void __launch_bounds__(threads) name params
// The shared memory that a launch asks for, at a multiple of 16 bytes; a kernel divides it up itself.
#define DYNAMIC_SHARED(type, name)                                  \
  extern __shared__ __align__(16) unsigned char dynamic_shared[];   \
  type* const name = reinterpret_cast<type*>(dynamic_shared)
// On the host, who calls a collective: a last parameter of what wraps one, and how it is handed on.
#define CALLER
#define SAME_CALLER

#else
#include "emulated_grid.h"
#endif

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;

// The upper half of an f32.
struct bf16 {
  u16 bits;
};

// What activations are kept in. PRECISION: 0 f32, 1 tf32, 2 bf16.
#if PRECISION == 2
typedef bf16 Act;
#else
typedef float Act;
#endif

// Every lane of a warp: the only mask.
#define WARP 0xffffffffu

// The thread's place in its warp.
DEVICE int lane() { return threadIdx.x & 31; }
// The warp's place in its block.
DEVICE int warp() { return threadIdx.x >> 5; }

// A stored number, to compute with.
DEVICE float load(float v) { return v; }
DEVICE float load(bf16 v) { return __uint_as_float((u32)v.bits << 16); }

// Rounded to the nearest bf16, ties to even; NaN stays NaN.
DEVICE bf16 to_bf16(float v) {
  bf16 r;
#ifdef __CUDACC__
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(v));
#else
  const u32 bits = __float_as_uint(v);
  r.bits = v != v ? 0x7fff : (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
  return r;
}

// A number as a T, float or bf16, stores it.
template <class T>
DEVICE T store(float v) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return v;
  } else {
    return to_bf16(v);
  }
}
// A number as activations store it.
DEVICE Act store_act(float v) { return store<Act>(v); }

// The bits of the nearest number with 10 bits of fraction, ties away from zero; NaN stays NaN.
DEVICE u32 tf32(float v) {
  u32 r;
#ifdef __CUDACC__
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(v));
#else
  r = v != v ? 0x7fffffff : (__float_as_uint(v) + 0x1000) & 0xffffe000;
#endif
  return r;
}

// The sum over the warp, in a tree of pairs: every lane gets the same bits.
DEVICE float warp_sum(float v CALLER) {
  for (int lanes = 16; lanes > 0; lanes /= 2) v += __shfl_xor_sync(WARP, v, lanes SAME_CALLER);
  return v;
}
// The largest of the warp, to every lane; a NaN beside a number is passed over.
DEVICE float warp_max(float v CALLER) {
  for (int lanes = 16; lanes > 0; lanes /= 2) v = fmaxf(v, __shfl_xor_sync(WARP, v, lanes SAME_CALLER));
  return v;
}

// Philox4x32-10: the four draws of a counter. What counters mean is said in src/device/philox.rs.
DEVICE uint4 philox(u32 k0, u32 k1, uint4 counter) {
  uint4 c = counter;
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const u64 p0 = 0xD2511F53ull * c.x, p1 = 0xCD9E8D57ull * c.z;
    c = make_uint4((u32)(p1 >> 32) ^ c.y ^ k0, (u32)p1, (u32)(p0 >> 32) ^ c.w ^ k1, (u32)p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// Tensor cores: d += a b by one warp, a (16, k), b (k, 8), d (16, 8). Each lane holds a part. With g = lane / 4 and
// t = lane % 4 (PTX ISA, "Matrix Fragments for mma.m16n8k16" and "... m16n8k8"):
//
//   d[0] (g, 2t)   d[1] (g, 2t + 1)   d[2] (g + 8, 2t)   d[3] (g + 8, 2t + 1)

// k = 16, two bf16 a word, the lower column (a) or row (b) in the low half:
//
//   a[0] (g, 2t..)      a[1] (g + 8, 2t..)      a[2] (g, 2t + 8..)      a[3] (g + 8, 2t + 8..)
//   b[0] (2t.., g)      b[1] (2t + 8.., g)
DEVICE void mma_bf16(float d[4], const u32 a[4], const u32 b[2] CALLER) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  emulated::mma_bf16(d, a, b, SITE);
#endif
}

// k = 8, a word each, as `tf32` gives it (of other bits, the lower 13 are ignored):
//
//   a[0] (g, t)      a[1] (g + 8, t)      a[2] (g, t + 4)      a[3] (g + 8, t + 4)
//   b[0] (t, g)      b[1] (t + 4, g)
DEVICE void mma_tf32(float d[4], const u32 a[4], const u32 b[2] CALLER) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  emulated::mma_tf32(d, a, b, SITE);
#endif
}

// Four 8 by 8 matrices of two-byte numbers from shared memory. Lane l points at row l % 8 of matrix l / 8, 16 bytes at
// a multiple of 16; r[i] is of matrix i, row l / 4, columns 2 (l % 4) and, in the high half, the next.
DEVICE void ldmatrix_x4(u32 r[4], const void* row CALLER) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"((u32)__cvta_generic_to_shared(row))
               : "memory");
#else
  emulated::ldmatrix_x4(r, row, false, SITE);
#endif
}

// The same of the matrices transposed: r[i] is of column l / 4, rows 2 (l % 4) and the next.
DEVICE void ldmatrix_x4_transposed(u32 r[4], const void* row CALLER) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"((u32)__cvta_generic_to_shared(row))
               : "memory");
#else
  emulated::ldmatrix_x4(r, row, true, SITE);
#endif
}
