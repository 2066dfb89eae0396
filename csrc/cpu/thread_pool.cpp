#include "thread_pool.h"

#include <pthread.h>

#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>

namespace sarathi {
namespace {

class Pool {
 public:
  void run(int threads, void (*task)(void*), void* context) {
    std::unique_lock<std::mutex> caller(caller_, std::try_to_lock);
    if (threads < 2 || !caller) return task(context);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (; num_workers_ < threads - 1; ++num_workers_) std::thread([this] { work(); }).detach();
      task_ = task;
      context_ = context;
      invited_ = threads - 1;
    }
    if (threads == 2) wake_.notify_one();
    else wake_.notify_all();
    task(context);
    std::unique_lock<std::mutex> lock(mutex_);
    invited_ = 0;
    done_.wait(lock, [this] { return active_ == 0; });
  }

 private:
  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return invited_ > 0; });
      --invited_;
      ++active_;
      const auto task = task_;
      void* const context = context_;
      lock.unlock();
      task(context);
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  std::mutex caller_;  // held by the thread whose tasks have the workers
  std::mutex mutex_;   // guards what follows
  std::condition_variable wake_, done_;
  void (*task_)(void*) = nullptr;
  void* context_ = nullptr;
  int num_workers_ = 0, invited_ = 0, active_ = 0;
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
