// LayerNorm with its residual, bias and dropout, forward and backward: a warp a row, whose numbers stay in registers.
//
// x^ = (z - mean z) / sigma, h = gamma x^ + beta; dz = (gamma dh - mean(gamma dh) - x^ mean(gamma dh x^)) / sigma.
// Vectors of groups lie `stride` apart; a stride of 0 is one vector for all.
#pragma once
#include "batch.cuh"

#define NORM_THREADS 256

// Calls `f(k, octet)` for the octets of a row that this lane holds: every thirty-second.
#define EACH_OCTET(N, n)                                       \
  _Pragma("unroll") for (int k = 0; k < N; k++)                \
    if (const int octet = lane() + 32 * k; octet < (n) / 8)

// The row of this warp; grids have whole blocks.
DEVICE int row_of_warp() { return blockIdx.x * (NORM_THREADS / 32) + warp(); }

// Normalises v, and writes h, its rounding (where there is room for one) and x^; gives 1/sigma.
template <int N>
DEVICE void normalise(float v[N][8], int n, float epsilon, const float* gamma, const float* beta, Key key, u32 row_key,
                      u32 cut, float scale, u32 site, float* h, Act* h_act, Act* x_hat, float* r_sigma) {
  float sum = 0;
  EACH_OCTET(N, n)
    for (int i = 0; i < 8; i++) sum += v[k][i];
  const float mean = warp_sum(sum) / n;
  float squares = 0;
  EACH_OCTET(N, n)
    for (int i = 0; i < 8; i++) squares = fmaf(v[k][i] - mean, v[k][i] - mean, squares);
  const float r = 1.f / sqrtf(warp_sum(squares) / n + epsilon);
  EACH_OCTET(N, n) {
    float x[8], g[8], b[8];
    load8(gamma + 8 * octet, g);
    load8(beta + 8 * octet, b);
    for (int i = 0; i < 8; i++) {
      x[i] = (v[k][i] - mean) * r;
      b[i] = fmaf(x[i], g[i], b[i]);
    }
    drop(b, key, row_key, octet, cut, scale, site);
    store8(x_hat + 8 * octet, x);
    store8(h + 8 * octet, b);
    if (h_act) store8(h_act + 8 * octet, b);
  }
  if (lane() == 0) *r_sigma = r;
}

template <int N>
DEVICE void zero_row(int n, float* h, Act* h_act, Act* x_hat, float* r_sigma) {
  const float zeros[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  EACH_OCTET(N, n) {
    if (h) store8(h + 8 * octet, zeros);
    if (h_act) store8(h_act + 8 * octet, zeros);
    if (x_hat) store8(x_hat + 8 * octet, zeros);
  }
  if (r_sigma && lane() == 0) *r_sigma = 0;
}

// h (over x) = gamma x^ + beta with x^ = norm(x + M * (a + b[g])).
#define ADD_NORM_PARAMETERS                                                                                        \
  (float* x, const float* a, const float* bias, int bias_stride, const float* gamma, int gamma_stride,            \
   const float* beta, int beta_stride, Act* h_act, Act* x_hat, float* r_sigma, const Place* places,               \
   const int* groups, const Key* keys, int n, float epsilon, u32 cut, float scale, u32 site)
template <int N>
DEVICE void add_norm ADD_NORM_PARAMETERS {
  const int row = row_of_warp();
  const Place place = places[row];
  const u64 at = (u64)row * n;
  if (h_act) h_act += at;
  if (place.x < 0) return zero_row<N>(n, x + at, h_act, x_hat + at, r_sigma + row);
  const int g = groups[place.x];
  const Key key = keys[place.x];
  bias += (u64)g * bias_stride;
  float v[N][8];
  EACH_OCTET(N, n) {
    float of_a[8], of_b[8];
    load8(x + at + 8 * octet, v[k]);
    load8(a + at + 8 * octet, of_a);
    load8(bias + 8 * octet, of_b);
    for (int i = 0; i < 8; i++) of_a[i] += of_b[i];
    drop(of_a, key, place.y, octet, cut, scale, site);
    for (int i = 0; i < 8; i++) v[k][i] += of_a[i];
  }
  normalise<N>(v, n, epsilon, gamma + (u64)g * gamma_stride, beta + (u64)g * beta_stride, key, place.y, 0, 1.f, 0,
               x + at, h_act, x_hat + at, r_sigma + row);
}
#define ADD_NORM_ARGUMENTS                                                                                     \
  (x, a, bias, bias_stride, gamma, gamma_stride, beta, beta_stride, h_act, x_hat, r_sigma, places, groups, keys, n, \
   epsilon, cut, scale, site)
KERNEL_BOUNDS(NORM_THREADS, add_norm_1, ADD_NORM_PARAMETERS) { add_norm<1> ADD_NORM_ARGUMENTS; }
KERNEL_BOUNDS(NORM_THREADS, add_norm_2, ADD_NORM_PARAMETERS) { add_norm<2> ADD_NORM_ARGUMENTS; }
KERNEL_BOUNDS(NORM_THREADS, add_norm_4, ADD_NORM_PARAMETERS) { add_norm<4> ADD_NORM_ARGUMENTS; }
KERNEL_BOUNDS(NORM_THREADS, add_norm_8, ADD_NORM_PARAMETERS) { add_norm<8> ADD_NORM_ARGUMENTS; }

// From dh to dz, over dh, and M * dz, over x^ where `da` is given.
#define NORM_BACK_PARAMETERS                                                                                \
  (float* dh, const Act* x_hat, Act* da, const float* gamma, int gamma_stride, const float* r_sigma,        \
   const Place* places, const int* groups, const Key* keys, int n, u32 cut, float scale, u32 site)
template <int N>
DEVICE void norm_back NORM_BACK_PARAMETERS {
  const int row = row_of_warp();
  const Place place = places[row];
  const u64 at = (u64)row * n;
  if (da) da += at;
  if (place.x < 0) return zero_row<N>(n, dh + at, da, (Act*)0, (float*)0);
  gamma += (u64)groups[place.x] * gamma_stride;
  float v[N][8], x[N][8], sum = 0, sum_x = 0;
  EACH_OCTET(N, n) {
    float g[8];
    load8(dh + at + 8 * octet, v[k]);
    load8(x_hat + at + 8 * octet, x[k]);
    load8(gamma + 8 * octet, g);
    for (int i = 0; i < 8; i++) {
      v[k][i] *= g[i];
      sum += v[k][i];
      sum_x = fmaf(v[k][i], x[k][i], sum_x);
    }
  }
  const float mean = warp_sum(sum) / n, mean_x = warp_sum(sum_x) / n, r = r_sigma[row];
  const Key key = keys[place.x];
  EACH_OCTET(N, n) {
    float dz[8];
    for (int i = 0; i < 8; i++) dz[i] = r * fmaf(-x[k][i], mean_x, v[k][i] - mean);
    store8(dh + at + 8 * octet, dz);
    if (!da) continue;
    drop(dz, key, place.y, octet, cut, scale, site);
    store8(da + 8 * octet, dz);
  }
}
#define NORM_BACK_ARGUMENTS \
  (dh, x_hat, da, gamma, gamma_stride, r_sigma, places, groups, keys, n, cut, scale, site)
KERNEL_BOUNDS(NORM_THREADS, norm_back_1, NORM_BACK_PARAMETERS) { norm_back<1> NORM_BACK_ARGUMENTS; }
KERNEL_BOUNDS(NORM_THREADS, norm_back_2, NORM_BACK_PARAMETERS) { norm_back<2> NORM_BACK_ARGUMENTS; }
KERNEL_BOUNDS(NORM_THREADS, norm_back_4, NORM_BACK_PARAMETERS) { norm_back<4> NORM_BACK_ARGUMENTS; }
KERNEL_BOUNDS(NORM_THREADS, norm_back_8, NORM_BACK_PARAMETERS) { norm_back<8> NORM_BACK_ARGUMENTS; }

// M * LN(word + position + type).
#define EMBED_PARAMETERS                                                                                        \
  (const Act* word, const Act* position, const Act* type, const u32* ids, const u32* types, const float* gamma, \
   int gamma_stride, const float* beta, int beta_stride, float* h, Act* h_act, Act* x_hat, float* r_sigma,      \
   const Place* places, const int* groups, const Key* keys, int n, float epsilon, u32 cut, float scale, u32 site)
template <int N>
DEVICE void embed EMBED_PARAMETERS {
  const int row = row_of_warp();
  const Place place = places[row];
  const u64 at = (u64)row * n;
  if (h_act) h_act += at;
  if (place.x < 0) return zero_row<N>(n, h + at, h_act, x_hat + at, r_sigma + row);
  const int g = groups[place.x];
  float v[N][8];
  EACH_OCTET(N, n) {
    float of_position[8], of_type[8];
    load8(word + (u64)ids[row] * n + 8 * octet, v[k]);
    load8(position + (u64)place.y * n + 8 * octet, of_position);
    load8(type + (u64)types[row] * n + 8 * octet, of_type);
    for (int i = 0; i < 8; i++) v[k][i] = (v[k][i] + of_position[i]) + of_type[i];
  }
  normalise<N>(v, n, epsilon, gamma + (u64)g * gamma_stride, beta + (u64)g * beta_stride, keys[place.x], place.y, cut,
               scale, site, h + at, h_act, x_hat + at, r_sigma + row);
}
#define EMBED_ARGUMENTS                                                                                            \
  (word, position, type, ids, types, gamma, gamma_stride, beta, beta_stride, h, h_act, x_hat, r_sigma, places, groups, \
   keys, n, epsilon, cut, scale, site)
KERNEL_BOUNDS(NORM_THREADS, embed_1, EMBED_PARAMETERS) { embed<1> EMBED_ARGUMENTS; }
KERNEL_BOUNDS(NORM_THREADS, embed_2, EMBED_PARAMETERS) { embed<2> EMBED_ARGUMENTS; }
KERNEL_BOUNDS(NORM_THREADS, embed_4, EMBED_PARAMETERS) { embed<4> EMBED_ARGUMENTS; }
KERNEL_BOUNDS(NORM_THREADS, embed_8, EMBED_PARAMETERS) { embed<8> EMBED_ARGUMENTS; }

// M * (gamma x^ + beta), rebuilt; rounded before the mask too, as where it was made.
KERNEL_BOUNDS(NORM_THREADS, renorm,
              (const Act* x_hat, const float* gamma, int gamma_stride, const float* beta, int beta_stride, Act* h,
               const Place* places, const int* groups, const Key* keys, int n, u32 cut, float scale, u32 site)) {
  const int row = row_of_warp();
  const Place place = places[row];
  const u64 at = (u64)row * n;
  for (int octet = lane(); octet < n / 8; octet += 32) {
    float v[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    if (place.x >= 0) {
      const int g = groups[place.x];
      float of_gamma[8], of_beta[8];
      load8(x_hat + at + 8 * octet, v);
      load8(gamma + (u64)g * gamma_stride + 8 * octet, of_gamma);
      load8(beta + (u64)g * beta_stride + 8 * octet, of_beta);
      for (int i = 0; i < 8; i++) v[i] = load(store_act(fmaf(v[i], of_gamma[i], of_beta[i])));
      drop(v, keys[place.x], place.y, octet, cut, scale, site);
    }
    store8(h + at + 8 * octet, v);
  }
}

// M * d over d.
KERNEL_BOUNDS(NORM_THREADS, drop_rows,
              (float* d, const Place* places, const Key* keys, int n, u32 cut, float scale, u32 site)) {
  const int row = row_of_warp();
  const Place place = places[row];
  if (place.x < 0) return;
  for (int octet = lane(); octet < n / 8; octet += 32) {
    float v[8];
    float* at = d + (u64)row * n + 8 * octet;
    load8(at, v);
    drop(v, keys[place.x], place.y, octet, cut, scale, site);
    store8(at, v);
  }
}
