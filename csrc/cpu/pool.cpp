#include "pool.h"

#include <pthread.h>
#include <stdlib.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace personafast {
namespace {

constexpr int64_t kDefaultSpin = 100;

// The state of the pool in one word, so that a worker joins a call and the caller closes it in one step each: the
// number of the call, whether it is closed, and how many workers are in it.
constexpr uint64_t kWorkers = (1u << 16) - 1;
constexpr uint64_t kClosed = 1u << 16;
constexpr uint64_t kCall = 1u << 17;

uint64_t call_of(uint64_t state) { return state / kCall; }

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

int64_t spin_microseconds() {
  const char* set = getenv("PERSONAFAST_SPIN_US");
  return set == nullptr || *set == '\0' ? kDefaultSpin : atoll(set);
}

class Pool {
 public:
  void run(int64_t parts, int threads, void (*run)(void*, int64_t), void* context) {
    std::unique_lock<std::mutex> mine(calls_, std::try_to_lock);
    const int64_t wanted = parts < threads ? parts : threads;
    if (!mine.owns_lock() || wanted < 2) {
      for (int64_t part = 0; part < parts; ++part) run(context, part);
      return;
    }
    while (workers_ < wanted - 1 && workers_ < static_cast<int64_t>(kWorkers)) {
      const int64_t index = workers_;
      const uint64_t seen = call_of(state_.load());
      try {
        std::thread([this, index, seen] { work(index, seen); }).detach();
      } catch (const std::system_error&) {
        break;  // no more threads to be had: fewer do the same work
      }
      ++workers_;
    }
    run_ = run;
    context_ = context;
    parts_ = parts;
    helpers_ = wanted - 1;
    next_.store(0, std::memory_order_relaxed);
    state_.store((call_of(state_.load()) + 1) * kCall);
    if (sleepers_.load() > 0) {
      {
        const std::lock_guard<std::mutex> lock(sleep_);
      }
      wake_.notify_all();
    }
    take_parts();
    state_.fetch_or(kClosed);
    for (int spins = 0; (state_.load() & kWorkers) != 0; ++spins) {
      // A worker whose core is taken by somebody else needs ours.
      if (spins < 1000) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  void take_parts() {
    for (int64_t part; (part = next_.fetch_add(1, std::memory_order_relaxed)) < parts_;) run_(context_, part);
  }

  void work(int64_t index, uint64_t seen) {
    for (;;) {
      uint64_t state = await(seen);
      bool joined = false;
      while (!(state & kClosed) && !joined) joined = state_.compare_exchange_weak(state, state + 1);
      seen = call_of(state);
      if (!joined) continue;
      if (index < helpers_) take_parts();
      state_.fetch_sub(1);
    }
  }

  // The state once it is of another call than `seen`.
  uint64_t await(uint64_t seen) {
    using Clock = std::chrono::steady_clock;
    const auto until = Clock::now() + std::chrono::microseconds(spin_);
    uint64_t state;
    do {
      for (int spins = 0; spins < 64; ++spins) {
        state = state_.load();
        if (call_of(state) != seen) return state;
        pause();
      }
    } while (Clock::now() < until);
    std::unique_lock<std::mutex> lock(sleep_);
    sleepers_.fetch_add(1);
    wake_.wait(lock, [&] { return call_of(state = state_.load()) != seen; });
    sleepers_.fetch_sub(1);
    return state;
  }

  const int64_t spin_ = spin_microseconds();
  std::mutex calls_;
  std::mutex sleep_;
  std::condition_variable wake_;
  std::atomic<int> sleepers_{0};
  int64_t workers_ = 0;
  alignas(64) std::atomic<uint64_t> state_{kClosed};
  alignas(64) std::atomic<int64_t> next_{0};
  // Of the call in hand; written before state_ says so.
  alignas(64) void (*run_)(void*, int64_t) = nullptr;
  void* context_ = nullptr;
  int64_t parts_ = 0;
  int64_t helpers_ = 0;
};

// Never destroyed: its threads may outlive every destructor. A forked child has none of them, and starts anew.
std::atomic<Pool*> pool{nullptr};

Pool& the_pool() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });
  (void)registered;
  Pool* found = pool.load();
  if (found == nullptr) {
    Pool* fresh = new Pool;
    if (pool.compare_exchange_strong(found, fresh)) return *fresh;
    delete fresh;
  }
  return *found;
}

}  // namespace

void run_parts(int64_t parts, int threads, void (*run)(void* context, int64_t part), void* context) {
  the_pool().run(parts, threads, run, context);
}

}  // namespace personafast
