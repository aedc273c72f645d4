#include "personafast/add_inject_rms_norm.h"

#include "host.h"

namespace personafast {

int64_t add_inject_rms_norm_cpu(const AddInjectRmsNormArgs& args, int threads) {
  const int64_t wrong = first_wrong_slot(args.slots, args.rows, args.bank_rows);
  if (wrong >= 0) return wrong;
  const Isa isa = isa_chosen();
  split(args.rows, args.rows * args.width, kWorkPerThread, threads,
        [&](int64_t begin, int64_t end) { PERSONAFAST_RUN(isa, add_inject_rms_norm_rows, args, begin, end); });
  return -1;
}

}  // namespace personafast
