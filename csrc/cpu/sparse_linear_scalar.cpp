// sparse_linear in plain C++: the weights are visited in the order of the set bits, 32 partial sums as in
// masked_linear.

#include "kernels.h"
#include "scalar_float.h"

namespace personafast::scalar {
namespace {

template <Dtype D>
void outputs(const SparseLinearArgs& a, const LinearPlan& plan, int64_t begin, int64_t end) {
  constexpr int64_t kBytes = D == Dtype::f32 ? 4 : 2;
  const int64_t words = (a.features + 31) / 32;
  for (int64_t o = begin; o < end; ++o) {
    for (int64_t k = 0; k < plan.rows; ++k) {
      const int64_t t = plan.order[k];
      const void* x = static_cast<const char*>(a.x) + t * a.x_stride * kBytes;
      float sums[32] = {};
      int64_t next = a.row_offsets[o];
      for (int64_t w = 0; w < words; ++w) {
        const uint32_t bits = static_cast<uint32_t>(a.bitmap[o * words + w]);
        const int64_t left = a.features - 32 * w;
        for (int j = 0; j < 32 && j < left; ++j) {
          if ((bits >> j & 1u) != 0 && next < a.value_count) {
            sums[j] += load<D>(a.values, next) * load<D>(x, 32 * w + j);
            ++next;
          }
        }
      }
      float y = pairwise(sums);
      if (a.bias) y += load<D>(a.bias, o);
      store<D>(a.out, t * a.outputs + o, y);
    }
  }
}

}  // namespace

void sparse_linear_outputs(const SparseLinearArgs& a, const LinearPlan& plan, Scratch, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case Dtype::f32:
      return outputs<Dtype::f32>(a, plan, begin, end);
    case Dtype::bf16:
      return outputs<Dtype::bf16>(a, plan, begin, end);
    case Dtype::f16:
      return outputs<Dtype::f16>(a, plan, begin, end);
  }
}

}  // namespace personafast::scalar
