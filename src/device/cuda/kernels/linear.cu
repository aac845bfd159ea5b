// What stands around the products: grouped biases, the activation forward and backward, and column sums by group.
//
// Blocks hold rows of one group, so a thread that owns columns reads its bias once. Sums are made as on the CPU: rows
// of a block in order, blocks of a group in order. What a product leaves here is stored as activations are: in bf16 a
// number is rounded once more, when its bias is added, which costs less than to carry f32 to memory and back.
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

// Rows whose numbers are read before any is written: what is written could be what is read next, for all that the
// compiler knows, so it would wait for each.
#define AHEAD 4

// The column of this thread, and the rows of its part of its block.
#define COLUMNS_OF_PART(n)                                       \
  const int column = blockIdx.x * COLUMN_THREADS + threadIdx.x;  \
  const Block block = blocks[blockIdx.y];                        \
  const int first = block.first + blockIdx.z * PART_ROWS;        \
  const int end = min(block.end, first + PART_ROWS);             \
  if (column >= (n)) return;

// The numbers of up to AHEAD rows from `row` on, of one column; zeros beyond the block's end or where it has no group.
DEVICE void read_ahead(float v[AHEAD], const Act* from, int row, int end, int n, int column, bool real) {
#pragma unroll
  for (int i = 0; i < AHEAD; i++) v[i] = real && row + i < end ? load(from[(u64)(row + i) * n + column]) : 0.f;
}

// f(y + b[g]) over y.
template <class F>
DEVICE void add_bias_to(Act* y, const float* bias, int stride, const Block* blocks, int n, F f) {
  COLUMNS_OF_PART(n)
  const bool real = block.group >= 0;
  const float b = real ? bias[(u64)block.group * stride + column] : 0.f;
  for (int row = first; row < end; row += AHEAD) {
    float v[AHEAD];
    read_ahead(v, y, row, end, n, column, real);
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
      if (row + i < end) f((u64)(row + i) * n + column, real ? v[i] + b : 0.f);
  }
}

// y + b[g] over y.
KERNEL_BOUNDS(COLUMN_THREADS, add_bias, (Act* y, const float* bias, int stride, const Block* blocks, int n)) {
  add_bias_to(y, bias, stride, blocks, n, [=](u64 at, float v) { y[at] = store_act(v); });
}

// tanh(y + b[g]) over y.
KERNEL_BOUNDS(COLUMN_THREADS, add_bias_tanh, (Act* y, const float* bias, int stride, const Block* blocks, int n)) {
  add_bias_to(y, bias, stride, blocks, n, [=](u64 at, float v) { y[at] = store_act(tanhf(v)); });
}

// u + b[g] over u, and f(u) of what that was rounded to.
KERNEL_BOUNDS(COLUMN_THREADS, add_bias_activate,
              (Act* u, const float* bias, int stride, Act* f, const Block* blocks, int n, int activation)) {
  add_bias_to(u, bias, stride, blocks, n, [=](u64 at, float v) {
    const Act rounded = store_act(v);
    u[at] = rounded;
    f[at] = store_act(activation_value(activation, load(rounded)));
  });
}

// f(u), element by element.
KERNEL_BOUNDS(COLUMN_THREADS, activate, (const Act* u, Act* f, int activation, u64 n)) {
  const u64 i = (u64)blockIdx.x * COLUMN_THREADS + threadIdx.x;
  if (i < n) f[i] = store_act(activation_value(activation, load(u[i])));
}

// du = d * f'(u), over u, and each block's column sums of it.
KERNEL_BOUNDS(COLUMN_THREADS, activate_back,
              (const Act* d, Act* u, float* partial, const Block* blocks, int n, int activation)) {
  const int column = blockIdx.x * COLUMN_THREADS + threadIdx.x;
  const Block block = blocks[blockIdx.y];
  if (column >= n) return;
  float sum = 0;
  for (int row = block.first; row < block.end; row += AHEAD) {
    float of_d[AHEAD], of_u[AHEAD];
    read_ahead(of_d, d, row, block.end, n, column, block.group >= 0);
    read_ahead(of_u, u, row, block.end, n, column, block.group >= 0);
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      if (row + i >= block.end) break;
      const Act du = store_act(of_d[i] * activation_slope(activation, of_u[i]));
      u[(u64)(row + i) * n + column] = du;
      sum += load(du);
    }
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
