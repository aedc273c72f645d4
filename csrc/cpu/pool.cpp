#include "pool.h"

#include <pthread.h>
#include <stdlib.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

namespace personafast {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kDefaultSpin = 200;
constexpr int64_t kMostSpin = 1000000000;

// The state of the pool in one word, so that a worker joins a call and the caller closes it in one step each: how many
// workers are in the call, whether it is closed, how many it has use for, and its number. Numbers come again after 2^31
// calls; who takes one for the other joins a call that is open, or misses one, and either is right at any time.
constexpr uint64_t kMostWorkers = (1u << 16) - 1;
constexpr uint64_t kClosed = 1u << 16;
constexpr uint64_t kHelper = uint64_t{1} << 17;
constexpr uint64_t kCall = uint64_t{1} << 33;

uint64_t workers_in(uint64_t state) { return state & kMostWorkers; }
uint64_t helpers_of(uint64_t state) { return state / kHelper & kMostWorkers; }
uint64_t call_of(uint64_t state) { return state / kCall; }

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

std::chrono::microseconds spin_time() {
  const char* set = getenv("PERSONAFAST_SPIN_US");
  if (set == nullptr || *set == '\0') return std::chrono::microseconds(kDefaultSpin);
  char* end = nullptr;
  const long long spin = strtoll(set, &end, 10);
  if (*end != '\0' || spin < 0 || spin > kMostSpin) {
    throw std::runtime_error(std::string("PERSONAFAST_SPIN_US=") + set + ": expected microseconds, 0 to " +
                             std::to_string(kMostSpin));
  }
  return std::chrono::microseconds(spin);
}

// Where one worker sleeps.
struct alignas(64) Bed {
  std::mutex mutex;
  std::condition_variable wake;
  std::atomic<bool> taken{false};
};

class Pool {
 public:
  // False if the pool is at work.
  bool run(int64_t parts, uint64_t helpers, void (*run)(void*, int64_t), void* context) {
    if (busy_.exchange(true, std::memory_order_acquire)) return false;
    hire(helpers);
    helpers = std::min(helpers, hired_);
    run_ = run;
    context_ = context;
    parts_ = parts;
    next_.store(0, std::memory_order_relaxed);
    failed_.store(false, std::memory_order_relaxed);
    state_.store((call_of(state_.load()) + 1) * kCall + helpers * kHelper);
    for (uint64_t i = 0; i < helpers; ++i) wake(beds_[i]);
    take_parts();
    state_.fetch_or(kClosed);
    for (int spins = 0; workers_in(state_.load()) != 0; ++spins) {
      // A worker whose core is taken by somebody else needs ours.
      if (spins < 1000) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
    const std::exception_ptr failure = std::exchange(failure_, nullptr);
    busy_.store(false, std::memory_order_release);
    if (failure) std::rethrow_exception(failure);
    return true;
  }

 private:
  void hire(uint64_t count) {
    try {
      for (; hired_ < count; ++hired_) {
        if (beds_.size() == hired_) beds_.emplace_back();
        std::thread([this, index = hired_, bed = &beds_[hired_], seen = call_of(state_.load())] {
          work(index, *bed, seen);
        }).detach();
      }
    } catch (const std::exception&) {
      // No more threads to be had: fewer do the same work.
    }
  }

  void take_parts() {
    try {
      for (int64_t part; (part = next_.fetch_add(1, std::memory_order_relaxed)) < parts_;) run_(context_, part);
    } catch (...) {
      if (!failed_.exchange(true)) failure_ = std::current_exception();
      next_.store(parts_, std::memory_order_relaxed);
    }
  }

  void work(uint64_t index, Bed& bed, uint64_t seen) {
    for (;;) {
      uint64_t state = await(index, bed, seen);
      bool joined = false;
      while (!(state & kClosed) && index < helpers_of(state) && !joined) {
        joined = state_.compare_exchange_weak(state, state + 1);
      }
      seen = call_of(state);
      if (!joined) continue;
      take_parts();
      state_.fetch_sub(1);
    }
  }

  // The state once it is of another call than `seen`, one that has use for this worker.
  uint64_t await(uint64_t index, Bed& bed, uint64_t seen) {
    uint64_t state;
    const auto wanted = [&] {
      state = state_.load();
      return call_of(state) != seen && index < helpers_of(state);
    };
    const auto until = Clock::now() + spin_;
    while (Clock::now() < until) {
      for (int spins = 0; spins < 64; ++spins) {
        if (wanted()) return state;
        pause();
      }
      // Who has work for this core comes first, the caller itself where both were put on one.
      std::this_thread::yield();
    }
    std::unique_lock<std::mutex> lock(bed.mutex);
    // Taken before the state is read, as the caller reads it after it has written the state: one of both sees the
    // other.
    bed.wake.wait(lock, [&] {
      bed.taken.store(true);
      return wanted();
    });
    bed.taken.store(false);
    return state;
  }

  // Once a sleep: until the worker is up it is left alone.
  void wake(Bed& bed) {
    if (!bed.taken.load() || !bed.taken.exchange(false)) return;
    {
      const std::lock_guard<std::mutex> lock(bed.mutex);
    }
    bed.wake.notify_one();
  }

  const std::chrono::microseconds spin_ = spin_time();
  std::atomic<bool> busy_{false};
  // Of whoever has set busy_.
  std::deque<Bed> beds_;
  uint64_t hired_ = 0;
  alignas(64) std::atomic<uint64_t> state_{kClosed};
  alignas(64) std::atomic<int64_t> next_{0};
  // Of the call in hand; written before state_ says so.
  alignas(64) void (*run_)(void*, int64_t) = nullptr;
  void* context_ = nullptr;
  int64_t parts_ = 0;
  std::atomic<bool> failed_{false};
  std::exception_ptr failure_;  // of the one that has set failed_
};

// Never destroyed: its threads may outlive every destructor. A forked child has none of them, and starts anew.
std::atomic<Pool*> pool{nullptr};
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });

Pool& the_pool() {
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
  const int64_t helpers = std::min<int64_t>({parts - 1, int64_t{threads} - 1, kMostWorkers});
  if (helpers > 0 && the_pool().run(parts, static_cast<uint64_t>(helpers), run, context)) return;
  for (int64_t part = 0; part < parts; ++part) run(context, part);
}

}  // namespace personafast
