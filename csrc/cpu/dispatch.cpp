// Chooses the instruction set once, checks the slots, and splits the work over threads.

#include <stdlib.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "personafast/isa.h"

namespace personafast {
namespace {

// Below this many multiply-adds, or bytes moved, a second thread costs more to wake than it saves.
constexpr int64_t kWorkPerThread = 1 << 16;

// The same for lora_delta, which wakes the threads twice a call, some 15 us each time where they sleep between calls.
constexpr int64_t kLoraWorkPerThread = 1 << 21;

#ifdef PERSONAFAST_X86
constexpr bool kX86 = true;
#else
constexpr bool kX86 = false;
#endif

Isa choose() {
  const char* forced = getenv("PERSONAFAST_CPU_ISA");
  if (forced == nullptr || *forced == '\0') {
    for (int i = kIsas - 1; i > 0; --i) {
      const Isa isa = static_cast<Isa>(i);
      if (isa_compiled(isa) && isa_supported(isa)) return isa;
    }
    return Isa::scalar;
  }
  for (int i = 0; i < kIsas; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (std::string(forced) != isa_name(isa)) continue;
    const std::string asked = std::string("PERSONAFAST_CPU_ISA=") + forced;
    if (!isa_compiled(isa)) throw std::runtime_error(asked + ": this build has no such kernels");
    if (!isa_supported(isa)) throw std::runtime_error(asked + ": this machine cannot run it");
    return isa;
  }
  throw std::runtime_error(std::string("PERSONAFAST_CPU_ISA=") + forced + ": choose scalar, avx2 or avx512");
}

int64_t first_wrong_slot(const int32_t* slots, int64_t rows, int64_t count) {
  for (int64_t t = 0; t < rows; ++t) {
    if (slots[t] < -1 || slots[t] >= count) return t;
  }
  return -1;
}

// Calls run(begin, end) on equal parts of [0, count), one a thread.
template <class Run>
void split(int64_t count, int64_t work, int64_t work_per_thread, int threads, Run run) {
  int64_t parts = work / work_per_thread;
  if (parts > threads) parts = threads;
  if (parts > count) parts = count;
  if (parts <= 1) return run(static_cast<int64_t>(0), count);
#ifdef _OPENMP
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static, 1)
#endif
  for (int64_t part = 0; part < parts; ++part) run(count * part / parts, count * (part + 1) / parts);
}

}  // namespace

const char* isa_name(Isa isa) {
  static const char* const names[kIsas] = {"scalar", "avx2", "avx512"};
  return names[static_cast<int>(isa)];
}

bool isa_compiled(Isa isa) { return kX86 || isa == Isa::scalar; }

bool isa_supported(Isa isa) {
#ifdef PERSONAFAST_X86
  switch (isa) {
    case Isa::scalar:
      return true;
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
#endif
  return isa == Isa::scalar;
}

Isa isa_chosen() {
  static const Isa isa = choose();
  return isa;
}

int64_t inject_cpu(const InjectArgs& args, int threads) {
  const int64_t wrong = first_wrong_slot(args.slots, args.rows, args.bank_rows);
  if (wrong >= 0) return wrong;
  const Isa isa = isa_chosen();
  split(args.rows, args.rows * args.width, kWorkPerThread, threads, [&](int64_t begin, int64_t end) {
#ifdef PERSONAFAST_X86
    if (isa == Isa::avx512) return avx512::inject_rows(args, begin, end);
    if (isa == Isa::avx2) return avx2::inject_rows(args, begin, end);
#endif
    scalar::inject_rows(args, begin, end);
  });
  return -1;
}

int64_t lora_delta_cpu(const LoraDeltaArgs& args, int threads) {
  const int64_t wrong = first_wrong_slot(args.slots, args.rows, args.adapters);
  if (wrong >= 0) return wrong;
  const auto rank_of = [&](int64_t adapter) {
    return std::min<int64_t>(std::max<int64_t>(args.ranks[adapter], 0), args.rank);
  };
  std::vector<int64_t> rows;
  rows.reserve(static_cast<size_t>(args.rows));
  int64_t ranks = 0;
  for (int64_t t = 0; t < args.rows; ++t) {
    const int64_t rank = args.slots[t] < 0 ? 0 : rank_of(args.slots[t]);
    if (rank > 0) rows.push_back(t);
    ranks += rank;
  }
  if (rows.empty()) return -1;
  const auto slot_then_place = [&](int64_t s, int64_t t) {
    return args.slots[s] != args.slots[t] ? args.slots[s] < args.slots[t] : s < t;
  };
  std::sort(rows.begin(), rows.end(), slot_then_place);
  std::vector<float> inner(static_cast<size_t>(ranks));
  std::vector<LoraGroup> groups;
  float* free = inner.data();
  for (size_t k = 0; k < rows.size(); ++k) {
    const int64_t adapter = args.slots[rows[k]];
    if (groups.empty() || groups.back().adapter != adapter) {
      groups.push_back({&rows[k], 0, adapter, rank_of(adapter), free});
    }
    ++groups.back().count;
    free += groups.back().rank;
  }

  const Isa isa = isa_chosen();
  split(args.rank, ranks * args.features, kLoraWorkPerThread, threads, [&](int64_t begin, int64_t end) {
    for (const LoraGroup& group : groups) {
      const int64_t last = std::min(end, group.rank);
#ifdef PERSONAFAST_X86
      if (isa == Isa::avx512) {
        avx512::lora_delta_inner(args, group, begin, last);
        continue;
      }
      if (isa == Isa::avx2) {
        avx2::lora_delta_inner(args, group, begin, last);
        continue;
      }
#endif
      scalar::lora_delta_inner(args, group, begin, last);
    }
  });
  // Blocks of whole cache lines, so that no two threads write to one.
  constexpr int64_t kBlock = 64;
  const int64_t blocks = (args.outputs + kBlock - 1) / kBlock;
  split(blocks, ranks * args.outputs, kLoraWorkPerThread, threads, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kBlock;
    const int64_t last = std::min(end * kBlock, args.outputs);
    for (const LoraGroup& group : groups) {
#ifdef PERSONAFAST_X86
      if (isa == Isa::avx512 && args.b_stride_o == 1) {
        avx512::lora_delta_outputs(args, group, first, last);
        continue;
      }
      if (isa == Isa::avx2 && args.b_stride_o == 1) {
        avx2::lora_delta_outputs(args, group, first, last);
        continue;
      }
#endif
      scalar::lora_delta_outputs(args, group, first, last);
    }
  });
  return -1;
}

int64_t masked_linear_cpu(const MaskedLinearArgs& args, int threads) {
  const int64_t wrong = first_wrong_slot(args.slots, args.rows, args.personas);
  if (wrong >= 0) return wrong;
  if (args.rows == 0) return -1;
  const Isa isa = isa_chosen();
  split(args.outputs, args.rows * args.outputs * args.features, kWorkPerThread, threads,
        [&](int64_t begin, int64_t end) {
#ifdef PERSONAFAST_X86
          if (isa == Isa::avx512) return avx512::masked_linear_outputs(args, begin, end);
          if (isa == Isa::avx2) return avx2::masked_linear_outputs(args, begin, end);
#endif
          scalar::masked_linear_outputs(args, begin, end);
        });
  return -1;
}

}  // namespace personafast
