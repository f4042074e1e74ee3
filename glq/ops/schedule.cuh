// In which order x is rotated for a product that begins before all of it is: by steps, each a block of the rotation's columns, a slice, for every apart-th block of OF_BLOCK
// tokens. Some of these items are done ahead of the product (ahead.cu), the others while it goes on (beside.cuh); of each it is counted how many tokens are there.

static constexpr int OF_BLOCK = 256;

struct Schedule {
  int tokens, slices, apart;  // slices: blocks of the rotation in a token
  u32 low, high;              // four bits for each of seven slices: in which order they are wanted
  int blocks = (tokens + OF_BLOCK - 1) / OF_BLOCK, each = blocks / apart;  // each: items of a step

  __device__ __forceinline__ int slice(int step) const {
    const int i = step % slices;
    return (i < 7 ? low >> 4 * i : high >> 4 * (i - 7)) & 15;
  }
  __device__ __forceinline__ int block(int step, int i) const { return step / slices + apart * i; }
  __device__ __forceinline__ int tokens_of(int block) const { return min(OF_BLOCK, tokens - OF_BLOCK * block); }
  __device__ __forceinline__ int place(int slice, int block) const { return slice * blocks + block; }  // of a count
};
