#include "personafast/lora_delta.h"

#include <algorithm>
#include <vector>

#include "host.h"

namespace personafast {

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
  split(args.rank, ranks * args.features, kWorkPerThread, threads, [&](int64_t begin, int64_t end) {
    for (const LoraGroup& group : groups) {
      const int64_t last = std::min(end, group.rank);
      PERSONAFAST_RUN(isa, lora_delta_inner, args, group, begin, last);
    }
  });
  // Blocks of whole cache lines, so that no two threads write to one.
  constexpr int64_t kBlock = 64;
  const Isa adjacent = args.b_stride_o == 1 ? isa : Isa::scalar;
  const int64_t blocks = (args.outputs + kBlock - 1) / kBlock;
  split(blocks, ranks * args.outputs, kWorkPerThread, threads, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kBlock;
    const int64_t last = std::min(end * kBlock, args.outputs);
    for (const LoraGroup& group : groups) {
      PERSONAFAST_RUN(adjacent, lora_delta_outputs, args, group, first, last);
    }
  });
  return -1;
}

}  // namespace personafast
