// Rows from one row space to another, and numbers from one precision to another.
#pragma once
#include "batch.cuh"

#define ROW_THREADS 128

// Row i of `to` is row from_row[i] of `from`, or zero where that is -1; a block a row.
template <class T>
DEVICE void gather_rows(const T* from, T* to, const int* from_row, int n) {
  const int row = from_row[blockIdx.x];
  for (int octet = threadIdx.x; octet < n / 8; octet += ROW_THREADS) {
    float v[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    if (row >= 0) load8(from + (u64)row * n + 8 * octet, v);
    store8(to + (u64)blockIdx.x * n + 8 * octet, v);
  }
}
KERNEL_BOUNDS(ROW_THREADS, gather_stream, (const float* from, float* to, const int* from_row, int n)) {
  gather_rows(from, to, from_row, n);
}
KERNEL_BOUNDS(ROW_THREADS, gather_act, (const Act* from, Act* to, const int* from_row, int n)) {
  gather_rows(from, to, from_row, n);
}

// Rounded as activations are.
KERNEL_BOUNDS(ROW_THREADS, round_stream, (const float* from, Act* to, u64 n)) {
  const u64 i = (u64)blockIdx.x * ROW_THREADS + threadIdx.x;
  if (i < n) to[i] = store_act(from[i]);
}
