#include "personafast/masked_linear.h"

#include "host.h"

namespace personafast {

int64_t masked_linear_cpu(const MaskedLinearArgs& args, int threads) {
  const int64_t wrong = first_wrong_slot(args.slots, args.rows, args.personas);
  if (wrong >= 0) return wrong;
  if (args.rows == 0) return -1;
  const Isa isa = isa_chosen();
  split(args.outputs, args.rows * args.outputs * args.features, kWorkPerThread, threads,
        [&](int64_t begin, int64_t end) { PERSONAFAST_RUN(isa, masked_linear_outputs, args, begin, end); });
  return -1;
}

}  // namespace personafast
