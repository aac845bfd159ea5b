// Attention inside each sequence, a head at a time: a block takes 64 rows of one head, and goes through the other side
// 64 rows at a time, or 32 on the way back, which holds twice as much. Scores never leave the chip; what is kept is each
// row's log-sum-exp. The output is divided by the row's sum at its end, so what is rounded on the way to its product is
// M * P before that.
//
// S = Q K' / sqrt d, P = softmax S, O = (M * P) V; dP = M * (dO V'), dV = (M * P)' dO, dS = P * (dP - rowsum(dP * P)),
// dQ = dS K / sqrt d, dK = dS' Q / sqrt d (Dao et al. 2022). Heads are `d` wide, a multiple of 8; a tile is D wide, and
// zeros fill it up.
//
// Four warps have 16 rows of a tile each. Sums lie where `mma` leaves them, in f32 too: of every eight columns, lane
// 4 r + c has columns 2c and 2c + 1 of rows r and r + 8.
#pragma once
#include "batch.cuh"

#define TILE 64
#define OTHER 32
#define ATTENTION_THREADS 128
// Numbers between the rows of a tile in shared memory, so that rows start in different banks, 16 bytes aligned.
#define GAP (16 / (int)sizeof(Act))
#define STRIDE(width) ((width) + GAP)

typedef u8 Kept[TILE][TILE / 8];

// Of this lane's sums: the row of the warp's 16, and the column.
DEVICE int row_of_sum(int i) { return (lane() >> 2) + 8 * (i >> 1); }
DEVICE int column_of_sum(int block, int i) { return 8 * block + 2 * (lane() & 3) + (i & 1); }

// sums (16, 8 N) += a b: a is (16, K), b (K, 8 N), which lies as (8 N, K) or, where TRANSPOSED, as (K, 8 N).
template <int N, int K, bool TRANSPOSED>
DEVICE void multiply(float (&sums)[N][4], const Act* a, int a_stride, const Act* b, int b_stride) {
#if PRECISION == 2
#pragma unroll
  for (int k = 0; k < K; k += 16) {
    u32 left[4];
    ldmatrix_x4(left, a + (lane() & 15) * a_stride + k + (lane() >> 4) * 8);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      u32 right[4];
      const int within = lane() & 7, second = (lane() >> 3) & 1, fourth = lane() >> 4;
      if (TRANSPOSED) ldmatrix_x4_transposed(right, b + (k + within + 8 * second) * b_stride + 8 * (n + fourth));
      else ldmatrix_x4(right, b + (8 * (n + fourth) + within) * b_stride + k + 8 * second);
      mma_bf16(sums[n], left, right);
      mma_bf16(sums[n + 1], left, right + 2);
    }
  }
#elif PRECISION == 1
  const int r = lane() >> 2, c = lane() & 3;
#pragma unroll
  for (int k = 0; k < K; k += 8) {
    const Act* at = a + r * a_stride + k + c;
    const u32 left[4] = {tf32(at[0]), tf32(at[8 * a_stride]), tf32(at[4]), tf32(at[8 * a_stride + 4])};
#pragma unroll
    for (int n = 0; n < N; n++) {
      u32 right[2];
      for (int i = 0; i < 2; i++) {
        const int row = k + c + 4 * i, column = 8 * n + r;
        right[i] = tf32(TRANSPOSED ? b[row * b_stride + column] : b[column * b_stride + row]);
      }
      mma_tf32(sums[n], left, right);
    }
  }
#else
  const int r = lane() >> 2, c = 2 * (lane() & 3);
#pragma unroll 4
  for (int k = 0; k < K; k++) {
    const float low = a[r * a_stride + k], high = a[(r + 8) * a_stride + k];
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int column = 8 * n + c + i;
        const float x = TRANSPOSED ? b[k * b_stride + column] : b[column * b_stride + k];
        sums[n][i] = fmaf(low, x, sums[n][i]);
        sums[n][2 + i] = fmaf(high, x, sums[n][2 + i]);
      }
  }
#endif
}

template <int N>
DEVICE void clear(float (&sums)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) sums[n][i] = 0;
}

// A head's columns of `rows` rows, into a tile; zeros beyond.
template <int D, int ROWS = TILE>
DEVICE void load_tile(Act* to, const Act* from, int rows, int h, int head, int d) {
  const int per = 16 / sizeof(Act), chunks = D / per;
  for (int i = threadIdx.x; i < ROWS * chunks; i += ATTENTION_THREADS) {
    const int row = i / chunks, column = i % chunks * per;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (row < rows && column < d) v = *(const uint4*)(from + (u64)row * h + head * d + column);
    *(uint4*)(to + row * STRIDE(D) + column) = v;
  }
}

// A warp's 16 rows of sums, times a factor a row, to a head's columns; rows from `rows` on are not the matrix's.
template <int D>
DEVICE void store_rows(const float (&sums)[D / 8][4], Act* to, int rows, int h, int head, int d, float low,
                       float high) {
#pragma unroll
  for (int n = 0; n < D / 8; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = 16 * warp() + row_of_sum(i), column = column_of_sum(n, i);
      if (row < rows && column < d) to[(u64)row * h + head * d + column] = store_act(sums[n][i] * (i < 2 ? low : high));
    }
}

// Zeros where no sequence is.
DEVICE void zero_tile(Act* to, int rows, int h, int head, int d) {
  for (int i = threadIdx.x; i < rows * d; i += ATTENTION_THREADS)
    to[(u64)(i / d) * h + head * d + i % d] = store_act(0);
}

// Which of a tile's scores are kept: a bit each, a byte for eight keys of a query.
template <int QUERIES, int KEYS>
DEVICE void draw_kept(Kept& kept, Key key, int head, int position, int queries, int first_key, int keys, u32 cut,
                      u32 site) {
  if (!cut) return;
  for (int i = threadIdx.x; i < QUERIES * (KEYS / 8); i += ATTENTION_THREADS) {
    const int query = i / (KEYS / 8), octet = i % (KEYS / 8);
    if (query >= queries || 8 * octet >= keys) continue;
    const uint4 of = draws(key, site, (u32)head << 16 | (u32)(position + query), first_key / 8 + octet);
    u32 bits = 0;
#pragma unroll
    for (int j = 0; j < 8; j++) bits |= (draw(of, j) >= cut ? 1u : 0u) << j;
    kept[query][octet] = (u8)bits;
  }
}

DEVICE float multiplier(const Kept& kept, int query, int key, u32 cut, float scale) {
  if (!cut) return 1.f;
  return kept[query][key >> 3] >> (key & 7) & 1 ? scale : 0.f;
}

// Sums over the four lanes that have a row between them.
DEVICE float row_sum(float v) {
  v += __shfl_xor_sync(WARP, v, 1);
  return v + __shfl_xor_sync(WARP, v, 2);
}
DEVICE float row_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(WARP, v, 1));
  return fmaxf(v, __shfl_xor_sync(WARP, v, 2));
}

#define FORWARD_PARAMETERS                                                                                         \
  (const Act* q, const Act* k, const Act* v, Act* o, float* lse, const Tile* tiles, const int* bounds,             \
   const Key* sequence_keys, int h, int heads, int d, float root, u32 cut, float scale, u32 site)
template <int D>
DEVICE void attention_forward FORWARD_PARAMETERS {
  DYNAMIC_SHARED(Act, shared);
  __shared__ Kept kept;
  Act *qs = shared, *ks = qs + TILE * STRIDE(D), *vs = ks + TILE * STRIDE(D), *ps = vs + TILE * STRIDE(D);
  const Tile tile = tiles[blockIdx.x];
  const int head = blockIdx.y;
  if (tile.sequence < 0) {
    zero_tile(o + (u64)tile.first * h, tile.rows, h, head, d);
    for (int i = threadIdx.x; i < tile.rows; i += ATTENTION_THREADS) lse[(u64)(tile.first + i) * heads + head] = 0;
    return;
  }
  const int first = bounds[tile.sequence], length = bounds[tile.sequence + 1] - first;
  const Key key = sequence_keys[tile.sequence];
  Act* own = ps + 16 * warp() * STRIDE(TILE);
  float sums[D / 8][4], top[2] = {-INFINITE, -INFINITE}, total[2] = {0, 0};
  clear(sums);
  load_tile<D>(qs, q + (u64)tile.first * h, tile.rows, h, head, d);
  for (int at = 0; at < length; at += TILE) {
    const int keys = min(TILE, length - at);
    __syncthreads();
    load_tile<D>(ks, k + (u64)(first + at) * h, keys, h, head, d);
    load_tile<D>(vs, v + (u64)(first + at) * h, keys, h, head, d);
    draw_kept<TILE, TILE>(kept, key, head, tile.position, tile.rows, at, keys, cut, site);
    __syncthreads();
    float s[TILE / 8][4], most[2] = {-INFINITE, -INFINITE}, sum[2] = {0, 0};
    clear(s);
    multiply<TILE / 8, D, false>(s, qs + 16 * warp() * STRIDE(D), STRIDE(D), ks, STRIDE(D));
#pragma unroll
    for (int n = 0; n < TILE / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        s[n][i] = column_of_sum(n, i) < keys ? s[n][i] * root : -INFINITE;
        most[i >> 1] = fmaxf(most[i >> 1], s[n][i]);
      }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      most[r] = fmaxf(top[r], row_max(most[r]));
      const float shrink = expf(top[r] - most[r]);
      total[r] *= shrink;
      top[r] = most[r];
#pragma unroll
      for (int n = 0; n < D / 8; n++) {
        sums[n][2 * r] *= shrink;
        sums[n][2 * r + 1] *= shrink;
      }
    }
#pragma unroll
    for (int n = 0; n < TILE / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = row_of_sum(i), column = column_of_sum(n, i);
        const float p = expf(s[n][i] - top[i >> 1]);
        sum[i >> 1] += p;
        own[row * STRIDE(TILE) + column] =
            store_act(p == 0.f ? 0.f : p * multiplier(kept, 16 * warp() + row, column, cut, scale));
      }
    __syncwarp();
    multiply<D / 8, TILE, true>(sums, own, STRIDE(TILE), vs, STRIDE(D));
    total[0] += row_sum(sum[0]);
    total[1] += row_sum(sum[1]);
  }
  store_rows<D>(sums, o + (u64)tile.first * h, tile.rows, h, head, d, 1.f / total[0], 1.f / total[1]);
  if ((lane() & 3) == 0)
    for (int r = 0; r < 2; r++) {
      const int row = 16 * warp() + (lane() >> 2) + 8 * r;
      if (row < tile.rows) lse[(u64)(tile.first + row) * heads + head] = top[r] + logf(total[r]);
    }
}
#define FORWARD_ARGUMENTS (q, k, v, o, lse, tiles, bounds, sequence_keys, h, heads, d, root, cut, scale, site)
KERNEL_BOUNDS(ATTENTION_THREADS, attention_32, FORWARD_PARAMETERS) { attention_forward<32> FORWARD_ARGUMENTS; }
KERNEL_BOUNDS(ATTENTION_THREADS, attention_64, FORWARD_PARAMETERS) { attention_forward<64> FORWARD_ARGUMENTS; }

// dq, and each row's rowsum(dP * P) to `dots`.
#define QUERIES_PARAMETERS                                                                                          \
  (const Act* q, const Act* k, const Act* v, const Act* d_o, const float* lse, Act* dq, float* dots,                \
   const Tile* tiles, const int* bounds, const Key* sequence_keys, int h, int heads, int d, float root, u32 cut,    \
   float scale, u32 site)
template <int D>
DEVICE void attention_queries QUERIES_PARAMETERS {
  DYNAMIC_SHARED(Act, shared);
  __shared__ Kept kept;
  Act *qs = shared, *d_os = qs + TILE * STRIDE(D), *ks = d_os + TILE * STRIDE(D), *vs = ks + OTHER * STRIDE(D);
  Act* own = vs + OTHER * STRIDE(D) + 16 * warp() * STRIDE(OTHER);
  const Tile tile = tiles[blockIdx.x];
  const int head = blockIdx.y;
  if (tile.sequence < 0) {
    zero_tile(dq + (u64)tile.first * h, tile.rows, h, head, d);
    return;
  }
  const int first = bounds[tile.sequence], length = bounds[tile.sequence + 1] - first;
  const Key key = sequence_keys[tile.sequence];
  float sums[D / 8][4], of_lse[2], dot[2] = {0, 0};
  clear(sums);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int row = 16 * warp() + (lane() >> 2) + 8 * r;
    of_lse[r] = row < tile.rows ? lse[(u64)(tile.first + row) * heads + head] : 0.f;
  }
  load_tile<D>(qs, q + (u64)tile.first * h, tile.rows, h, head, d);
  load_tile<D>(d_os, d_o + (u64)tile.first * h, tile.rows, h, head, d);
  // Once for the dots, once for the gradient, which needs them.
#pragma unroll 1
  for (int pass = 0; pass < 2; pass++) {
#pragma unroll 1
    for (int at = 0; at < length; at += OTHER) {
      const int keys = min(OTHER, length - at);
      __syncthreads();
      load_tile<D, OTHER>(ks, k + (u64)(first + at) * h, keys, h, head, d);
      load_tile<D, OTHER>(vs, v + (u64)(first + at) * h, keys, h, head, d);
      draw_kept<TILE, OTHER>(kept, key, head, tile.position, tile.rows, at, keys, cut, site);
      __syncthreads();
      float s[OTHER / 8][4], dp[OTHER / 8][4];
      clear(s);
      clear(dp);
      multiply<OTHER / 8, D, false>(s, qs + 16 * warp() * STRIDE(D), STRIDE(D), ks, STRIDE(D));
      multiply<OTHER / 8, D, false>(dp, d_os + 16 * warp() * STRIDE(D), STRIDE(D), vs, STRIDE(D));
#pragma unroll
      for (int n = 0; n < OTHER / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int row = row_of_sum(i), column = column_of_sum(n, i);
          const float p = column < keys ? expf(fmaf(s[n][i], root, -of_lse[i >> 1])) : 0.f;
          const float of_p =
              column < keys ? dp[n][i] * multiplier(kept, 16 * warp() + row, column, cut, scale) : 0.f;
          if (pass == 0) dot[i >> 1] = fmaf(p, of_p, dot[i >> 1]);
          else own[row * STRIDE(OTHER) + column] = store_act(p * (of_p - dot[i >> 1]) * root);
        }
      if (pass == 0) continue;
      __syncwarp();
      multiply<D / 8, OTHER, true>(sums, own, STRIDE(OTHER), ks, STRIDE(D));
    }
    if (pass == 0) {
      dot[0] = row_sum(dot[0]);
      dot[1] = row_sum(dot[1]);
    }
  }
  store_rows<D>(sums, dq + (u64)tile.first * h, tile.rows, h, head, d, 1.f, 1.f);
  if ((lane() & 3) == 0)
    for (int r = 0; r < 2; r++) {
      const int row = 16 * warp() + (lane() >> 2) + 8 * r;
      if (row < tile.rows) dots[(u64)(tile.first + row) * heads + head] = dot[r];
    }
}
#define QUERIES_ARGUMENTS \
  (q, k, v, d_o, lse, dq, dots, tiles, bounds, sequence_keys, h, heads, d, root, cut, scale, site)
KERNEL_BOUNDS(ATTENTION_THREADS, attention_queries_32, QUERIES_PARAMETERS) { attention_queries<32> QUERIES_ARGUMENTS; }
KERNEL_BOUNDS(ATTENTION_THREADS, attention_queries_64, QUERIES_PARAMETERS) { attention_queries<64> QUERIES_ARGUMENTS; }

// dk and dv, over k and v: a block has the keys of a tile, and goes through its sequence's queries. Where `firsts`,
// these are one a sequence.
#define KEYS_PARAMETERS                                                                                              \
  (const Act* q, Act* k, Act* v, const Act* d_o, const float* lse, const float* dots, const Tile* tiles,             \
   const int* bounds, const Key* sequence_keys, int firsts, int h, int heads, int d, float root, u32 cut, float scale, \
   u32 site)
template <int D>
DEVICE void attention_keys KEYS_PARAMETERS {
  DYNAMIC_SHARED(Act, shared);
  __shared__ Kept kept;
  __shared__ float of_lse[OTHER], of_dot[OTHER];
  Act *ks = shared, *vs = ks + TILE * STRIDE(D), *qs = vs + TILE * STRIDE(D), *d_os = qs + OTHER * STRIDE(D);
  Act* own = d_os + OTHER * STRIDE(D) + 16 * warp() * STRIDE(OTHER);
  const Tile tile = tiles[blockIdx.x];
  const int head = blockIdx.y;
  Act *to_k = k + (u64)tile.first * h, *to_v = v + (u64)tile.first * h;
  if (tile.sequence < 0) {
    zero_tile(to_k, tile.rows, h, head, d);
    zero_tile(to_v, tile.rows, h, head, d);
    return;
  }
  const int first = firsts ? tile.sequence : bounds[tile.sequence];
  const int n_queries = firsts ? 1 : bounds[tile.sequence + 1] - first;
  const Key key = sequence_keys[tile.sequence];
  float dk[D / 8][4], dv[D / 8][4];
  clear(dk);
  clear(dv);
  load_tile<D>(ks, to_k, tile.rows, h, head, d);
  load_tile<D>(vs, to_v, tile.rows, h, head, d);
#pragma unroll 1
  for (int at = 0; at < n_queries; at += OTHER) {
    const int queries = min(OTHER, n_queries - at);
    __syncthreads();
    load_tile<D, OTHER>(qs, q + (u64)(first + at) * h, queries, h, head, d);
    load_tile<D, OTHER>(d_os, d_o + (u64)(first + at) * h, queries, h, head, d);
    draw_kept<OTHER, TILE>(kept, key, head, at, queries, tile.position, tile.rows, cut, site);
    for (int i = threadIdx.x; i < OTHER; i += ATTENTION_THREADS) {
      of_lse[i] = i < queries ? lse[(u64)(first + at + i) * heads + head] : 0.f;
      of_dot[i] = i < queries ? dots[(u64)(first + at + i) * heads + head] : 0.f;
    }
    __syncthreads();
    // Scores stand on their side here: a row a key, a column a query.
    float s[OTHER / 8][4], dp[OTHER / 8][4];
    clear(s);
    clear(dp);
    multiply<OTHER / 8, D, false>(s, ks + 16 * warp() * STRIDE(D), STRIDE(D), qs, STRIDE(D));
    multiply<OTHER / 8, D, false>(dp, vs + 16 * warp() * STRIDE(D), STRIDE(D), d_os, STRIDE(D));
#pragma unroll
    for (int n = 0; n < OTHER / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = row_of_sum(i), query = column_of_sum(n, i), of_tile = 16 * warp() + row;
        const bool real = query < queries && of_tile < tile.rows;
        const float p = real ? expf(fmaf(s[n][i], root, -of_lse[query])) : 0.f;
        const float m = real ? multiplier(kept, query, of_tile, cut, scale) : 0.f;
        own[row * STRIDE(OTHER) + query] = store_act(p * m);
        dp[n][i] = real ? p * (dp[n][i] * m - of_dot[query]) * root : 0.f;
      }
    __syncwarp();
    multiply<D / 8, OTHER, true>(dv, own, STRIDE(OTHER), d_os, STRIDE(D));
    __syncwarp();
#pragma unroll
    for (int n = 0; n < OTHER / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) own[row_of_sum(i) * STRIDE(OTHER) + column_of_sum(n, i)] = store_act(dp[n][i]);
    __syncwarp();
    multiply<D / 8, OTHER, true>(dk, own, STRIDE(OTHER), qs, STRIDE(D));
  }
  store_rows<D>(dk, to_k, tile.rows, h, head, d, 1.f, 1.f);
  store_rows<D>(dv, to_v, tile.rows, h, head, d, 1.f, 1.f);
}
#define KEYS_ARGUMENTS \
  (q, k, v, d_o, lse, dots, tiles, bounds, sequence_keys, firsts, h, heads, d, root, cut, scale, site)
KERNEL_BOUNDS(ATTENTION_THREADS, attention_keys_32, KEYS_PARAMETERS) { attention_keys<32> KEYS_ARGUMENTS; }
KERNEL_BOUNDS(ATTENTION_THREADS, attention_keys_64, KEYS_PARAMETERS) { attention_keys<64> KEYS_ARGUMENTS; }
