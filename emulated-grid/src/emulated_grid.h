// What a kernel finds on the host in place of CUDA: the host half of device.cuh. Where each piece is documented, and
// which of them kernels may use, is said there.
//
// Threads are fibers that run until they reach a barrier or a collective; what is declared here and not defined is in
// grid.cpp.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

extern uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

// Where in a source something is called from.
struct Site {
  const char* file;
  int line;
};

// What a kernel's parameter is; Rust knows these numbers.
enum class Param : unsigned { pointer, i32, u32, f32, wide };

// A kernel: laid out as Rust reads it.
struct Kernel {
  const char* name;
  const Kernel* before;
  const Param* params;
  unsigned n_params;
  unsigned most_threads;
  void (*run)(const uint64_t* args);
};

// What a translation unit gives the grid: its kernels, last first, and where its shared arrays lie.
struct Variant {
  const Kernel* last;
  char* shared;
  char* shared_end;
};
Variant variant_f32();
Variant variant_tf32();
Variant variant_bf16();
Variant variant_tests();

// What a variant keeps beside its shared arrays, which have .bss for themselves.
#define NOT_SHARED __attribute__((section("emulated_kernels")))

// The newest kernel of this translation unit.
[[maybe_unused]] NOT_SHARED static const Kernel* last_kernel = nullptr;

template <class P>
constexpr Param param() {
  if constexpr (std::is_pointer_v<P>) {
    return Param::pointer;
  } else if constexpr (std::is_same_v<P, int>) {
    return Param::i32;
  } else if constexpr (std::is_same_v<P, unsigned>) {
    return Param::u32;
  } else if constexpr (std::is_same_v<P, float>) {
    return Param::f32;
  } else {
    static_assert(std::is_integral_v<P> && sizeof(P) == 8, "a parameter is a pointer, int, unsigned, float or 64 bits");
    return Param::wide;
  }
}

template <class P>
P argument(uint64_t slot) {
  if constexpr (std::is_pointer_v<P>) {
    return reinterpret_cast<P>(static_cast<uintptr_t>(slot));
  } else if constexpr (std::is_same_v<P, float>) {
    return std::bit_cast<float>(static_cast<uint32_t>(slot));
  } else {
    return static_cast<P>(slot);
  }
}

template <auto F>
struct Entry;
template <class... P, void (*F)(P...)>
struct Entry<F> : Kernel {
  static constexpr Param list[sizeof...(P) + 1] = {param<P>()...};

  Entry(const char* name, unsigned most_threads)
      : Kernel{name, last_kernel, list, sizeof...(P), most_threads, [](const uint64_t* args) {
                 call(args, std::index_sequence_for<P...>());
               }} {
    last_kernel = this;
  }

 private:
  template <size_t... I>
  static void call([[maybe_unused]] const uint64_t* args, std::index_sequence<I...>) {
    F(argument<P>(args[I])...);
  }
};

void* dynamic_shared();
void syncthreads(Site site);
void syncwarp(unsigned mask, Site site);
uint64_t shuffle(unsigned mask, uint64_t value, unsigned from, Site site);
void mma_bf16(float d[4], const unsigned a[4], const unsigned b[2], Site site);
void mma_tf32(float d[4], const unsigned a[4], const unsigned b[2], Site site);
void ldmatrix_x4(unsigned r[4], const void* row, bool transposed, Site site);

// The value that lane `from` gives.
template <class T>
T shuffle_of(unsigned mask, T value, unsigned from, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  using Word = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  return std::bit_cast<T>(static_cast<Word>(shuffle(mask, std::bit_cast<Word>(value), from, site)));
}

}  // namespace emulated

// The caller's place as a last parameter, and how it is handed on.
#define CALLER_ALONE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define CALLER , CALLER_ALONE
#define SAME_CALLER , file, line
#define SITE \
  emulated::Site { file, line }

#define DEVICE static inline __attribute__((always_inline))
#define KERNEL(name, params) KERNEL_BOUNDS(1024, name, params)
#define KERNEL_BOUNDS(threads, name, params)                                   \
  static void name params;                                                     \
  NOT_SHARED static emulated::Entry<&name> name##_is_a_kernel(#name, threads); \
  static void name params
#define DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(emulated::dynamic_shared())
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static __attribute__((used))

DEVICE float2 make_float2(float x, float y) { return {x, y}; }
DEVICE float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
DEVICE int2 make_int2(int x, int y) { return {x, y}; }
DEVICE int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
DEVICE uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
DEVICE uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

DEVICE int min(int a, int b) { return b < a ? b : a; }
DEVICE int max(int a, int b) { return a < b ? b : a; }
DEVICE unsigned min(unsigned a, unsigned b) { return b < a ? b : a; }
DEVICE unsigned max(unsigned a, unsigned b) { return a < b ? b : a; }
DEVICE unsigned long long min(unsigned long long a, unsigned long long b) { return b < a ? b : a; }
DEVICE unsigned long long max(unsigned long long a, unsigned long long b) { return a < b ? b : a; }

DEVICE float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
DEVICE unsigned __float_as_uint(float v) { return std::bit_cast<unsigned>(v); }

DEVICE void __syncthreads(CALLER_ALONE) { emulated::syncthreads(SITE); }
DEVICE void __syncwarp(unsigned mask = ~0u CALLER) { emulated::syncwarp(mask, SITE); }
template <class T>
DEVICE T __shfl_sync(unsigned mask, T value, int from CALLER) {
  return emulated::shuffle_of(mask, value, from & 31, SITE);
}
template <class T>
DEVICE T __shfl_xor_sync(unsigned mask, T value, int lanes CALLER) {
  return emulated::shuffle_of(mask, value, (threadIdx.x ^ lanes) & 31, SITE);
}
