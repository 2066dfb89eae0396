#include "sim/memory.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>

namespace sarathi::sim {
namespace {
constexpr size_t kPage = 4096;
constexpr unsigned char kCanary = 0xA5;
}  // namespace

GuardedPages::GuardedPages(size_t bytes, size_t alignment) : bytes_(bytes) {
  const size_t padded = (bytes + alignment - 1) / alignment * alignment;
  mapping_bytes_ = (padded + kPage - 1) / kPage * kPage + 2 * kPage;
  void* mapping = mmap(nullptr, mapping_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  mapping_ = static_cast<char*>(mapping);
  mprotect(mapping_, kPage, PROT_NONE);
  mprotect(mapping_ + mapping_bytes_ - kPage, kPage, PROT_NONE);
  data_ = mapping_ + mapping_bytes_ - kPage - padded;
}

GuardedPages::~GuardedPages() { munmap(mapping_, mapping_bytes_); }

bool GuardedPages::is_guard(const void* address) const {
  const auto* p = static_cast<const char*>(address);
  return (p >= mapping_ && p < first()) || (p >= last() && p < mapping_ + mapping_bytes_);
}

void GuardedPages::fill_slack(unsigned char value) {
  std::memset(first(), value, data_ - first());
  std::memset(data_ + bytes_, value, last() - data_ - bytes_);
}

ptrdiff_t GuardedPages::find_changed_slack(unsigned char value, bool& found) const {
  found = true;
  for (const char* p = first(); p < data_; ++p)
    if (static_cast<unsigned char>(*p) != value) return p - data_;
  for (const char* p = data_ + bytes_; p < last(); ++p)
    if (static_cast<unsigned char>(*p) != value) return p - data_;
  found = false;
  return 0;
}

// ---- shared memory ----

SharedArena& shared_arena() {
  static SharedArena arena;
  return arena;
}

char* SharedArena::take(int slot, size_t bytes) {
  if (static_cast<size_t>(slot) >= pages_.size()) pages_.resize(slot + 1);
  auto& pages = pages_[slot];
  if (!pages || pages->size() != bytes) pages = std::make_unique<GuardedPages>(bytes, 1024);
  pages->fill_slack(kCanary);
  std::memset(pages->data(), 0xff, bytes);
  return pages->data();
}

void SharedArena::check_canaries(const Cta& cta) {
  bool found;
  const ptrdiff_t offset = pages_[cta.slot]->find_changed_slack(kCanary, found);
  if (found)
    fail("out_of_bounds", "a plain store changed byte " + std::to_string(offset) + " of the " +
        std::to_string(pages_[cta.slot]->size()) +
                              " bytes of shared memory of block " + std::to_string(cta.linear_index));
}

const GuardedPages* SharedArena::find_guard(const void* address, int& slot) const {
  for (slot = 0; slot < static_cast<int>(pages_.size()); ++slot)
    if (pages_[slot] && pages_[slot]->is_guard(address)) return pages_[slot].get();
  return nullptr;
}

// ---- global memory ----

GlobalMemory& global_memory() {
  static GlobalMemory memory;
  return memory;
}

void GlobalMemory::add(void* begin, size_t bytes, std::string name, bool writable, const GuardedPages* guard) {
  Buffer b{static_cast<char*>(begin), bytes, std::move(name), writable, guard};
  const auto place = std::upper_bound(buffers_.begin(), buffers_.end(), b, [](const Buffer& x,
      const Buffer& y) { return x.begin < y.begin; });
  buffers_.insert(place, std::move(b));
}

void GlobalMemory::remove(void* begin) {
  buffers_.erase(std::remove_if(buffers_.begin(), buffers_.end(), [&](const Buffer& b) { return b.begin == begin; }),
      buffers_.end());
}

const GlobalMemory::Buffer* GlobalMemory::find(const void* address) const {
  auto after = std::upper_bound(buffers_.begin(), buffers_.end(), address, [](const void* a,
      const Buffer& b) { return a < b.begin; });
  return after == buffers_.begin() ? nullptr : &*--after;
}

const GlobalMemory::Buffer* GlobalMemory::find_guard(const void* address) const {
  for (const Buffer& b : buffers_)
    if (b.guard != nullptr && b.guard->is_guard(address)) return &b;
  return nullptr;
}

void GlobalMemory::check(const void* address, size_t bytes, bool write, const char* what) const {
  const Buffer* b = find(address);
  const auto* p = static_cast<const char*>(address);
  if (b == nullptr || p + bytes > b->begin + b->bytes) {
    std::string where = b == nullptr ? "before every registered buffer"
                                     : "bytes [" + std::to_string(p - b->begin) + ", " + std::to_string(p - b->begin +
                                         static_cast<ptrdiff_t>(bytes)) +
                                           ") of " + b->name + ", which has " + std::to_string(b->bytes);
    fail("out_of_bounds", std::string(what) + ": " + where);
  }
  if (write && !b->writable) fail("out_of_bounds", std::string(what) + " writes " + b->name +
      ", which is registered as read-only");
}

// ---- weak stores ----

void WeakStores::store(void* address, const void* value, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  for (size_t i = 0; i < bytes;) {
    const uintptr_t at = begin + i, base = at & ~uintptr_t{3};
    const size_t within = at - base, count = std::min(bytes - i, 4 - within);
    Word& word = words_[base];
    std::memcpy(reinterpret_cast<char*>(&word.value) + within, static_cast<const char*>(value) + i, count);
    std::memset(reinterpret_cast<char*>(&word.mask) + within, 0xff, count);
    i += count;
  }
}

void WeakStores::load(const void* address, void* value, size_t bytes) const {
  if (words_.empty()) return;
  const auto begin = reinterpret_cast<uintptr_t>(address);
  for (size_t i = 0; i < bytes; ++i) {
    const uintptr_t at = begin + i;
    const auto found = words_.find(at & ~uintptr_t{3});
    if (found == words_.end()) continue;
    const size_t within = at & 3;
    if (reinterpret_cast<const unsigned char*>(&found->second.mask)[within] != 0)
      static_cast<char*>(value)[i] = reinterpret_cast<const char*>(&found->second.value)[within];
  }
}

void WeakStores::forget(const void* address, size_t bytes) {
  if (words_.empty()) return;
  const auto begin = reinterpret_cast<uintptr_t>(address);
  for (size_t i = 0; i < bytes; ++i) {
    const auto found = words_.find((begin + i) & ~uintptr_t{3});
    if (found != words_.end()) reinterpret_cast<unsigned char*>(&found->second.mask)[(begin + i) & 3] = 0;
  }
}

void WeakStores::move_to(WeakStores& other) {
  for (const auto& [base, word] : words_)
    for (size_t within = 0; within < 4; ++within)
      if (reinterpret_cast<const unsigned char*>(&word.mask)[within] != 0)
        other.store(reinterpret_cast<char*>(base) + within, reinterpret_cast<const char*>(&word.value) + within, 1);
  words_.clear();
}

void WeakStores::drain() {
  for (const auto& [base, word] : words_)
    for (size_t within = 0; within < 4; ++within)
      if (reinterpret_cast<const unsigned char*>(&word.mask)[within] != 0)
        reinterpret_cast<char*>(base)[within] = reinterpret_cast<const char*>(&word.value)[within];
  words_.clear();
}

void store_global(void* address, const void* value, size_t bytes) {
  Thread& t = self();
  const bool now = machine.config.completion == Completion::kEager || (machine.config.completion == Completion::kRandom &&
      random_below(2) == 0);
  if (!now) {
    t.stores.store(address, value, bytes);
    return;
  }
  t.stores.forget(address, bytes);
  t.cta->stores.forget(address, bytes);
  std::memcpy(address, value, bytes);
}

void load_global(const void* address, void* value, size_t bytes) {
  std::memcpy(value, address, bytes);
  self().cta->stores.load(address, value, bytes);
  self().stores.load(address, value, bytes);
}

void publish_global(void* address, size_t bytes) {
  Thread& t = self();
  for (WeakStores* held : {&t.cta->stores, &t.stores}) {
    if (held->empty()) continue;
    held->load(address, address, bytes);
    held->forget(address, bytes);
  }
}

void fence_global() {
  self().cta->stores.drain();
  self().stores.drain();
}

// ---- wild accesses ----

namespace {

pthread_t simulating;  // the thread whose stack the fibers borrow; signals may reach others

void on_fault(int signal, siginfo_t* info, void*) {
  if (machine.running == nullptr || !pthread_equal(pthread_self(), simulating)) {  // not ours: as if there had been no handler
    struct sigaction action {};
    action.sa_handler = SIG_DFL;
    sigaction(signal, &action, nullptr);
    return;
  }
  const void* address = info->si_addr;
  int slot;
  if (const GuardedPages* pages = shared_arena().find_guard(address, slot)) {
    const bool own = slot == self().cta->slot;
    fail("out_of_bounds", "a plain access at byte " + std::to_string(static_cast<const char*>(address) - pages->data()) +
        " of the " +
                              std::to_string(pages->size()) + " bytes of shared memory of " + (own ? "its CTA" : "another CTA"));
  }
  if (machine.stacks.is_guard(address)) fail("out_of_bounds", "the thread's stack of " + std::to_string(StackPool::kBytes) +
      " bytes overflows");
  if (const auto* b = global_memory().find_guard(address))
    fail("out_of_bounds", "a plain access at byte " + std::to_string(static_cast<const char*>(address) - b->begin) + " of " +
        b->name +
                              ", which has " + std::to_string(b->bytes));
  char text[32];
  std::snprintf(text, sizeof text, "%p", address);
  fail("out_of_bounds", std::string("a plain access at ") + text + ", which is no memory at all");
}

// Every second of CPU time: whether the machine still moves.
uint64_t last_moves;
int still_seconds;

void on_timer(int signal) {
  if (!pthread_equal(pthread_self(), simulating)) {
    pthread_kill(simulating, signal);
    return;
  }
  const Stats& s = machine.stats;
  const uint64_t moves = s.switches + s.warp_collectives + static_cast<uint64_t>(machine.budget);
  still_seconds = moves == last_moves ? still_seconds + 1 : 0;
  last_moves = moves;
  if (machine.running != nullptr && still_seconds >= machine.config.hang_seconds)
    fail("hang", "the thread has called no wrapper for " + std::to_string(still_seconds) + " seconds");
}

}  // namespace

FaultHandler::FaultHandler() : stack_(new char[64 << 10]) {
  simulating = pthread_self();
  stack_t stack{};
  stack.ss_sp = stack_.get();
  stack.ss_size = 64 << 10;
  sigaltstack(&stack, &old_stack_);
  struct sigaction action {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // the handler leaves by a fiber switch, never by returning
  sigaction(SIGSEGV, &action, &old_segv_);
  sigaction(SIGBUS, &action, &old_bus_);
  action.sa_flags = SA_ONSTACK | SA_NODEFER | SA_RESTART;
  action.sa_handler = on_timer;
  sigaction(SIGVTALRM, &action, &old_timer_);
  still_seconds = 0;
  const itimerval every_second{{1, 0}, {1, 0}};
  setitimer(ITIMER_VIRTUAL, &every_second, &old_interval_);
}

FaultHandler::~FaultHandler() {
  setitimer(ITIMER_VIRTUAL, &old_interval_, nullptr);
  sigaction(SIGVTALRM, &old_timer_, nullptr);
  sigaction(SIGSEGV, &old_segv_, nullptr);
  sigaction(SIGBUS, &old_bus_, nullptr);
  sigaltstack(&old_stack_, nullptr);
}

}  // namespace sarathi::sim
