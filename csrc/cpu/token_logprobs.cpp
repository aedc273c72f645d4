#include "personafast/token_logprobs.h"

#include <math.h>

#include <algorithm>
#include <vector>

#include "host.h"
#include "linear_plan.h"

namespace personafast {
namespace {

constexpr int64_t kParts = 64;

int64_t first_wrong_row(const TokenLogprobsArgs& args) {
  for (int64_t t = 0; t < args.rows; ++t) {
    if (args.tokens[t] < 0 || args.tokens[t] >= args.vocabulary) return t;
    if (args.temperature != nullptr && !(args.temperature[t] > 0)) return t;
  }
  return -1;
}

}  // namespace

int64_t token_logprobs_cpu(const TokenLogprobsArgs& args, int threads) {
  const int64_t wrong = first_wrong_row(args);
  if (wrong >= 0) return wrong;
  const Isa isa = isa_chosen();
  // Parts of whole panels, the same ones for every number of threads.
  const int64_t panels = (args.vocabulary + kLogitPanel - 1) / kLogitPanel;
  const int64_t part = (panels + kParts - 1) / kParts * kLogitPanel;
  const int64_t parts = part > 0 ? (args.vocabulary + part - 1) / part : 0;
  const int64_t row_bytes = (args.features + 31) / 32 * 32 * (args.dtype == Dtype::bf16 ? 2 : 4);
  std::vector<LogSum> sums(static_cast<size_t>(parts * kPlanRows));
  std::vector<float> target(kPlanRows);
  for (int64_t first = 0; first < args.rows; first += kPlanRows) {
    const TiledRows rows(nullptr, first, std::min(kPlanRows, args.rows - first), false);
    const LinearPlan& plan = rows.plan();
    const uint64_t call = call_number();
    split(parts, plan.rows * args.vocabulary * args.features, kWorkPerThread, threads, [&](int64_t begin, int64_t end) {
      PERSONAFAST_RUN(isa, token_logprobs_parts, args, plan, scratch(plan.rows * row_bytes, call), part, begin, end,
                      sums.data(), target.data());
    });
    for (int64_t k = 0; k < plan.rows; ++k) {
      float largest = -INFINITY;
      for (int64_t p = 0; p < parts; ++p) largest = std::max(largest, sums[p * kPlanRows + k].max);
      double total = 0;
      for (int64_t p = 0; p < parts; ++p) {
        const LogSum& sum = sums[p * kPlanRows + k];
        // A part that has seen nothing but -inf adds nothing; 0 * exp(-inf - -inf) would be NaN.
        if (sum.max != -INFINITY || sum.sum != 0) total += sum.sum * exp(static_cast<double>(sum.max) - largest);
      }
      args.out[plan.order[k]] = static_cast<float>((static_cast<double>(target[k]) - largest) - log(total));
    }
  }
  return -1;
}

}  // namespace personafast
