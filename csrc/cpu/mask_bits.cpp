#include "personafast/mask_bits.h"

#include "host.h"

namespace personafast {
namespace {

// As kWorkPerThread, in bytes of the mask: a second thread is worth waking from some 10 us of work on.
constexpr int64_t kBytesPerThread = 1 << 20;

}  // namespace

void pack_mask_cpu(const MaskBitsArgs& args, int threads) {
  const Isa isa = isa_chosen();
  split(args.rows, args.rows * args.columns, kBytesPerThread, threads,
        [&](int64_t begin, int64_t end) { PERSONAFAST_RUN(isa, pack_mask_rows, args, begin, end); });
}

void unpack_mask_cpu(const MaskBitsArgs& args, int threads) {
  const Isa isa = isa_chosen();
  split(args.rows, args.rows * args.columns, kBytesPerThread, threads,
        [&](int64_t begin, int64_t end) { PERSONAFAST_RUN(isa, unpack_mask_rows, args, begin, end); });
}

}  // namespace personafast
