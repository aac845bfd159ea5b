// What stands around the products: grouped biases, the activation forward and backward, and column sums by group.
//
// Blocks hold rows of one group, so a thread that owns columns reads its bias once. Sums are made as on the CPU: rows
// of a block in order, blocks of a group in order.
#pragma once
#include "batch.cuh"

#define COLUMN_THREADS 128
// Rows of a block that one thread takes where no sum runs over them.
#define PART_ROWS 16

// The density of the normal distribution at 0, and the constants of GELU's tanh form.
#define DENSITY 0.398942280401432678f
#define SQRT_HALF 0.707106781186547524f
#define TANH_INNER 0.797884560802865356f
#define TANH_CUBIC 0.044715f

enum Activation { GELU = 0, GELU_TANH = 1, RELU = 2 };

DEVICE float normal_cdf(float u) { return 0.5f * erfcf(-u * SQRT_HALF); }

DEVICE float activation_value(int f, float u) {
  if (f == GELU) return u * normal_cdf(u);
  if (f == GELU_TANH) return 0.5f * u * (1.f + tanhf(TANH_INNER * fmaf(TANH_CUBIC * u * u, u, u)));
  return fmaxf(u, 0.f);
}

DEVICE float activation_slope(int f, float u) {
  if (f == GELU) return fmaf(u * DENSITY, expf(-0.5f * u * u), normal_cdf(u));
  if (f == GELU_TANH) {
    const float t = tanhf(TANH_INNER * fmaf(TANH_CUBIC * u * u, u, u));
    const float inner = TANH_INNER * fmaf(3.f * TANH_CUBIC * u, u, 1.f);
    return 0.5f * ((1.f + t) + u * (1.f - t * t) * inner);
  }
  return u > 0.f ? 1.f : 0.f;
}

// The column of this thread, and the rows of its part of its block.
#define COLUMNS_OF_PART(n)                                       \
  const int column = blockIdx.x * COLUMN_THREADS + threadIdx.x;  \
  const Block block = blocks[blockIdx.y];                        \
  const int first = block.first + blockIdx.z * PART_ROWS;        \
  const int end = min(block.end, first + PART_ROWS);             \
  if (column >= (n)) return;

// y = sums + b[g], rounded once; sums and y may be one.
KERNEL_BOUNDS(COLUMN_THREADS, add_bias,
              (const float* sums, const float* bias, int stride, Act* y, const Block* blocks, int n)) {
  COLUMNS_OF_PART(n)
  const float b = block.group < 0 ? 0.f : bias[(u64)block.group * stride + column];
#pragma unroll 4
  for (int row = first; row < end; row++) {
    const u64 at = (u64)row * n + column;
    y[at] = store_act(block.group < 0 ? 0.f : sums[at] + b);
  }
}

// tanh(sums + b[g]).
KERNEL_BOUNDS(COLUMN_THREADS, add_bias_tanh,
              (const float* sums, const float* bias, int stride, Act* y, const Block* blocks, int n)) {
  COLUMNS_OF_PART(n)
  const float b = block.group < 0 ? 0.f : bias[(u64)block.group * stride + column];
  for (int row = first; row < end; row++) {
    const u64 at = (u64)row * n + column;
    y[at] = store_act(block.group < 0 ? 0.f : tanhf(sums[at] + b));
  }
}

// u = sums + b[g], and f(u) of what u was rounded to; sums and u may be one.
KERNEL_BOUNDS(COLUMN_THREADS, add_bias_activate,
              (const float* sums, const float* bias, int stride, Act* u, Act* f, const Block* blocks, int n,
               int activation)) {
  COLUMNS_OF_PART(n)
  const float b = block.group < 0 ? 0.f : bias[(u64)block.group * stride + column];
#pragma unroll 4
  for (int row = first; row < end; row++) {
    const u64 at = (u64)row * n + column;
    const Act rounded = store_act(block.group < 0 ? 0.f : sums[at] + b);
    u[at] = rounded;
    f[at] = store_act(activation_value(activation, load(rounded)));
  }
}

// f(u), element by element.
KERNEL_BOUNDS(COLUMN_THREADS, activate, (const Act* u, Act* f, u64 n, int activation)) {
  const u64 i = (u64)blockIdx.x * COLUMN_THREADS + threadIdx.x;
  if (i < n) f[i] = store_act(activation_value(activation, load(u[i])));
}

// du = sums * f'(u), over u, and each block's column sums of it; sums and u may be one buffer of equal numbers.
KERNEL_BOUNDS(COLUMN_THREADS, activate_back,
              (const float* sums, Act* u, float* partial, const Block* blocks, int n, int activation)) {
  const int column = blockIdx.x * COLUMN_THREADS + threadIdx.x;
  const Block block = blocks[blockIdx.y];
  if (column >= n) return;
  float sum = 0;
#pragma unroll 4
  for (int row = block.first; row < block.end; row++) {
    const u64 at = (u64)row * n + column;
    const Act du = store_act(block.group < 0 ? 0.f : sums[at] * activation_slope(activation, load(u[at])));
    u[at] = du;
    sum += load(du);
  }
  if (partial) partial[(u64)blockIdx.y * n + column] = sum;
}

// Each block's column sums.
template <class T>
DEVICE void sum_blocks(const T* y, float* partial, const Block* blocks, int n) {
  const int column = blockIdx.x * COLUMN_THREADS + threadIdx.x;
  const Block block = blocks[blockIdx.y];
  if (column >= n || block.group < 0) return;
  float sum = 0;
#pragma unroll 8
  for (int row = block.first; row < block.end; row++) sum += load(y[(u64)row * n + column]);
  partial[(u64)blockIdx.y * n + column] = sum;
}
KERNEL_BOUNDS(COLUMN_THREADS, sum_stream, (const float* y, float* partial, const Block* blocks, int n)) {
  sum_blocks(y, partial, blocks, n);
}
KERNEL_BOUNDS(COLUMN_THREADS, sum_act, (const Act* y, float* partial, const Block* blocks, int n)) {
  sum_blocks(y, partial, blocks, n);
}

// Each block's column sums of a * b.
KERNEL_BOUNDS(COLUMN_THREADS, sum_products,
              (const float* a, const Act* b, float* partial, const Block* blocks, int n)) {
  const int column = blockIdx.x * COLUMN_THREADS + threadIdx.x;
  const Block block = blocks[blockIdx.y];
  if (column >= n || block.group < 0) return;
  float sum = 0;
#pragma unroll 8
  for (int row = block.first; row < block.end; row++) {
    const u64 at = (u64)row * n + column;
    sum = fmaf(a[at], load(b[at]), sum);
  }
  partial[(u64)blockIdx.y * n + column] = sum;
}

// Adds the blocks of each group, in order, to its row of `into`: those from first_block[g] to first_block[g + 1].
KERNEL_BOUNDS(COLUMN_THREADS, add_blocks, (const float* partial, const int* first_block, float* into, int n)) {
  const int column = blockIdx.x * COLUMN_THREADS + threadIdx.x, g = blockIdx.y;
  if (column >= n) return;
  float sum = into[(u64)g * n + column];
#pragma unroll 8
  for (int b = first_block[g]; b < first_block[g + 1]; b++) sum += partial[(u64)b * n + column];
  into[(u64)g * n + column] = sum;
}
