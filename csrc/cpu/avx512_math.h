#pragma once

#include <immintrin.h>

// exp and log of the AVX-512 units: at most 1.02 ulp from the exact value, over the whole range; expm1 and log1p: at
// most 1.6 ulp. They have internal linkage, so no other unit can be given this copy.
namespace personafast::avx512 {
namespace {

// x = n ln 2 + r, n an integer and |r| <= ln 2 / 2; y = e^r - 1 = r + r^2 q(r) with q by Remez' algorithm.
struct Exponential {
  __m512 n, y;
};

inline Exponential reduce_exp(__m512 x) {
  // Of an operand that is NaN max and min return the second.
  x = _mm512_min_ps(_mm512_set1_ps(89.0f), _mm512_max_ps(_mm512_set1_ps(-104.0f), x));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(0x1.715476p+0f)),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  // ln 2 in two parts, the first short enough for n times it to be exact.
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.62e4p-1f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.7f7d1cp-20f), r);
  __m512 q = _mm512_set1_ps(0x1.6a2436p-10f);
  q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0x1.1239e2p-7f));
  q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0x1.5558f2p-5f));
  q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0x1.555492p-3f));
  q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0x1.fffffcp-2f));
  return {n, _mm512_fmadd_ps(_mm512_mul_ps(r, r), q, r)};
}

// e^x = 2^n e^r. -inf gives 0, what lies below the least denormal too, NaN stays.
inline __m512 exp_ps(__m512 x) {
  const Exponential e = reduce_exp(x);
  return _mm512_scalef_ps(_mm512_add_ps(e.y, _mm512_set1_ps(1.0f)), e.n);
}

// e^x - 1 = 2^n y + (2^n - 1), for x up to 88.
inline __m512 expm1_ps(__m512 x) {
  const Exponential e = reduce_exp(x);
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_add_ps(_mm512_scalef_ps(e.y, e.n), _mm512_sub_ps(_mm512_scalef_ps(one, e.n), one));
}

// e ln 2 + log(1 + t), t in [-0.25, 0.5), where log(1 + t) = t - t^2 / 2 + t^3 q(t) with q by Remez' algorithm.
inline __m512 log_of(__m512 e, __m512 t) {
  const __m512 t2 = _mm512_mul_ps(t, t);
  __m512 q = _mm512_set1_ps(-0x1.7140acp-5f);
  q = _mm512_fmadd_ps(q, t, _mm512_set1_ps(0x1.ac90b6p-4f));
  q = _mm512_fmadd_ps(q, t, _mm512_set1_ps(-0x1.0d8a8cp-3f));
  q = _mm512_fmadd_ps(q, t, _mm512_set1_ps(0x1.28847cp-3f));
  q = _mm512_fmadd_ps(q, t, _mm512_set1_ps(-0x1.54efdcp-3f));
  q = _mm512_fmadd_ps(q, t, _mm512_set1_ps(0x1.9969b0p-3f));
  q = _mm512_fmadd_ps(q, t, _mm512_set1_ps(-0x1.000040p-2f));
  q = _mm512_fmadd_ps(q, t, _mm512_set1_ps(0x1.5555a4p-2f));
  __m512 y = _mm512_mul_ps(_mm512_mul_ps(t2, t), q);
  y = _mm512_fmadd_ps(e, _mm512_set1_ps(0x1.7f7d1cp-20f), y);
  y = _mm512_fnmadd_ps(t2, _mm512_set1_ps(0.5f), y);
  return _mm512_fmadd_ps(e, _mm512_set1_ps(0x1.62e4p-1f), _mm512_add_ps(t, y));
}

// log x = e ln 2 + log m, m in [0.75, 1.5). 0 gives -inf, what is negative NaN; NaN stays.
inline __m512 log_ps(__m512 x) {
  const __m512 m = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_nan);
  const __m512 one = _mm512_set1_ps(1.0f);
  __m512 e = _mm512_getexp_ps(x);
  e = _mm512_mask_add_ps(e, _mm512_cmp_ps_mask(m, one, _CMP_LT_OQ), e, one);
  return log_of(e, _mm512_sub_ps(m, one));
}

// log(1 + x), for x from -0.25 to 1; NaN stays.
inline __m512 log1p_ps(__m512 x) {
  const __m512 half = _mm512_set1_ps(0.5f);
  const __mmask16 upper = _mm512_cmp_ps_mask(x, half, _CMP_GE_OQ);
  // Of 1.5 and more the half is taken: (1 + x) / 2 = 1 + (x - 1) / 2, exact.
  const __m512 t = _mm512_mask_fmsub_ps(x, upper, half, half);
  return log_of(_mm512_maskz_mov_ps(upper, _mm512_set1_ps(1.0f)), t);
}

}  // namespace
}  // namespace personafast::avx512
