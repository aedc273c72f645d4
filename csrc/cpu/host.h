#pragma once

#include <stddef.h>
#include <stdint.h>

#include <atomic>
#include <vector>

#include "kernels.h"
#include "personafast/isa.h"
#include "pool.h"

// What the host units share: each checks its slots, chooses the instruction set and splits the work over threads. No
// ISA unit may include this.
namespace personafast {
namespace {

// Below this many multiply-adds, or bytes moved, a second thread costs more than it saves.
constexpr int64_t kWorkPerThread = 1 << 16;

// Parts a thread: a thread that loses its core for a while leaves most of its share to the others.
constexpr int64_t kPartsPerThread = 8;

// The first row whose slot is outside [-1, count), or -1.
inline int64_t first_wrong_slot(const int32_t* slots, int64_t rows, int64_t count) {
  for (int64_t t = 0; t < rows; ++t) {
    if (slots[t] < -1 || slots[t] >= count) return t;
  }
  return -1;
}

// Calls run(begin, end) on equal parts of [0, count), of about work_per_thread each or more, wherever a thread is free.
template <class Run>
inline void split(int64_t count, int64_t work, int64_t work_per_thread, int threads, const Run& run) {
  int64_t parts = work / work_per_thread;
  if (parts > threads * kPartsPerThread) parts = threads * kPartsPerThread;
  if (parts > count) parts = count;
  if (parts <= 1 || threads <= 1) return run(static_cast<int64_t>(0), count);
  struct Call {
    const Run& run;
    int64_t count;
    int64_t parts;
  } call = {run, count, parts};
  run_parts(
      parts, threads,
      [](void* context, int64_t part) {
        const Call& c = *static_cast<const Call*>(context);
        c.run(c.count * part / c.parts, c.count * (part + 1) / c.parts);
      },
      &call);
}

// A number that no other call has.
inline uint64_t call_number() {
  static std::atomic<uint64_t> last{0};
  return ++last;
}

// At least `bytes` for this thread alone, from a cache line on. It holds what the thread wrote there earlier in the
// same call, if it did.
inline Scratch scratch(int64_t bytes, uint64_t call) {
  static thread_local std::vector<char> buffer;
  static thread_local uint64_t last = 0;
  const size_t wanted = static_cast<size_t>(bytes) + 64;
  if (buffer.size() < wanted) buffer.resize(wanted);
  void* at = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(buffer.data()) + 63) & ~static_cast<uintptr_t>(63));
  const bool packed = last == call;
  last = call;
  return {at, packed};
}

}  // namespace
}  // namespace personafast

// Calls `kernel` of the namespace of the instruction set in use.
#ifdef PERSONAFAST_X86
#define PERSONAFAST_RUN(isa, kernel, ...) \
  do {                                    \
    switch (isa) {                        \
      case Isa::avx512:                   \
        avx512::kernel(__VA_ARGS__);      \
        break;                            \
      case Isa::avx2:                     \
        avx2::kernel(__VA_ARGS__);        \
        break;                            \
      case Isa::scalar:                   \
        scalar::kernel(__VA_ARGS__);      \
        break;                            \
    }                                     \
  } while (false)
#else
#define PERSONAFAST_RUN(isa, kernel, ...) (static_cast<void>(isa), scalar::kernel(__VA_ARGS__))
#endif
