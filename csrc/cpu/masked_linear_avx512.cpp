// masked_linear: a word of the packed mask is the __mmask32 under which 32 bf16 weights are kept, or the two __mmask16
// of 2 x 16 fp32 weights.

#include <immintrin.h>

#include "avx512_dot.h"
#include "kernels.h"

namespace personafast::avx512 {
namespace {

template <Dtype D, bool Soft>
void write(const MaskedLinearArgs& a, const Linear<D, Soft>& sums, int64_t o, int count) {
  const __m128 bias = a.bias ? load4<D>(a.bias, o, count) : _mm_setzero_ps();
  int64_t k = 0;
  for (int64_t j = 0; j < sums.plan.count; ++j) {
    const LinearTile& tile = sums.plan.tiles[j];
    for (int64_t t = 0; t < tile.count; ++t, k += kGroup) {
      __m128 y = _mm_load_ps(sums.kept + k);
      if (Soft && tile.keep != Keep::all) {
        const float gamma = a.gamma[tile.slots[tile.keep == Keep::each ? t : 0]];
        y = _mm_add_ps(y, _mm_mul_ps(_mm_set1_ps(gamma), _mm_load_ps(sums.dropped + k)));
      }
      store4<D>(a.out, tile.rows[t] * a.outputs + o, _mm_add_ps(y, bias), count);
    }
  }
}

template <Dtype D, bool Soft>
void outputs(const MaskedLinearArgs& a, const LinearPlan& plan, Scratch scratch, int64_t begin, int64_t end) {
  const LinearArgs args = {a.x, a.x_stride, a.weight, a.weight_stride, a.masks, a.outputs, a.features};
  Linear<D, Soft> linear(args, plan, scratch);
  int64_t o = begin;
  for (; o + kGroup <= end; o += kGroup) {
    linear.group(o, kGroup, o + 2 * kGroup <= end);
    write(a, linear, o, kGroup);
  }
  // The last few outputs of the matrix, one at a time.
  for (; o < end; ++o) {
    linear.group(o, 1, false);
    write(a, linear, o, 1);
  }
}

}  // namespace

void masked_linear_outputs(const MaskedLinearArgs& a, const LinearPlan& plan, Scratch scratch, int64_t begin,
                           int64_t end) {
  switch (a.dtype) {
    case Dtype::f32:
      return a.gamma ? outputs<Dtype::f32, true>(a, plan, scratch, begin, end)
                     : outputs<Dtype::f32, false>(a, plan, scratch, begin, end);
    case Dtype::bf16:
      return a.gamma ? outputs<Dtype::bf16, true>(a, plan, scratch, begin, end)
                     : outputs<Dtype::bf16, false>(a, plan, scratch, begin, end);
    case Dtype::f16:
      return a.gamma ? outputs<Dtype::f16, true>(a, plan, scratch, begin, end)
                     : outputs<Dtype::f16, false>(a, plan, scratch, begin, end);
  }
}

}  // namespace personafast::avx512
