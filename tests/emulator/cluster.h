// What codecs/device.cuh has for clusters. What is sent to another block is there at once, earlier than any reader may count on: so
// it shows if that block still reads what was there. That a block has to wait shows, since blocks take turns.

static u8* address_in(int rank, const void* p) {
  const int place = shared_address(p), wanted = blockIdx.x / CLUSTER * CLUSTER + rank;
  if (wanted == blockIdx.x) return dynamic_shared + place;
  for (auto& block : resident)
    if (block && block->index.x == wanted) return block->shared.data() + place;
  fail("store into a block that has not begun or is over");
  return nullptr;
}
static void send(int rank, void* to, const u32* v, int bytes, u64* barrier) {
  if (shared_address(to) % bytes) fail("store out of place");
  std::memcpy(address_in(rank, to), v, bytes);
  count_in((u64*)address_in(rank, barrier), 0, -bytes);
}
static void send4(int rank, void* to, u32 v, u64* barrier) { send(rank, to, &v, 4, barrier); }
static void send16(int rank, void* to, const u32* v, u64* barrier) { send(rank, to, v, 16, barrier); }
static void store_in(int rank, void* to, u32 v) { std::memcpy(address_in(rank, to), &v, 4); }
static void sync_cluster() {
  static struct { int arrived, phase; } clusters[1024];
  auto& mine = clusters[blockIdx.x / CLUSTER];
  const int phase = mine.phase;
  if (++mine.arrived == CLUSTER * blockDim.x) mine.arrived = 0, ++mine.phase;
  poll([&] { return mine.phase != phase; });
}
