#include "personafast/masked_linear.h"

#include <algorithm>

#include "host.h"
#include "linear_plan.h"

namespace personafast {

int64_t masked_linear_cpu(const MaskedLinearArgs& args, int threads) {
  const int64_t wrong = args.slots == nullptr ? -1 : first_wrong_slot(args.slots, args.rows, args.personas);
  if (wrong >= 0) return wrong;
  const Isa isa = isa_chosen();
  const int64_t groups = (args.outputs + kOutputGroup - 1) / kOutputGroup;
  const int64_t row_bytes = (args.features + 31) / 32 * 32 * (args.dtype == Dtype::bf16 ? 2 : 4);
  for (int64_t first = 0; first < args.rows; first += kPlanRows) {
    const TiledRows rows(args.slots, first, std::min(kPlanRows, args.rows - first), args.gamma != nullptr);
    const LinearPlan& plan = rows.plan();
    const uint64_t call = call_number();
    split(groups, plan.rows * args.outputs * args.features, kWorkPerThread, threads, [&](int64_t begin, int64_t end) {
      PERSONAFAST_RUN(isa, masked_linear_outputs, args, plan, scratch(plan.rows * row_bytes, call),
                      begin * kOutputGroup, std::min(end * kOutputGroup, args.outputs));
    });
  }
  return -1;
}

}  // namespace personafast
