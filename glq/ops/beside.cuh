// x of a product, rotated beside it: by blocks of threads that have no tile. What it begins with is there before (ahead.cu).

static constexpr int AT_ONCE = 16;  // tokens of a warp until it says that they are there
static constexpr int RING = 4;      // … that are on their way

// Which token a warp has: of what is left, its groups are every `warps`-th AT_ONCE tokens.
struct Turn {
  int group, slice, token;  // token: −1 at the end

  // The next group that has tokens.
  __device__ __forceinline__ void find(const Schedule& schedule, int ahead, int warps) {
    for (;;) {
      group += warps;
      const int item = ahead + group * AT_ONCE / OF_BLOCK, step = item / schedule.each;
      slice = schedule.slice(step);
      token = OF_BLOCK * schedule.block(step, item % schedule.each) + group * AT_ONCE % OF_BLOCK;
      if (step >= schedule.apart * schedule.slices) token = -1;
      if (token < schedule.tokens) return;
    }
  }
  __device__ __forceinline__ bool last(int tokens) const { return token % AT_ONCE == AT_ONCE - 1 || token + 1 == tokens; }
};
// A warp's, in shared memory: x of the tokens that come next.
struct Ring {
  struct Place {
    int slice, token;
    u64 there;
  };
  u8 x[RING][2 * WIDTH];
  Place places[RING];
};
// x [tokens, cols], to `rotated` [column tiles][held][64] in the order FRAGMENTS, of which counts say what is there. memory: a Ring for each warp of a block.
__device__ __forceinline__ void rotate_beside(const Schedule& schedule, int ahead, u8* memory, int blocks, const u16* x, const u8* signs, u16* rotated, int* counts, int held, int cols) {
  const int lane = threadIdx.x % 32, own_warp = uniform(threadIdx.x / 32), warps = blocks * blockDim.x / 32;
  Ring& ring = ((Ring*)memory)[own_warp];
  Turn next{(int)(blockIdx.x * blockDim.x / 32) + own_warp - warps};
  next.find(schedule, ahead, warps);
  if (lane < RING) init_barrier(&ring.places[lane].there, 1);
  publish_barriers();
  __syncwarp();
  auto request = [&](int i) {
    if (lane == 0) {
      ring.places[i].slice = next.slice, ring.places[i].token = next.token;
      if (next.token >= 0) copy_bulk(ring.x[i], x + (size_t)next.token * cols + next.slice * WIDTH, 2 * WIDTH, &ring.places[i].there);
    }
    if (next.token < 0) return;
    if (next.last(schedule.tokens)) next.find(schedule, ahead, warps);
    else ++next.token;
  };
  wait_for_previous();
  for (int i = 0; i < RING; ++i) request(i);
  TokenRotation own(lane);
  int slice = -1, i = 0;
  u32 parity = 0;
  #pragma unroll 1
  for (;;) {
    __syncwarp();
    const Ring::Place place = ring.places[i];
    if (place.token < 0) return;
    if (place.slice != slice) own.take_signs(signs + (slice = place.slice) * (WIDTH / 8));
    await(&ring.places[i].there, parity);
    own.load(ring.x[i]);
    __syncwarp();
    request(i);
    if (++i == RING) i = 0, parity ^= 1;
    own.rotate(rotated, slice * WIDTH, place.token, held, 0, [](int) {});
    if (!Turn{0, 0, place.token}.last(schedule.tokens)) continue;
    __syncwarp();
    if (lane == 0) add_released(counts + schedule.place(slice, place.token / OF_BLOCK), place.token % AT_ONCE + 1);
  }
}
