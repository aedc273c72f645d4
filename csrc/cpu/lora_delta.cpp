#include "personafast/lora_delta.h"

#include <algorithm>
#include <vector>

#include "host.h"

namespace personafast {
namespace {

// Adapters that a thread must have at least for each to be one thread's, and multiply-adds that are worth a second one
// then: few, as they take a fraction of the time that their factors take from memory.
constexpr int64_t kGroupsPerThread = 4;
constexpr int64_t kFewWork = 1 << 14;

// Outputs of whole cache lines, so that no two threads write to one.
constexpr int64_t kOutputs = 64;

// Asks for `rows` rows of `bytes` bytes each.
void fetch(const char* row, int64_t stride, int64_t rows, int64_t bytes) {
  for (int64_t r = 0; r < rows; ++r, row += stride) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i);
  }
}

// Both products of each group in turn. Memory never waits: while one factor is multiplied the next is on its way.
void run_groups(const LoraDeltaArgs& a, Isa isa, const LoraGroup* groups, int64_t count) {
  const int64_t bytes = a.dtype == Dtype::f32 ? 4 : 2;
  const auto fetch_a = [&](const LoraGroup& g) {
    fetch(static_cast<const char*>(a.a) + g.adapter * a.a_stride_m * bytes, a.a_stride_r * bytes, g.rank,
          a.features * bytes);
  };
  if (count > 0) fetch_a(groups[0]);
  for (int64_t k = 0; k < count; ++k) {
    const LoraGroup& g = groups[k];
    fetch(static_cast<const char*>(a.b) + g.adapter * a.b_stride_m * bytes, a.b_stride_r * bytes, g.rank,
          a.outputs * bytes);
    PERSONAFAST_RUN(isa, lora_delta_inner, a, g, 0, g.rank);
    if (k + 1 < count) fetch_a(groups[k + 1]);
    PERSONAFAST_RUN(isa, lora_delta_outputs, a, g, 0, a.outputs);
  }
}

}  // namespace

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
  const int64_t count = static_cast<int64_t>(groups.size());
  if (args.b_stride_o == 1 && count >= kGroupsPerThread * threads) {
    split(count, ranks * (args.features + args.outputs), kFewWork, threads,
          [&](int64_t begin, int64_t end) { run_groups(args, isa, &groups[begin], end - begin); });
    return -1;
  }
  split(args.rank, ranks * args.features, kWorkPerThread, threads, [&](int64_t begin, int64_t end) {
    for (const LoraGroup& group : groups) {
      const int64_t last = std::min(end, group.rank);
      PERSONAFAST_RUN(isa, lora_delta_inner, args, group, begin, last);
    }
  });
  const Isa adjacent = args.b_stride_o == 1 ? isa : Isa::scalar;
  const int64_t blocks = (args.outputs + kOutputs - 1) / kOutputs;
  split(blocks, ranks * args.outputs, kWorkPerThread, threads, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kOutputs;
    const int64_t last = std::min(end * kOutputs, args.outputs);
    for (const LoraGroup& group : groups) {
      PERSONAFAST_RUN(adjacent, lora_delta_outputs, args, group, first, last);
    }
  });
  return -1;
}

}  // namespace personafast
