// masked_linear in plain C++: 32 partial sums, one for each bit of a mask word, then added in pairs.

#include "kernels.h"
#include "scalar_float.h"

namespace personafast::scalar {
namespace {

// Features i to i + count - 1: bit j of bits keeps weight i + j. Masking is by AND, so that the compiler can vectorise
// the full words, where count is the constant 32.
template <Dtype D, bool Soft>
void word(const void* weight, const void* x, uint32_t bits, int64_t i, int count, float* kept, float* dropped) {
  for (int j = 0; j < count; ++j) {
    const uint32_t keep = 0u - ((bits >> j) & 1u);
    const uint32_t wj = float_to_bits(load<D>(weight, i + j));
    const float xj = load<D>(x, i + j);
    kept[j] += bits_to_float(wj & keep) * xj;
    if constexpr (Soft) dropped[j] += bits_to_float(wj & ~keep) * xj;
  }
}

template <Dtype D, bool Soft>
void outputs(const MaskedLinearArgs& a, const LinearPlan& plan, int64_t begin, int64_t end) {
  constexpr int64_t kBytes = D == Dtype::f32 ? 4 : 2;
  const int64_t words = (a.features + 31) / 32;
  for (int64_t o = begin; o < end; ++o) {
    const void* weight = static_cast<const char*>(a.weight) + o * a.weight_stride * kBytes;
    for (int64_t k = 0; k < plan.rows; ++k) {
      const int64_t t = plan.order[k];
      const int64_t slot = a.slots ? a.slots[t] : -1;
      const void* x = static_cast<const char*>(a.x) + t * a.x_stride * kBytes;
      const int32_t* mask = slot < 0 ? nullptr : a.masks + (slot * a.outputs + o) * words;
      float kept[32] = {};
      float dropped[32] = {};
      for (int64_t w = 0; w < words; ++w) {
        const uint32_t bits = mask ? static_cast<uint32_t>(mask[w]) : 0xffffffffu;
        const int64_t left = a.features - 32 * w;
        if (left >= 32) {
          word<D, Soft>(weight, x, bits, 32 * w, 32, kept, dropped);
        } else {
          word<D, Soft>(weight, x, bits, 32 * w, static_cast<int>(left), kept, dropped);
        }
      }
      float y = pairwise(kept);
      if constexpr (Soft) {
        if (slot >= 0) y += a.gamma[slot] * pairwise(dropped);
      }
      if (a.bias) y += load<D>(a.bias, o);
      store<D>(a.out, t * a.outputs + o, y);
    }
  }
}

}  // namespace

void masked_linear_outputs(const MaskedLinearArgs& a, const LinearPlan& plan, Scratch, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case Dtype::f32:
      return a.gamma ? outputs<Dtype::f32, true>(a, plan, begin, end) : outputs<Dtype::f32, false>(a, plan, begin, end);
    case Dtype::bf16:
      return a.gamma ? outputs<Dtype::bf16, true>(a, plan, begin, end)
                     : outputs<Dtype::bf16, false>(a, plan, begin, end);
    case Dtype::f16:
      return a.gamma ? outputs<Dtype::f16, true>(a, plan, begin, end) : outputs<Dtype::f16, false>(a, plan, begin, end);
  }
}

}  // namespace personafast::scalar
