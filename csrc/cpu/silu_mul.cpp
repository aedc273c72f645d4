#include "personafast/silu_mul.h"

#include <algorithm>

#include "host.h"

namespace personafast {

void silu_mul_cpu(const SiluMulArgs& args, int threads) {
  const Isa isa = isa_chosen();
  // Whole cache lines, so that no two threads write to one.
  constexpr int64_t kBlock = 64;
  split((args.count + kBlock - 1) / kBlock, args.count, kWorkPerThread, threads, [&](int64_t begin, int64_t end) {
    PERSONAFAST_RUN(isa, silu_mul_each, args, begin * kBlock, std::min(end * kBlock, args.count));
  });
}

}  // namespace personafast
