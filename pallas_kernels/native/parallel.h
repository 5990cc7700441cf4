// A parallel loop on XLA's own threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// Runs item(0) ... item(n - 1) on the pool and the calling thread. A helper that the pool starts late finds nothing
// left and touches only the shared counters, so the caller waits for items, never for helpers.
template <typename F>
void parallel_for(ffi::ThreadPool& pool, int n, F item) {
  struct State {
    F item;
    const int n;
    std::atomic<int> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable all_done;

    void drain() {
      for (int i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) {
        item(i);
        if (done.fetch_add(1, std::memory_order_acq_rel) + 1 == n) {
          std::lock_guard<std::mutex> lock(mutex);
          all_done.notify_one();
        }
      }
    }
    State(F item, int n) : item(std::move(item)), n(n) {}
  };
  const int helpers = int(std::min<int64_t>(pool.num_threads(), n)) - 1;
  if (helpers <= 0) {
    for (int i = 0; i < n; ++i) item(i);
    return;
  }
  auto state = std::make_shared<State>(std::move(item), n);
  for (int i = 0; i < helpers; ++i) pool.Schedule([state] { state->drain(); });
  state->drain();
  const auto finished = [&] { return state->done.load(std::memory_order_acquire) == n; };
  for (int spin = 0; spin < 4000 && !finished(); ++spin) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all_done.wait(lock, finished);
}

}  // namespace
