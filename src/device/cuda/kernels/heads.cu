// The upper end of the network: pooler, classifiers and losses. A row a sequence, so it is written for clarity.
#pragma once
#include "batch.cuh"

#define HEAD_THREADS 128

// A group's classifier: its first output among all, and how many it has.
struct Outputs { int first, n; };
// What a sequence should be predicted as: 0 nothing, 1 a class, 2 a value.
struct Target { int kind; u32 bits; };
// The sequences of a group.
struct Range { int first, end; };

// One element of M * pooled.
DEVICE float dropped(const Act* pooled, u64 row, int n, int j, Key key, u32 cut, float scale, u32 site) {
  const float x = load(pooled[row * n + j]);
  if (!cut) return x;
  return draw(draws(key, site, 0, j / 8), j % 8) >= cut ? x * scale : 0.f;
}

// Logits, (rows, widest): a block a sequence, a warp an output; zeros beyond a group's own.
KERNEL_BOUNDS(HEAD_THREADS, classify,
              (const Act* pooled, const float* weight, const float* bias, const Outputs* outputs, float* logits,
               const Place* places, const int* groups, const Key* keys, int n, int widest, u32 cut, float scale,
               u32 site)) {
  const int row = blockIdx.x, sequence = places[row].x;
  const Outputs own = sequence < 0 ? Outputs{0, 0} : outputs[groups[sequence]];
  for (int output = warp(); output < widest; output += HEAD_THREADS / 32) {
    float sum = 0;
    if (output < own.n) {
      const float* w = weight + (u64)(own.first + output) * n;
      for (int j = lane(); j < n; j += 32)
        sum = fmaf(dropped(pooled, row, n, j, keys[sequence], cut, scale, site), w[j], sum);
      sum = warp_sum(sum) + bias[own.first + output];
    }
    if (lane() == 0) logits[(u64)row * widest + output] = sum;
  }
}

// Each group's loss, and the gradient of the logits over them: a warp a group, a lane a sequence; losses are added in
// the order of the sequences. Rows of no sequence are left as they are.
KERNEL_BOUNDS(32, loss,
              (float* logits, const Outputs* outputs, const Target* targets, const Range* sequences,
               const float* group_scale, float* losses, int widest)) {
  const int g = blockIdx.x;
  const Range range = sequences[g];
  const int n = outputs[g].n;
  const float scale = group_scale[g];
  float total = 0;
  for (int first = range.first; first < range.end; first += 32) {
    const int s = first + lane();
    float own = 0;
    if (s < range.end) {
      float* z = logits + (u64)s * widest;
      const Target target = targets[s];
      if (target.kind == 1) {
        float top = z[0], sum = 0;
        for (int k = 1; k < n; k++) top = fmaxf(top, z[k]);
        for (int k = 0; k < n; k++) sum += expf(z[k] - top);
        const float lse = top + logf(sum);
        own = scale * (lse - z[target.bits]);
        for (int k = 0; k < n; k++) z[k] = scale * (expf(z[k] - lse) - (k == (int)target.bits ? 1.f : 0.f));
      } else if (target.kind == 2) {
        const float error = z[0] - __uint_as_float(target.bits);
        own = scale * error * error;
        z[0] = scale * 2.f * error;
      } else {
        for (int k = 0; k < n; k++) z[k] = 0;
      }
    }
    for (int i = 0; i < 32; i++) {
      const float of_lane = __shfl_sync(WARP, own, i);
      if (first + i < range.end) total += of_lane;
    }
  }
  if (lane() == 0) losses[g] = total;
}

// Adds a group's classifier gradients: a thread a weight, over the group's sequences in order.
KERNEL_BOUNDS(HEAD_THREADS, classify_weights,
              (const float* dlogits, const Act* pooled, const Outputs* outputs, const Range* sequences,
               const Key* keys, float* dw, float* db, int dw_stride, int db_stride, int n, int widest, u32 cut,
               float scale, u32 site)) {
  const int j = blockIdx.x * HEAD_THREADS + threadIdx.x, output = blockIdx.y, g = blockIdx.z;
  if (j >= n || output >= outputs[g].n) return;
  const Range range = sequences[g];
  float* to = dw + (u64)g * dw_stride + (u64)output * n + j;
  float sum = *to, of_bias = 0;
  for (int s = range.first; s < range.end; s++) {
    const float dz = dlogits[(u64)s * widest + output];
    sum = fmaf(dz, dropped(pooled, s, n, j, keys[s], cut, scale, site), sum);
    of_bias += dz;
  }
  *to = sum;
  if (j == 0) db[(u64)g * db_stride + output] += of_bias;
}

// The gradient of the pooled output, M * (dlogits W): a block a sequence.
KERNEL_BOUNDS(HEAD_THREADS, classify_back,
              (const float* dlogits, const float* weight, const Outputs* outputs, float* dp, const Place* places,
               const int* groups, const Key* keys, int n, int widest, u32 cut, float scale, u32 site)) {
  const int row = blockIdx.x, sequence = places[row].x;
  const Outputs own = sequence < 0 ? Outputs{0, 0} : outputs[groups[sequence]];
  for (int j = threadIdx.x; j < n; j += HEAD_THREADS) {
    float sum = 0;
    for (int output = 0; output < own.n; output++)
      sum = fmaf(dlogits[(u64)row * widest + output], weight[(u64)(own.first + output) * n + j], sum);
    if (cut && own.n) sum = draw(draws(keys[sequence], site, 0, j / 8), j % 8) >= cut ? sum * scale : 0.f;
    dp[(u64)row * n + j] = sum;
  }
}

// dp (1 - pooled^2) over dp, and its rounding where there is room for one.
KERNEL_BOUNDS(HEAD_THREADS, tanh_back, (float* dp, const Act* pooled, Act* rounded, u64 n)) {
  const u64 i = (u64)blockIdx.x * HEAD_THREADS + threadIdx.x;
  if (i >= n) return;
  const float p = load(pooled[i]), d = dp[i] * (1.f - p * p);
  dp[i] = d;
  if (rounded) rounded[i] = store_act(d);
}
