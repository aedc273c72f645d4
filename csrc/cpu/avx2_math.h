#pragma once

#include <immintrin.h>

// exp and log of the AVX2 units: at most 1.02 ulp from the exact value, over the whole range; expm1 and log1p: at most
// 1.6 ulp. They have internal linkage, so no other unit can be given this copy.
namespace personafast::avx2 {
namespace {

// x = n ln 2 + r, n an integer and |r| <= ln 2 / 2; y = e^r - 1 = r + r^2 q(r) with q by Remez' algorithm. 2^n is the
// product of two factors, each a normal number: of a product with both the first is exact, the second rounds denormals
// once.
struct Exponential {
  __m256 y, first, second;
};

inline Exponential reduce_exp(__m256 x) {
  // Of an operand that is NaN max and min return the second.
  x = _mm256_min_ps(_mm256_set1_ps(89.0f), _mm256_max_ps(_mm256_set1_ps(-104.0f), x));
  const __m256 n =
      _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(0x1.715476p+0f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  // ln 2 in two parts, the first short enough for n times it to be exact.
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0x1.62e4p-1f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0x1.7f7d1cp-20f), r);
  __m256 q = _mm256_set1_ps(0x1.6a2436p-10f);
  q = _mm256_fmadd_ps(q, r, _mm256_set1_ps(0x1.1239e2p-7f));
  q = _mm256_fmadd_ps(q, r, _mm256_set1_ps(0x1.5558f2p-5f));
  q = _mm256_fmadd_ps(q, r, _mm256_set1_ps(0x1.555492p-3f));
  q = _mm256_fmadd_ps(q, r, _mm256_set1_ps(0x1.fffffcp-2f));
  const __m256i whole = _mm256_cvtps_epi32(n);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i second = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23);
  return {_mm256_fmadd_ps(_mm256_mul_ps(r, r), q, r), _mm256_castsi256_ps(first), _mm256_castsi256_ps(second)};
}

// e^x = 2^n e^r. -inf gives 0, what lies below the least denormal too, NaN stays.
inline __m256 exp_ps(__m256 x) {
  const Exponential e = reduce_exp(x);
  return _mm256_mul_ps(_mm256_mul_ps(_mm256_add_ps(e.y, _mm256_set1_ps(1.0f)), e.first), e.second);
}

// e^x - 1 = 2^n y + (2^n - 1), for x up to 88.
inline __m256 expm1_ps(__m256 x) {
  const Exponential e = reduce_exp(x);
  const __m256 less = _mm256_sub_ps(_mm256_mul_ps(e.first, e.second), _mm256_set1_ps(1.0f));
  return _mm256_add_ps(_mm256_mul_ps(_mm256_mul_ps(e.y, e.first), e.second), less);
}

// e ln 2 + log(1 + t), t in [-0.25, 0.5), where log(1 + t) = t - t^2 / 2 + t^3 q(t) with q by Remez' algorithm.
inline __m256 log_of(__m256 e, __m256 t) {
  const __m256 t2 = _mm256_mul_ps(t, t);
  __m256 q = _mm256_set1_ps(-0x1.7140acp-5f);
  q = _mm256_fmadd_ps(q, t, _mm256_set1_ps(0x1.ac90b6p-4f));
  q = _mm256_fmadd_ps(q, t, _mm256_set1_ps(-0x1.0d8a8cp-3f));
  q = _mm256_fmadd_ps(q, t, _mm256_set1_ps(0x1.28847cp-3f));
  q = _mm256_fmadd_ps(q, t, _mm256_set1_ps(-0x1.54efdcp-3f));
  q = _mm256_fmadd_ps(q, t, _mm256_set1_ps(0x1.9969b0p-3f));
  q = _mm256_fmadd_ps(q, t, _mm256_set1_ps(-0x1.000040p-2f));
  q = _mm256_fmadd_ps(q, t, _mm256_set1_ps(0x1.5555a4p-2f));
  __m256 y = _mm256_mul_ps(_mm256_mul_ps(t2, t), q);
  y = _mm256_fmadd_ps(e, _mm256_set1_ps(0x1.7f7d1cp-20f), y);
  y = _mm256_fnmadd_ps(t2, _mm256_set1_ps(0.5f), y);
  return _mm256_fmadd_ps(e, _mm256_set1_ps(0x1.62e4p-1f), _mm256_add_ps(t, y));
}

// log x = e ln 2 + log m, m in [0.75, 1.5). 0 gives -inf, what is negative NaN; NaN stays.
inline __m256 log_ps(__m256 x) {
  const __m256 denormal = _mm256_cmp_ps(x, _mm256_set1_ps(0x1p-126f), _CMP_LT_OQ);
  const __m256i bits = _mm256_castps_si256(_mm256_blendv_ps(x, _mm256_mul_ps(x, _mm256_set1_ps(0x1p23f)), denormal));
  const __m256i low = _mm256_set1_epi32(0x3f400000);  // 0.75
  const __m256i shift = _mm256_srai_epi32(_mm256_sub_epi32(bits, low), 23);
  const __m256 m = _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(shift, 23)));
  const __m256 e = _mm256_sub_ps(_mm256_cvtepi32_ps(shift), _mm256_and_ps(denormal, _mm256_set1_ps(23.0f)));
  __m256 y = log_of(e, _mm256_sub_ps(m, _mm256_set1_ps(1.0f)));
  const __m256 infinity = _mm256_set1_ps(__builtin_inff());
  const __m256 zero = _mm256_setzero_ps();
  // What has no such e and m: infinity and NaN are their own logarithms.
  y = _mm256_blendv_ps(y, x, _mm256_cmp_ps(x, infinity, _CMP_NLT_UQ));
  y = _mm256_blendv_ps(y, _mm256_sub_ps(zero, infinity), _mm256_cmp_ps(x, zero, _CMP_EQ_OQ));
  return _mm256_blendv_ps(y, _mm256_set1_ps(__builtin_nanf("")), _mm256_cmp_ps(x, zero, _CMP_LT_OQ));
}

// log(1 + x), for x from -0.25 to 1; NaN stays.
inline __m256 log1p_ps(__m256 x) {
  const __m256 half = _mm256_set1_ps(0.5f);
  const __m256 upper = _mm256_cmp_ps(x, half, _CMP_GE_OQ);
  // Of 1.5 and more the half is taken: (1 + x) / 2 = 1 + (x - 1) / 2, exact.
  const __m256 t = _mm256_blendv_ps(x, _mm256_fmsub_ps(x, half, half), upper);
  return log_of(_mm256_and_ps(upper, _mm256_set1_ps(1.0f)), t);
}

}  // namespace
}  // namespace personafast::avx2
