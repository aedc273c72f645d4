#pragma once

#include <stddef.h>
#include <stdint.h>

#include <vector>

#include "kernels.h"
#include "personafast/isa.h"

// What the host units share: each checks its slots, chooses the instruction set and splits the work over threads. No
// ISA unit may include this.
namespace personafast {
namespace {

// Below this many multiply-adds, or bytes moved, a second thread costs more to wake than it saves.
constexpr int64_t kWorkPerThread = 1 << 16;

// The first row whose slot is outside [-1, count), or -1.
inline int64_t first_wrong_slot(const int32_t* slots, int64_t rows, int64_t count) {
  for (int64_t t = 0; t < rows; ++t) {
    if (slots[t] < -1 || slots[t] >= count) return t;
  }
  return -1;
}

// Calls run(begin, end) on equal parts of [0, count), one a thread.
template <class Run>
inline void split(int64_t count, int64_t work, int64_t work_per_thread, int threads, Run run) {
  int64_t parts = work / work_per_thread;
  if (parts > threads) parts = threads;
  if (parts > count) parts = count;
  if (parts <= 1) return run(static_cast<int64_t>(0), count);
#ifdef _OPENMP
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static, 1)
#endif
  for (int64_t part = 0; part < parts; ++part) run(count * part / parts, count * (part + 1) / parts);
}

// At least `bytes` for this thread alone, from a cache line on; what was in it is lost.
inline void* scratch(int64_t bytes) {
  static thread_local std::vector<char> buffer;
  const size_t wanted = static_cast<size_t>(bytes) + 64;
  if (buffer.size() < wanted) buffer.resize(wanted);
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(buffer.data()) + 63) & ~static_cast<uintptr_t>(63));
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
