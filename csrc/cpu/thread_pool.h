// The process's one pool of worker threads. A worker without work looks for more for some microseconds, then parks: waking a
// parked thread between the ops of a layer cost a tenth of a step, and spinning for long would take the cores from torch's own
// threads and collapse where the machine is shared.
#pragma once
#include <cstddef>

namespace sarathi {

// Calls task(context) on the calling thread and on up to threads - 1 workers, concurrently; returns when every call has
// returned. A task draws its work from a queue in `context` until that is empty, so a worker that wakes late finds nothing to
// do, and is not waited for. While another thread's tasks have the workers, the caller works alone.
void run_on_threads(int threads, void (*task)(void*), void* context);

// The calling thread's scratch: at least `bytes`, aligned to 64, kept and grown; its contents do not last between calls.
char* thread_scratch(size_t bytes);

}  // namespace sarathi
