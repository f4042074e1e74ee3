// What codecs/device.cuh and ops/cluster.cuh have for clusters. What is sent to another block is there at once, earlier than any reader may count on: so
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
static struct { int arrived, phase; } clusters[1024];
static void sync_cluster() {
  auto& mine = clusters[blockIdx.x / CLUSTER];
  const int phase = mine.phase;
  if (++mine.arrived == CLUSTER * blockDim.x) mine.arrived = 0, ++mine.phase;
  poll([&] { return mine.phase != phase; });
}

// ---- ops/cluster.cuh ----

template <int COUNT> static void copy_to_cluster(void* to, const void* from, u32 bytes, u64* barrier) {
  if ((uintptr_t)to % 16 || (uintptr_t)from % 16 || bytes % 16) fail("bulk copy out of place");
  for (int rank = 0; rank < COUNT; ++rank) {
    std::memcpy(address_in(rank, to), from, bytes);
    count_in((u64*)address_in(rank, barrier), 0, -(int)bytes);
  }
}
static void arrive_in(int rank, u64* barrier) { count_in((u64*)address_in(rank, barrier), 1, 0); }
// Each thread once in a kernel.
static void arrive_at_cluster() { ++clusters[blockIdx.x / CLUSTER].arrived; }
static void await_cluster() {
  poll([] { return clusters[blockIdx.x / CLUSTER].arrived % (CLUSTER * blockDim.x) == 0; });
}
// The count is kept where no kernel's shared memory is: a block rests with that.
template <int COUNT> static void sync_warps() {
  u32* const arrived = block_counter();
  const u32 needed = (*arrived)++ / COUNT * COUNT + COUNT;
  poll([=] { return *arrived >= needed; });
}
