// What of x is rotated ahead of a product that rotates the rest beside (beside.cuh).
// Macros: those of rotation.cuh.

// Of its schedule the first `ahead` items, those of a step by a row of the grid; and behind `out` the counts of all, as they are then.
extern "C" __global__ void __launch_bounds__(32 * WARPS, TOGETHER)
rotate_ahead(const u16* x, const u8* signs, u16* out, int held, int cols, int tokens, int apart, int low, int high, int ahead) {
  let_next_start();
  const Schedule schedule{tokens, cols / WIDTH, apart, (u32)low, (u32)high};
  const int own = blockIdx.y, end = min(schedule.each, ahead - own * schedule.each) * OF_BLOCK;
  int i = first_of_warp() - gridDim.x * WARPS;
  rotate_rows(x, signs, out, schedule.slice(own) * WIDTH, held, cols, [&] {
    for (;;) {
      i += gridDim.x * WARPS;
      if (i >= end) return Row{-1, -1};
      const int token = schedule.block(own, i / OF_BLOCK) * OF_BLOCK + i % OF_BLOCK;
      if (token < tokens) return Row{token, token};
    }
  });
  if (blockIdx.x > 0 || own > 0) return;
  wait_for_previous();
  int* const counts = (int*)(out + (size_t)cols * held);
  for (int i = threadIdx.x; i < schedule.slices * schedule.blocks; i += 32 * WARPS) {
    const int step = i / schedule.each, block = schedule.block(step, i % schedule.each);
    counts[schedule.place(schedule.slice(step), block)] = i < ahead ? schedule.tokens_of(block) : 0;
  }
}
