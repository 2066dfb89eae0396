// Bulk copies: boxes of a tensor map, and plain ranges.
#include <cstring>

#include "sim/hopper.h"
#include "sim/memory.h"

namespace sarathi::sim {

namespace {

constexpr uint64_t kMagic = 0x544D415054534554ull;

int span_of(Swizzle mode) {
  switch (mode) {
    case Swizzle::k128: return 128;
    case Swizzle::k64: return 64;
    case Swizzle::k32: return 32;
    case Swizzle::kNone: break;
  }
  return 0;
}

const TensorMap& checked(const CUtensorMap* map, const std::vector<int>& at, const char* what) {
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0) fail("misaligned", std::string(what) +
      ": the tensor map must lie at a multiple of 64");
  const auto& m = *reinterpret_cast<const TensorMap*>(map);
  if (m.magic != kMagic) fail("bad_operand", std::string(what) + ": this is no tensor map");
  if (at.size() != m.rank) fail("bad_operand", std::string(what) + ": " + std::to_string(at.size()) +
      " coordinates for a map of rank " + std::to_string(m.rank));
  return m;
}

uint32_t box_bytes(const TensorMap& m) {
  uint32_t bytes = m.element_bytes;
  for (int d = 0; d < m.rank; ++d) bytes *= m.box[d];
  return bytes;
}

// Calls visit(global pointer or null, first element inside, elements inside, shared offset within the box) for each
// innermost row of a box. Null: the row is outside in another dimension.
template <typename Visit>
void each_row(const TensorMap& m, const std::vector<int>& at, Visit visit) {
  const uint32_t row_bytes = m.box[0] * m.element_bytes;
  uint32_t rows = 1;
  for (int d = 1; d < m.rank; ++d) rows *= m.box[d];
  const int64_t begin = std::max<int64_t>(0, -static_cast<int64_t>(at[0]));
  const int64_t end = std::min<int64_t>(m.box[0], static_cast<int64_t>(m.dims[0]) - at[0]);
  for (uint32_t row = 0; row < rows; ++row) {
    char* from = m.base + static_cast<int64_t>(at[0]) * m.element_bytes;
    bool inside = end > begin;
    uint32_t rest = row;
    for (int d = 1; d < m.rank; ++d) {
      const int64_t x = static_cast<int64_t>(at[d]) + rest % m.box[d];
      rest /= m.box[d];
      inside &= x >= 0 && x < m.dims[d];
      from += x * static_cast<int64_t>(m.strides[d - 1]);
    }
    visit(inside ? from : nullptr, begin, inside ? end - begin : 0, row * row_bytes);
  }
}

// Copies between a linear range and shared memory whose 16-byte chunks are swizzled by their address.
template <typename Move>
void each_chunk(uint32_t smem, uint32_t bytes, Swizzle mode, Move move) {
  for (uint32_t i = 0; i < bytes;) {
    const uint32_t count = std::min(bytes - i, 16 - (smem + i) % 16);
    move(swizzled(smem + i, mode) - kSharedBase, i, count);
    i += count;
  }
}

char* checked_shared(uint32_t smem, uint32_t bytes, const char* what) { return shared_pointer(smem, bytes, 128, what); }

void copy_in(const TensorMap& m, const std::vector<int>& at, uint32_t smem, char* shared_base) {
  const uint32_t row_bytes = m.box[0] * m.element_bytes;
  std::vector<char> row(row_bytes);
  each_row(m, at, [&](const char* from, int64_t first, int64_t count, uint32_t offset) {
    std::memset(row.data(), 0, row_bytes);
    if (from != nullptr) {
      std::memcpy(&row[first * m.element_bytes], from + first * m.element_bytes, count * m.element_bytes);
      machine.stats.global_to_shared_bytes += count * m.element_bytes;
    }
    each_chunk(smem + offset, row_bytes, m.swizzle, [&](uint32_t to, uint32_t i, uint32_t n) { std::memcpy(shared_base + to,
        &row[i], n); });
  });
}

void copy_out(const TensorMap& m, const std::vector<int>& at, uint32_t smem, const char* shared_base) {
  const uint32_t row_bytes = m.box[0] * m.element_bytes;
  std::vector<char> row(row_bytes);
  each_row(m, at, [&](char* to, int64_t first, int64_t count, uint32_t offset) {
    if (to == nullptr) return;
    each_chunk(smem + offset, row_bytes, m.swizzle, [&](uint32_t from, uint32_t i, uint32_t n) { std::memcpy(&row[i],
        shared_base + from, n); });
    std::memcpy(to + first * m.element_bytes, &row[first * m.element_bytes], count * m.element_bytes);
    machine.stats.shared_to_global_bytes += count * m.element_bytes;
  });
}

void check_rows(const TensorMap& m, const std::vector<int>& at, bool write, const char* what) {
  if (!machine.config.check_global) return;
  each_row(m, at, [&](const char* row, int64_t first, int64_t count, uint32_t) {
    if (row != nullptr) global_memory().check(row + first * m.element_bytes, count * m.element_bytes, write, what);
  });
}

// A copy of `bytes` to a shared address, that lands when the scheduler says and then counts on the barrier.
void start_load(uint32_t smem, uint32_t bytes, uint32_t bar, const char* what, Site site, std::function<void(Cta&)> land) {
  Thread& t = self();
  Cta* cta = t.cta;
  Mbarrier* b = &mbarrier_for_copy(bar);
  const uint32_t offset = smem - kSharedBase;
  if (cta->races) cta->races->begin_copy(t, offset, bytes);
  start_async({cta, what, site, [=] {
                 land(*cta);
                 if (cta->races) cta->races->finish_copy(b->agent, b->phase + 1, offset, bytes, false);
                 complete_tx(*cta, *b, bytes);
               }});
}

}  // namespace

CUtensorMap encode_tensor_map(void* base, int element_bytes, const std::vector<uint64_t>& dims,
    const std::vector<uint64_t>& strides,
                              const std::vector<uint32_t>& box, Swizzle swizzle) {
  const auto refuse = [](const std::string& why) { fail("launch", "tensor map: " + why); };
  const size_t rank = dims.size();
  if (rank < 1 || rank > 5 || strides.size() != rank - 1 || box.size() != rank) refuse("rank " + std::to_string(rank) +
      " with " + std::to_string(strides.size()) + " strides and a box of " + std::to_string(box.size()));
  if (reinterpret_cast<uintptr_t>(base) % 16 != 0) refuse("the base must be a multiple of 16");
  TensorMap m{};
  m.magic = kMagic;
  m.base = static_cast<char*>(base);
  m.rank = static_cast<uint16_t>(rank);
  m.element_bytes = static_cast<uint16_t>(element_bytes);
  m.swizzle = swizzle;
  for (size_t d = 0; d < rank; ++d) {
    if (dims[d] == 0 || dims[d] > 1ull << 32) refuse("dimension " + std::to_string(d) + " is " + std::to_string(dims[d]));
    if (box[d] == 0 || box[d] > 256) refuse("the box is " + std::to_string(box[d]) + " in dimension " + std::to_string(d) +
        "; 1 to 256 are possible");
    m.dims[d] = static_cast<uint32_t>(std::min<uint64_t>(dims[d], UINT32_MAX));
    m.box[d] = box[d];
    if (d == 0) continue;
    if (strides[d - 1] % 16 != 0 || strides[d - 1] >= 1ull << 40) refuse("stride " + std::to_string(strides[d - 1]) +
        " of dimension " + std::to_string(d) + " must be a multiple of 16 below 2^40");
    m.strides[d - 1] = strides[d - 1];
  }
  const uint32_t row_bytes = box[0] * element_bytes;
  if (row_bytes % 16 != 0) refuse("the box's rows have " + std::to_string(row_bytes) + " bytes, must be a multiple of 16");
  if (const int span = span_of(swizzle); span != 0 && row_bytes != static_cast<uint32_t>(span))
    refuse("the box's rows have " + std::to_string(row_bytes) + " bytes, the swizzle " + std::to_string(span) +
        " (shorter rows are legal but not simulated)");
  CUtensorMap map{};
  std::memcpy(&map, &m, sizeof m);
  return map;
}

void tma_load(uint32_t smem, const CUtensorMap* map, uint32_t bar, const std::vector<int>& at, Site site) {
  enter(site);
  const TensorMap m = checked(map, at, "TMA load");
  const uint32_t bytes = box_bytes(m);
  checked_shared(smem, bytes, "TMA load's destination");
  check_rows(m, at, false, "TMA load");
  start_load(smem, bytes, bar, "a TMA load", site, [=](Cta& cta) { copy_in(m, at, smem, cta.smem); });
}

void bulk_load(uint32_t smem, const void* from, uint32_t bytes, uint32_t bar, Site site) {
  enter(site);
  char* to = shared_pointer(smem, bytes, 16, "bulk copy's destination");
  if (bytes % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) fail("misaligned",
      "a bulk copy's source and size must be multiples of 16");
  if (machine.config.check_global) global_memory().check(from, bytes, false, "bulk copy's source");
  start_load(smem, bytes, bar, "a bulk copy", site, [=](Cta&) {
    std::memcpy(to, from, bytes);
    machine.stats.global_to_shared_bytes += bytes;
  });
}

void tma_store(const CUtensorMap* map, uint32_t smem, const std::vector<int>& at, Site site) {
  enter(site);
  const TensorMap m = checked(map, at, "TMA store");
  const uint32_t bytes = box_bytes(m);
  checked_shared(smem, bytes, "TMA store's source");
  check_rows(m, at, true, "TMA store");
  Thread& t = self();
  Cta* cta = t.cta;
  if (!cta->hopper) fail("launch", "a TMA store in a launch for sm_" + std::to_string(machine.config.arch));
  if (cta->races) cta->races->begin_async_read(t, smem - kSharedBase, bytes);
  auto store = std::make_shared<BulkStore>();
  store->offset = smem - kSharedBase;
  store->bytes = bytes;
  store->run = [=] { copy_out(m, at, smem, cta->smem); };
  if (machine.config.completion == Completion::kEager || (machine.config.completion == Completion::kRandom &&
      random_below(2) == 0)) {
    store->run();
    store->done = true;
  }
  cta->hopper->open_stores[t.index].push_back(std::move(store));
}

void bulk_commit(Site site) {
  enter(site);
  Thread& t = self();
  Hopper& h = *t.cta->hopper;
  h.store_groups[t.index].push_back(std::move(h.open_stores[t.index]));
  h.open_stores[t.index].clear();
}

void bulk_wait(int pending_groups, Site site) {
  enter(site);
  Thread& t = self();
  auto& groups = t.cta->hopper->store_groups[t.index];
  while (static_cast<int>(groups.size()) > pending_groups) {
    for (const auto& store : groups.front()) {
      if (!store->done) store->run();
      if (t.cta->races) t.cta->races->finish_async_read(t, store->offset, store->bytes);
    }
    groups.pop_front();
  }
  progress();
}

}  // namespace sarathi::sim
