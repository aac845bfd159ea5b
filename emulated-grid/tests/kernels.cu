// The grid's own test kernels, right and wrong. Tests find a line by the comment at its end.

KERNEL(copy_all, (const float* from, float* to, int n)) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) to[i] = from[i];
}

// Each argument as it arrives.
KERNEL(arguments, (u64 * to, const float* pointer, int i, unsigned u, float f, u64 w)) {
  if (threadIdx.x > 0) return;
  to[0] = (u64)pointer;
  to[1] = (u64)i;
  to[2] = u;
  to[3] = __float_as_uint(f);
  to[4] = w;
}

KERNEL_BOUNDS(64, at_most_64, (int*)) {}

// Where each thread stands.
KERNEL(places, (int4 * to)) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  to[block * blockDim.x + threadIdx.x] = make_int4(blockIdx.x, blockIdx.y, blockIdx.z, warp() * 32 + lane());
}

// Threads write down when they come, and blocks too.
KERNEL(turns, (u32 * next, u32* to)) { to[(*next)++] = blockIdx.x * blockDim.x + threadIdx.x; }

// Reverses a block's numbers through shared memory.
KERNEL(reverse, (const float* from, float* to)) {
  DYNAMIC_SHARED(float, x);
  x[threadIdx.x] = from[blockIdx.x * blockDim.x + threadIdx.x];
  __syncthreads();  // reverse: barrier
  to[blockIdx.x * blockDim.x + threadIdx.x] = x[blockDim.x - 1 - threadIdx.x];
}
KERNEL(reverse_without, (const float* from, float* to)) {
  DYNAMIC_SHARED(float, x);
  x[threadIdx.x] = from[blockIdx.x * blockDim.x + threadIdx.x];
  to[blockIdx.x * blockDim.x + threadIdx.x] = x[blockDim.x - 1 - threadIdx.x];
}

// Turns a warp's numbers by one lane, over and over.
KERNEL(rotate, (const float* from, float* to, int times)) {
  __shared__ float x[32][32];
  float v = from[threadIdx.x];
  for (int i = 0; i < times; i++) {
    x[warp()][lane()] = v;
    __syncwarp();  // rotate: written
    v = x[warp()][(lane() + 1) % 32];
    __syncwarp();  // rotate: read
  }
  to[threadIdx.x] = v;
}

// Shared memory as a block finds it.
template <int N>
DEVICE u32* find(u32 last) {
  __shared__ u32 found[N];
  if (threadIdx.x == 0) found[N - 1] &= last;
  __syncthreads();
  return found;
}
KERNEL(unset, (u32 * to, u32 last)) {
  DYNAMIC_SHARED(u32, dynamic);
  u32* found = find<40>(last);
  if (threadIdx.x < 20) to[blockIdx.x * 60 + threadIdx.x] = dynamic[threadIdx.x];
  for (int i = threadIdx.x; i < 40; i += blockDim.x) to[blockIdx.x * 60 + 20 + i] = found[i];
  __syncthreads();
  dynamic[threadIdx.x % 20] = found[threadIdx.x % 39] = 0;
}

// Barriers that go wrong.
KERNEL(diverges, (float*)) {
  if (threadIdx.x < 32) {
    __syncthreads();  // diverges: here
  } else {
    __syncthreads();  // diverges: there
  }
}
KERNEL(diverges_in_a_warp, (float*)) {
  if (threadIdx.x % 2) __syncwarp();  // diverges_in_a_warp
  __syncthreads();
}
KERNEL(returns_early, (float*)) {
  if (threadIdx.x >= 32) return;
  __syncthreads();  // returns_early
}
KERNEL(deadlocks, (float* to)) {
  if (threadIdx.x < 40) __syncthreads();                           // deadlocks: barrier
  to[threadIdx.x] = __shfl_xor_sync(WARP, (float)threadIdx.x, 1);  // deadlocks: shuffle
}
KERNEL(masks, (float* to, u32 mask)) {
  to[threadIdx.x] = __shfl_sync(mask, 1.0f, 0);  // masks
}
KERNEL(sums_apart, (float* to)) {
  if (threadIdx.x < 16) to[threadIdx.x] = warp_sum(1);  // sums_apart
}

// Memory.
KERNEL(reads_at, (const float* from, float* to, int at)) {
  if (threadIdx.x == 3) to[0] = from[at];
}
KERNEL(writes_at, (float* to, int at)) {
  if (threadIdx.x == 5) to[at] = 1;
}
KERNEL(overflows_its_stack, (float* to, int deep)) {
  struct Again {
    static __attribute__((noinline)) float call(float* to, int deep) {
      volatile float room[4096];
      room[deep % 4096] = 1;
      return deep == 0 ? 0 : call(to, deep - 1) + room[(deep + 1) % 4096] + to[0];
    }
  };
  to[threadIdx.x] = Again::call(to, deep);
}
KERNEL(writes_past_dynamic, (int at)) {
  DYNAMIC_SHARED(float, x);
  if (threadIdx.x == 1) x[at] = 1;
}
KERNEL(misaligned, (const float* from, float4* to)) {
  to[threadIdx.x] = *(const float4*)(from + 1);  // misaligned
}
KERNEL(indexes, (float* to, int at)) {
  __shared__ float x[4][8];
  x[threadIdx.x % 4][at] = 1;  // indexes
  to[threadIdx.x] = x[0][0];
}
KERNEL(shifts, (u32 * to, u32 by)) {
  to[threadIdx.x] = threadIdx.x << by;  // shifts
}
KERNEL(divides, (int* to, int by)) { to[threadIdx.x] = 7 / by; }
KERNEL(unwritten, (float* to, int n)) {
  float v[8];
  for (int i = 0; i < n; i++) v[i] = 1;
  float sum = 0;
  for (int i = 0; i < 8; i++) sum += v[i];
  to[threadIdx.x] = sum;
}

// Primitives: one warp, a number a thread.
KERNEL(rounds, (const float* from, bf16* to_bf16, u32* to_tf32, float* back)) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  to_bf16[i] = store<bf16>(from[i]);
  to_tf32[i] = tf32(from[i]);
  back[i] = load(store<float>(load(store_act(from[i]))));
}
KERNEL(reduces, (const float* from, float* sum, float* most, u32* other, u64* wide)) {
  const int i = threadIdx.x;
  sum[i] = warp_sum(from[i]);
  most[i] = warp_max(from[i]);
  other[i] = __shfl_sync(WARP, (u32)i, (i + 5) % 32);
  wide[i] = __shfl_xor_sync(WARP, (u64)i << 40, 3);
}
KERNEL(draws, (const u32* key, const uint4* counter, uint4* to)) {
  to[threadIdx.x] = philox(key[2 * threadIdx.x], key[2 * threadIdx.x + 1], counter[threadIdx.x]);
}
KERNEL(knows, (float* to, float x)) {
  const float all[] = {expf(x),      logf(x),        tanhf(x),       erfcf(x),          sqrtf(x),
                       fmaf(x, x, x), fabsf(-x),     fmaxf(x, 3),    fminf(x, 3),       (float)min(-1, 2),
                       (float)max(-1, 2), (float)min(1u, 2u), (float)max(1u, 2u), (float)min((u64)1, (u64)2),
                       (float)max((u64)1, (u64)2), __uint_as_float(__float_as_uint(x))};
  if (threadIdx.x < sizeof(all) / sizeof(float)) to[threadIdx.x] = all[threadIdx.x];
}

// Matrices. What each lane holds, word by word, of 8 by 8 matrices one below the other.
KERNEL(fragments, (const uint4* from, u32* plain, u32* transposed)) {
  __shared__ uint4 m[32];
  m[lane()] = from[lane()];
  __syncwarp();
  u32 r[4];
  ldmatrix_x4(r, &m[lane()]);
  for (int i = 0; i < 4; i++) plain[4 * lane() + i] = r[i];
  ldmatrix_x4_transposed(r, &m[lane()]);
  for (int i = 0; i < 4; i++) transposed[4 * lane() + i] = r[i];
}
KERNEL(loads_rows, (const uint4* global, u32* to, int from, int by)) {
  DYNAMIC_SHARED(u8, m);
  u32 r[4];
  ldmatrix_x4(r, from == 0 ? (const void*)&global[lane()] : &m[lane() * by]);  // loads_rows
  to[lane()] = r[0];
}

// d, element (row, column), from what lane holds.
DEVICE void put(float* d, const float part[4]) {
  const int g = lane() / 4, t = lane() % 4;
  for (int i = 0; i < 4; i++) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = part[i];
}
// d = 2 (1 + a b): a (16, 16) row-major; b (16, 8) row-major, or (8, 16) where it lies transposed.
KERNEL(multiplies_bf16, (const bf16* a, const bf16* b, float* d, int transposed)) {
  __shared__ __align__(16) bf16 left[16][24], right[16 * 24];
  for (int i = lane(); i < 256; i += 32) left[i / 16][i % 16] = a[i];
  const int width = transposed ? 16 : 8, room = transposed ? 24 : 16;
  for (int i = lane(); i < 128; i += 32) right[i / width * room + i % width] = b[i];
  __syncwarp();
  u32 of_a[4], of_b[4];
  ldmatrix_x4(of_a, &left[lane() % 16][lane() / 16 * 8]);
  // Matrices 2 and 3 are those of b again.
  if (transposed) {
    ldmatrix_x4(of_b, &right[lane() % 8 * room + lane() / 8 % 2 * 8]);
  } else {
    ldmatrix_x4_transposed(of_b, &right[lane() % 16 * room]);
  }
  float part[4] = {1, 1, 1, 1};
  mma_bf16(part, of_a, of_b);
  for (float& v : part) v += 1;
  mma_bf16(part, of_a, of_b);
  put(d, part);
}
// d = a b: a (16, 8) row-major, through ldmatrix, a word as two halves; b (8, 8) row-major.
KERNEL(multiplies_tf32, (const float* a, const float* b, float* d, int rounded)) {
  __shared__ __align__(16) u32 left[16][12];
  for (int i = lane(); i < 128; i += 32) left[i / 8][i % 8] = rounded ? tf32(a[i]) : __float_as_uint(a[i]);
  __syncwarp();
  u32 of_a[4];
  ldmatrix_x4(of_a, &left[lane() % 16][lane() / 16 * 4]);
  const float low = b[lane() % 4 * 8 + lane() / 4], high = b[(lane() % 4 + 4) * 8 + lane() / 4];
  const u32 of_b[2] = {rounded ? tf32(low) : __float_as_uint(low), rounded ? tf32(high) : __float_as_uint(high)};
  float part[4] = {0, 0, 0, 0};
  mma_tf32(part, of_a, of_b);
  put(d, part);
}

// Speed: so many barriers, of the block or of the warp.
KERNEL(waits, (float* to, int of_block, int of_warp)) {
  for (int i = 0; i < of_block; i++) __syncthreads();
  for (int i = 0; i < of_warp; i++) __syncwarp();
  to[threadIdx.x] = 1;
}
