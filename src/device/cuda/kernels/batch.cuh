// How kernels know the batch: by the lists that `lists.rs` writes. A grid is as large as the largest
// batch of its size class needs; what is beyond the batch at hand has a sequence or a group of -1, and rows of zeros
// are written there, so that sums over all rows of a buffer are those of the batch.
#pragma once
#include "device.cuh"

#define INFINITE __uint_as_float(0x7f800000u)

// Rows that one group's sums are made of at a time, counted from the group's first row.
#define BLOCK_ROWS 64

// A row of activations: its sequence, and its position in it.
typedef int2 Place;

// Rows [first, end) of one group: at most BLOCK_ROWS of them.
struct Block { int group, first, end, unused; };

// At most 64 rows of one sequence: `first` is the first row's place in the matrix, `position` in the sequence.
struct Tile { int sequence, first, rows, position; };

// What keys a sequence's masks: the seed's halves, its index in its run's batch shifted by 12, the step.
typedef uint4 Key;

// Eight draws, for the elements 8 `octet` .. 8 `octet` + 7 of a row: two a word, the low half first.
DEVICE uint4 draws(Key key, u32 site, u32 row, u32 octet) {
  uint4 counter;
  counter.x = octet;
  counter.y = row;
  counter.z = key.z | site;
  counter.w = key.w;
  return philox(key.x, key.y, counter);
}

DEVICE u32 draw(const uint4& of, int i) {
  const u32 word = i < 4 ? (i < 2 ? of.x : of.y) : (i < 6 ? of.z : of.w);
  return i & 1 ? word >> 16 : word & 0xffff;
}

// Multiplies eight elements by their mask. Where in the network it is drawn is `site`: the layer shifted by 4, and the
// place in it; a draw must reach `cut` to be kept (0: all is kept), and what is kept is multiplied by `scale`.
DEVICE void drop(float v[8], Key key, u32 row, u32 octet, u32 cut, float scale, u32 site) {
  if (!cut) return;
  const uint4 of = draws(key, site, row, octet);
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] = draw(of, i) >= cut ? v[i] * scale : 0.f;
}

DEVICE void load8(const float* from, float v[8]) {
  const float4 low = *(const float4*)from, high = *(const float4*)(from + 4);
  v[0] = low.x; v[1] = low.y; v[2] = low.z; v[3] = low.w;
  v[4] = high.x; v[5] = high.y; v[6] = high.z; v[7] = high.w;
}

DEVICE void store8(float* to, const float v[8]) {
  *(float4*)to = make_float4(v[0], v[1], v[2], v[3]);
  *(float4*)(to + 4) = make_float4(v[4], v[5], v[6], v[7]);
}

struct __align__(16) Eight { bf16 v[8]; };

DEVICE void load8(const bf16* from, float v[8]) {
  const Eight all = *(const Eight*)from;
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] = load(all.v[i]);
}

DEVICE void store8(bf16* to, const float v[8]) {
  Eight all;
#pragma unroll
  for (int i = 0; i < 8; i++) all.v[i] = store<bf16>(v[i]);
  *(Eight*)to = all;
}
