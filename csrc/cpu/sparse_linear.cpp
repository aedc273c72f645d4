#include "personafast/sparse_linear.h"

#include <string.h>

#include <algorithm>

#include "host.h"
#include "linear_plan.h"

namespace personafast {
namespace {

int64_t first_wrong_row(const SparseLinearArgs& args) {
  const int64_t* offsets = args.row_offsets;
  for (int64_t o = 0; o < args.outputs; ++o) {
    if (offsets[o] < 0 || offsets[o + 1] < offsets[o] || offsets[o + 1] > args.value_count) return o;
  }
  return -1;
}

uint32_t kept_bits(const CompressArgs& args, int64_t o, int64_t w) {
  const uint32_t bits = static_cast<uint32_t>(args.bitmap[o * ((args.features + 31) / 32) + w]);
  const int64_t left = args.features - 32 * w;
  return left >= 32 ? bits : bits & ((1u << left) - 1u);
}

}  // namespace

int64_t sparse_linear_cpu(const SparseLinearArgs& args, int threads) {
  const int64_t wrong = first_wrong_row(args);
  if (wrong >= 0) return wrong;
  const Isa isa = isa_chosen();
  const int64_t groups = (args.outputs + kOutputGroup - 1) / kOutputGroup;
  const int64_t row_bytes = (args.features + 31) / 32 * 32 * (args.dtype == Dtype::bf16 ? 2 : 4);
  for (int64_t first = 0; first < args.rows; first += kPlanRows) {
    const TiledRows rows(nullptr, first, std::min(kPlanRows, args.rows - first), false);
    const LinearPlan& plan = rows.plan();
    const uint64_t call = call_number();
    split(groups, plan.rows * args.outputs * args.features, kWorkPerThread, threads, [&](int64_t begin, int64_t end) {
      PERSONAFAST_RUN(isa, sparse_linear_outputs, args, plan, scratch(plan.rows * row_bytes, call),
                      begin * kOutputGroup, std::min(end * kOutputGroup, args.outputs));
    });
  }
  return -1;
}

void compress_cpu(const CompressArgs& args, bool fill) {
  const int64_t words = (args.features + 31) / 32;
  if (!fill) {
    args.row_offsets[0] = 0;
    for (int64_t o = 0; o < args.outputs; ++o) {
      int64_t count = 0;
      for (int64_t w = 0; w < words; ++w) count += __builtin_popcount(kept_bits(args, o, w));
      args.row_offsets[o + 1] = args.row_offsets[o] + count;
    }
    return;
  }
  const int64_t bytes = args.dtype == Dtype::f32 ? 4 : 2;
  for (int64_t o = 0; o < args.outputs; ++o) {
    const char* from = static_cast<const char*>(args.weight) + o * args.weight_stride * bytes;
    char* to = static_cast<char*>(args.values) + args.row_offsets[o] * bytes;
    for (int64_t w = 0; w < words; ++w) {
      for (uint32_t bits = kept_bits(args, o, w); bits != 0; bits &= bits - 1, to += bytes) {
        memcpy(to, from + (32 * w + __builtin_ctz(bits)) * bytes, static_cast<size_t>(bytes));
      }
    }
  }
}

}  // namespace personafast
