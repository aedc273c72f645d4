// The residual of verify_draft, 8 tokens at a time.

#include "avx2_float.h"
#include "avx2_math.h"
#include "kernels.h"

namespace personafast::avx2 {
namespace {

// Tokens i to i + n - 1, zero after them.
template <Dtype D>
__m256 weight(const Residual& r, int64_t i, int64_t n) {
  __m256 left = _mm256_mul_ps(_mm256_set1_ps(r.scale), exp_ps(load<D>(r.target, i, n)));
  if (r.draft) left = _mm256_sub_ps(left, exp_ps(load<D>(r.draft, i, n)));
  // Of an operand that is NaN max returns the second.
  left = _mm256_and_ps(_mm256_max_ps(_mm256_setzero_ps(), left), first(n));
  if (r.barred < i || r.barred >= i + n) return left;
  return _mm256_andnot_ps(_mm256_andnot_ps(first(r.barred - i), first(r.barred - i + 1)), left);
}

float reduce_add(__m256 x) {
  float lanes[8];
  _mm256_storeu_ps(lanes, x);
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

template <Dtype D>
void sums_of(const Residual& r, int64_t begin, int64_t end, float* sums) {
  for (int64_t i = begin; i < end; i += kResidualTile) {
    const int64_t last = end - i < kResidualTile ? end : i + kResidualTile;
    __m256 even = _mm256_setzero_ps();
    __m256 odd = _mm256_setzero_ps();
    int64_t j = i;
    for (; j + 16 <= last; j += 16) {
      even = _mm256_add_ps(even, weight<D>(r, j, 8));
      odd = _mm256_add_ps(odd, weight<D>(r, j + 8, 8));
    }
    for (; j < last; j += 8) even = _mm256_add_ps(even, weight<D>(r, j, last - j < 8 ? last - j : 8));
    *sums++ = reduce_add(_mm256_add_ps(even, odd));
  }
}

template <Dtype D>
void weights_of(const Residual& r, int64_t begin, int64_t end, float* weights) {
  for (int64_t i = begin; i < end; i += 8) {
    const int64_t n = end - i < 8 ? end - i : 8;
    float buffer[8];
    _mm256_storeu_ps(buffer, weight<D>(r, i, n));
    memcpy(weights + (i - begin), buffer, n * sizeof(float));
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

}  // namespace personafast::avx2
