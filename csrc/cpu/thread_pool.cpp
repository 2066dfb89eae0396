#include "thread_pool.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>

namespace sarathi {
namespace {

// Between two ops of a layer some microseconds pass, and waking a parked thread takes tens: who waits looks for this long first.
// Looking much longer would take a core from torch's threads, and from others on a shared machine.
constexpr auto kSpin = std::chrono::microseconds(60);

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Whether `ready` came true within kSpin.
template <class Ready>
bool spin_until(const Ready& ready) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i, relax())
      if (ready()) return true;
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

class Pool {
 public:
  void run(int threads, void (*task)(void*), void* context) {
    std::unique_lock<std::mutex> caller(caller_, std::try_to_lock);
    if (threads < 2 || !caller) return task(context);
    for (; num_workers_ < threads - 1; ++num_workers_) std::thread([this] { work(); }).detach();
    task_ = task;
    context_ = context;
    seats_.store(threads - 1);
    if (sleepers_ > 0) {
      { std::lock_guard<std::mutex> lock(mutex_); }
      if (threads == 2) wake_.notify_one();
      else wake_.notify_all();
    }
    task(context);
    // No seat left from here on: who comes now is late, and goes back to waiting.
    seats_.fetch_and(kTaken);
    const auto done = [this] { return seats_ == 0; };
    if (spin_until(done)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    caller_sleeps_ = true;
    done_.wait(lock, done);
    caller_sleeps_ = false;
  }

 private:
  static constexpr uint64_t kOneTaken = uint64_t{1} << 32, kTaken = ~uint64_t{0} << 32;

  bool take_seat() {
    uint64_t seats = seats_;
    while (seats & ~kTaken)
      if (seats_.compare_exchange_weak(seats, seats - 1 + kOneTaken)) return true;
    return false;
  }

  void work() {
    for (;;) {
      if (!spin_until([this] { return take_seat(); })) {
        std::unique_lock<std::mutex> lock(mutex_);
        ++sleepers_;
        wake_.wait(lock, [this] { return take_seat(); });
        --sleepers_;
      }
      task_(context_);
      if (seats_.fetch_sub(kOneTaken) == kOneTaken && caller_sleeps_) {
        { std::lock_guard<std::mutex> lock(mutex_); }
        done_.notify_one();
      }
    }
  }

  std::mutex caller_;  // held by the thread whose task has the workers
  void (*task_)(void*) = nullptr;
  void* context_ = nullptr;
  int num_workers_ = 0;
  alignas(64) std::atomic<uint64_t> seats_{0};  // low half: free seats at the task; high half: workers that took one and are at it
  // Who parks first says so, then looks at seats_ once more; who changes seats_ looks at these afterwards. All in one order
  // (sequentially consistent), so one of the two sees the other.
  std::atomic<int> sleepers_{0};
  std::atomic<bool> caller_sleeps_{false};
  std::mutex mutex_;
  std::condition_variable wake_, done_;
};

// Never destroyed: detached workers wait in it until the process ends. A forked child has no workers and starts afresh.
Pool* pool = nullptr;
std::once_flag pool_once;

void make_pool() { pool = new Pool; }

struct Arena {
  char* memory = nullptr;
  size_t bytes = 0;
  ~Arena() { std::free(memory); }
};

}  // namespace

void run_on_threads(int threads, void (*task)(void*), void* context) {
  std::call_once(pool_once, [] {
    make_pool();
    pthread_atfork(nullptr, nullptr, make_pool);
  });
  pool->run(threads, task, context);
}

char* thread_scratch(size_t bytes) {
  thread_local Arena arena;
  if (arena.bytes < bytes) {
    std::free(arena.memory);
    arena.bytes = (bytes + 4095) / 4096 * 4096;
    arena.memory = static_cast<char*>(std::aligned_alloc(4096, arena.bytes));
    if (!arena.memory) {
      arena.bytes = 0;
      throw std::bad_alloc();
    }
  }
  return arena.memory;
}

}  // namespace sarathi
