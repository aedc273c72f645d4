// The residual of verify_draft, 16 tokens at a time.

#include "avx512_float.h"
#include "avx512_math.h"
#include "kernels.h"

namespace personafast::avx512 {
namespace {

// Tokens i to i + 15, zero where m is not set.
template <Dtype D>
__m512 weight(const Residual& r, int64_t i, __mmask16 m) {
  __m512 left = _mm512_mul_ps(_mm512_set1_ps(r.scale), exp_ps(load<D>(r.target, i, m)));
  if (r.draft) left = _mm512_sub_ps(left, exp_ps(load<D>(r.draft, i, m)));
  if (r.barred >= i && r.barred < i + 16) m &= static_cast<__mmask16>(~(1u << (r.barred - i)));
  // Of an operand that is NaN max returns the second.
  return _mm512_maskz_max_ps(m, _mm512_setzero_ps(), left);
}

template <Dtype D>
void sums_of(const Residual& r, int64_t begin, int64_t end, float* sums) {
  for (int64_t i = begin; i < end; i += kResidualTile) {
    const int64_t last = end - i < kResidualTile ? end : i + kResidualTile;
    __m512 even = _mm512_setzero_ps();
    __m512 odd = _mm512_setzero_ps();
    int64_t j = i;
    for (; j + 32 <= last; j += 32) {
      even = _mm512_add_ps(even, weight<D>(r, j, 0xffff));
      odd = _mm512_add_ps(odd, weight<D>(r, j + 16, 0xffff));
    }
    for (; j < last; j += 16) even = _mm512_add_ps(even, weight<D>(r, j, first(last - j)));
    *sums++ = _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
  }
}

template <Dtype D>
void weights_of(const Residual& r, int64_t begin, int64_t end, float* weights) {
  for (int64_t i = begin; i < end; i += 16) {
    const __mmask16 m = first(end - i);
    _mm512_mask_storeu_ps(weights + (i - begin), m, weight<D>(r, i, m));
  }
}

}  // namespace

void residual_sums(const Residual& r, int64_t begin, int64_t end, float* sums) {
  switch (r.dtype) {
    case Dtype::f32:
      return sums_of<Dtype::f32>(r, begin, end, sums);
    case Dtype::bf16:
      return sums_of<Dtype::bf16>(r, begin, end, sums);
    case Dtype::f16:
      return sums_of<Dtype::f16>(r, begin, end, sums);
  }
}

void residual_weights(const Residual& r, int64_t begin, int64_t end, float* weights) {
  switch (r.dtype) {
    case Dtype::f32:
      return weights_of<Dtype::f32>(r, begin, end, weights);
    case Dtype::bf16:
      return weights_of<Dtype::bf16>(r, begin, end, weights);
    case Dtype::f16:
      return weights_of<Dtype::f16>(r, begin, end, weights);
  }
}

}  // namespace personafast::avx512
