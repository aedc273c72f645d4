// masked_linear in plain C++: 32 partial sums, one for each bit of a mask word, then added in pairs.

#include "kernels.h"
#include "scalar_float.h"

namespace personafast::scalar {
namespace {

float pairwise(float* sums) {
  for (int width = 16; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) sums[j] += sums[j + width];
  }
  return sums[0];
}

template <Dtype D>
void outputs(const MaskedLinearArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t kBytes = D == Dtype::f32 ? 4 : 2;
  const int64_t words = (a.features + 31) / 32;
  for (int64_t o = begin; o < end; ++o) {
    const void* weight = static_cast<const char*>(a.weight) + o * a.weight_stride * kBytes;
    for (int64_t t = 0; t < a.rows; ++t) {
      const int64_t slot = a.slots[t];
      const void* x = static_cast<const char*>(a.x) + t * a.x_stride * kBytes;
      const int32_t* mask = slot < 0 ? nullptr : a.masks + (slot * a.outputs + o) * words;
      float kept[32] = {};
      float dropped[32] = {};
      for (int64_t w = 0; w < words; ++w) {
        const uint32_t bits = mask ? static_cast<uint32_t>(mask[w]) : 0xffffffffu;
        const int64_t left = a.features - 32 * w;
        const int count = left < 32 ? static_cast<int>(left) : 32;
        for (int j = 0; j < count; ++j) {
          const float wj = load<D>(weight, 32 * w + j);
          const float xj = load<D>(x, 32 * w + j);
          const bool keep = (bits >> j) & 1u;
          kept[j] += (keep ? wj : 0.0f) * xj;
          if (a.gamma) dropped[j] += (keep ? 0.0f : wj) * xj;
        }
      }
      float y = pairwise(kept);
      if (a.gamma && slot >= 0) y += a.gamma[slot] * pairwise(dropped);
      if (a.bias) y += load<D>(a.bias, o);
      store<D>(a.out, t * a.outputs + o, y);
    }
  }
}

}  // namespace

void masked_linear_outputs(const MaskedLinearArgs& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case Dtype::f32:
      return outputs<Dtype::f32>(a, begin, end);
    case Dtype::bf16:
      return outputs<Dtype::bf16>(a, begin, end);
    case Dtype::f16:
      return outputs<Dtype::f16>(a, begin, end);
  }
}

}  // namespace personafast::scalar
