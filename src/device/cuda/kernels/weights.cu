// Where weights train: gradients of sampled entries and of embedding tables, and weights written anew.
#pragma once
#include "batch.cuh"

#define WEIGHT_THREADS 128

// (rows, columns) to (columns, rows), at full width: 32 x 32 numbers a block of 32 x 8 threads.
template <class T>
DEVICE void transpose(const T* from, float* to, int rows, int columns) {
  __shared__ float tile[32][33];
  const int x = lane(), column = blockIdx.x * 32, row = blockIdx.y * 32;
  for (int y = warp(); y < 32; y += 8)
    if (row + y < rows && column + x < columns) tile[y][x] = load(from[(u64)(row + y) * columns + column + x]);
  __syncthreads();
  for (int y = warp(); y < 32; y += 8)
    if (column + y < columns && row + x < rows) to[(u64)(column + y) * rows + row + x] = tile[x][y];
}
KERNEL_BOUNDS(256, transpose_act, (const Act* from, float* to, int rows, int columns)) {
  transpose(from, to, rows, columns);
}
KERNEL_BOUNDS(256, transpose_stream, (const float* from, float* to, int rows, int columns)) {
  transpose(from, to, rows, columns);
}

// Adds dy' x of the entries asked for, flat positions in (out, in); both sides lie transposed, a warp an entry.
KERNEL_BOUNDS(WEIGHT_THREADS, sampled_products,
              (const float* dy, const float* x, int rows, const u64* entries, int n_in, float* values, int n)) {
  const int i = blockIdx.x * (WEIGHT_THREADS / 32) + warp();
  if (i >= n) return;
  const float *of_dy = dy + entries[i] / n_in * rows, *of_x = x + entries[i] % n_in * rows;
  float sum = 0;
  for (int row = lane(); row < rows; row += 32) sum = fmaf(of_dy[row], of_x[row], sum);
  sum = warp_sum(sum);
  if (lane() == 0) values[i] += sum;
}

// Rows of activations that read one row of a table: the row, and where they stand among all that are ordered so.
struct Readers { int row, first, end, unused; };

// Adds the rows of dz to the table's rows that they read, in order; a block a row that is read.
KERNEL_BOUNDS(WEIGHT_THREADS, scatter_rows,
              (const float* dz, const Readers* readers, const int* n_readers, const int* order, float* table, int n)) {
  if ((int)blockIdx.x >= *n_readers) return;
  const Readers of = readers[blockIdx.x];
  for (int j = threadIdx.x; j < n; j += WEIGHT_THREADS) {
    float* to = table + (u64)of.row * n + j;
    float sum = *to;
    for (int i = of.first; i < of.end; i++) sum += dz[(u64)order[i] * n + j];
    *to = sum;
  }
}

// As scatter_rows, of the entries asked for; readers are ordered by row.
KERNEL_BOUNDS(WEIGHT_THREADS, scatter_entries,
              (const float* dz, const Readers* readers, const int* n_readers, const int* order, const u64* entries,
               float* values, int n_entries, int n)) {
  const int e = blockIdx.x * WEIGHT_THREADS + threadIdx.x;
  if (e >= n_entries) return;
  const int row = (int)(entries[e] / n), column = (int)(entries[e] % n);
  int low = 0, high = *n_readers;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (readers[middle].row < row) low = middle + 1;
    else high = middle;
  }
  if (low == *n_readers || readers[low].row != row) return;
  float sum = values[e];
  for (int i = readers[low].first; i < readers[low].end; i++) sum += dz[(u64)order[i] * n + column];
  values[e] = sum;
}

// into = base + delta, stored as weights are; or into[at[i]] = base[i] + delta[i].
KERNEL_BOUNDS(WEIGHT_THREADS, write_weight,
              (const float* base, const float* delta, const u64* at, Act* into, u64 n)) {
  const u64 i = (u64)blockIdx.x * WEIGHT_THREADS + threadIdx.x;
  if (i < n) into[at ? at[i] : i] = store_act(base[i] + delta[i]);
}

// into[i] = from[at[i]].
KERNEL_BOUNDS(WEIGHT_THREADS, gather_entries, (const float* from, const u64* at, float* into, u64 n)) {
  const u64 i = (u64)blockIdx.x * WEIGHT_THREADS + threadIdx.x;
  if (i < n) into[i] = from[at[i]];
}
