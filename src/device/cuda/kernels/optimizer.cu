// The optimizer's arithmetic, for many tensors of many groups in one launch: a block a chunk of one of them. AdamW as
// PyTorch computes it, clipped by the norm over all of a group's tensors (`clip_grad_norm_`).
#pragma once
#include "batch.cuh"

#define OPTIMIZER_THREADS 256
// Numbers of a chunk.
#define CHUNK 4096
#define CLIP_EPSILON 1e-6

// A chunk of a tensor: which of the descriptions it belongs to, and its first number.
struct Chunk { u32 of; u32 first; };

// Numbers that lie one behind the other.
struct Numbers { float* at; u64 n; };

// A chunk's end.
DEVICE u64 end_of(Chunk chunk, u64 n) { return chunk.first + CHUNK < n ? chunk.first + CHUNK : n; }

// Sets vectors to zero.
KERNEL_BOUNDS(OPTIMIZER_THREADS, clear_vectors, (const Numbers* vectors, const Chunk* chunks)) {
  const Chunk chunk = chunks[blockIdx.x];
  const Numbers vector = vectors[chunk.of];
  const u64 end = end_of(chunk, vector.n);
  for (u64 i = chunk.first + threadIdx.x; i < end; i += OPTIMIZER_THREADS) vector.at[i] = 0;
}

// Each chunk's squared norm.
KERNEL_BOUNDS(OPTIMIZER_THREADS, square_chunks, (const Numbers* gradients, const Chunk* chunks, float* partial)) {
  __shared__ float of_warp[OPTIMIZER_THREADS / 32];
  const Chunk chunk = chunks[blockIdx.x];
  const Numbers gradient = gradients[chunk.of];
  const u64 end = end_of(chunk, gradient.n);
  float sum = 0;
  for (u64 i = chunk.first + threadIdx.x; i < end; i += OPTIMIZER_THREADS)
    sum = fmaf(gradient.at[i], gradient.at[i], sum);
  sum = warp_sum(sum);
  if (lane() == 0) of_warp[warp()] = sum;
  __syncthreads();
  if (threadIdx.x) return;
  sum = 0;
  for (int w = 0; w < OPTIMIZER_THREADS / 32; w++) sum += of_warp[w];
  partial[blockIdx.x] = sum;
}

// Adds the chunks of each group, in order, to its sum: those from first[g] to first[g + 1]; a warp a group.
KERNEL_BOUNDS(32, add_squares, (const float* partial, const u32* first, float* sums)) {
  const int g = blockIdx.x;
  double sum = 0;
  for (u32 i = first[g] + lane(); i < first[g + 1]; i += 32) sum += partial[i];
  for (int m = 16; m; m >>= 1) sum += __shfl_xor_sync(WARP, sum, m);
  if (lane() == 0 && first[g] < first[g + 1]) sums[g] = (float)(sums[g] + sum);
}

// A tensor of one group to step, and the group's settings of this step.
struct Step {
  const float *base, *gradient, *squares;
  float *delta, *m, *v;
  u64 n;
  double max_norm;
  // beta1, 1 - beta1, beta2, 1 - beta2; learning rate / (1 - beta1^t), root of 1 - beta2^t, rate * decay, epsilon.
  float b1, rest1, b2, rest2, rate, root, decay, epsilon;
};

KERNEL_BOUNDS(OPTIMIZER_THREADS, adamw, (const Step* steps, const Chunk* chunks)) {
  const Chunk chunk = chunks[blockIdx.x];
  const Step& s = steps[chunk.of];
  // A norm that is no number is left to show itself.
  const double ratio = s.max_norm / (sqrt((double)*s.squares) + CLIP_EPSILON);
  const float clip = ratio > 1.0 ? 1.f : (float)ratio;
  const u64 end = end_of(chunk, s.n);
  for (u64 i = chunk.first + threadIdx.x; i < end; i += OPTIMIZER_THREADS) {
    const float g = s.gradient[i] * clip;
    const float m = fmaf(s.b1, s.m[i], s.rest1 * g), v = fmaf(s.b2, s.v[i], s.rest2 * g * g);
    const float step = s.rate * m / (sqrtf(v) / s.root + s.epsilon);
    s.m[i] = m;
    s.v[i] = v;
    s.delta[i] = s.delta[i] - s.decay * (s.base[i] + s.delta[i]) - step;
  }
}

// A vector to put in use: into = base + delta, or into[at[i]] = base[i] + delta[i].
struct Sum {
  const float *base, *delta;
  const u64* at;
  float* into;
  u64 n;
};

KERNEL_BOUNDS(OPTIMIZER_THREADS, add_deltas, (const Sum* sums, const Chunk* chunks)) {
  const Chunk chunk = chunks[blockIdx.x];
  const Sum& s = sums[chunk.of];
  const u64 end = end_of(chunk, s.n);
  for (u64 i = chunk.first + threadIdx.x; i < end; i += OPTIMIZER_THREADS)
    s.into[s.at ? s.at[i] : i] = s.base[i] + s.delta[i];
}
