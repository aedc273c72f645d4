#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "personafast/dtype.h"

// 32 columns of a row in fp32, for the AVX-512 units alone. Multiply and add stay apart and are rounded apart.
namespace personafast::avx512 {
namespace {

struct Columns {
  __m512 part[2];  // columns 0 to 15, 16 to 31
};

inline Columns all(float value) { return {{_mm512_set1_ps(value), _mm512_set1_ps(value)}}; }

inline Columns operator+(Columns a, Columns b) {
  return {{_mm512_add_ps(a.part[0], b.part[0]), _mm512_add_ps(a.part[1], b.part[1])}};
}

inline Columns operator*(Columns a, Columns b) {
  return {{_mm512_mul_ps(a.part[0], b.part[0]), _mm512_mul_ps(a.part[1], b.part[1])}};
}

// Column l + n is added to column l for n = 16, 8, 4, 2, 1: the same order in every instruction set.
inline float total(Columns c) {
  const __m512 by16 = _mm512_add_ps(c.part[0], c.part[1]);
  const __m256 by8 = _mm256_add_ps(_mm512_castps512_ps256(by16), _mm512_extractf32x8_ps(by16, 1));
  const __m128 by4 = _mm_add_ps(_mm256_castps256_ps128(by8), _mm256_extractf128_ps(by8, 1));
  const __m128 by2 = _mm_add_ps(by4, _mm_movehl_ps(by4, by4));
  return _mm_cvtss_f32(_mm_add_ss(by2, _mm_movehdup_ps(by2)));
}

// The first n of 32.
inline __mmask32 first(int64_t n) { return n >= 32 ? 0xffffffffu : (1u << n) - 1u; }

template <Dtype D>
Columns widen(__m512i halves) {
  const __m256i low = _mm512_castsi512_si256(halves);
  const __m256i high = _mm512_extracti64x4_epi64(halves, 1);
  if constexpr (D == Dtype::f16) return {{_mm512_cvtph_ps(low), _mm512_cvtph_ps(high)}};
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(low), 16)),
           _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16))}};
}

// Round to nearest even in integers.
inline __m256i to_bf16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
}

template <Dtype D>
__m512i narrow(Columns c) {
  __m256i low, high;
  if constexpr (D == Dtype::f16) {
    low = _mm512_cvtps_ph(c.part[0], _MM_FROUND_TO_NEAREST_INT);
    high = _mm512_cvtps_ph(c.part[1], _MM_FROUND_TO_NEAREST_INT);
  } else {
    // The instruction rounds as the integers do, but takes a denormal number for zero.
    constexpr int kDenormal = 0x20;
    const __mmask16 denormal =
        _kor_mask16(_mm512_fpclass_ps_mask(c.part[0], kDenormal), _mm512_fpclass_ps_mask(c.part[1], kDenormal));
    if (__builtin_expect(denormal == 0, 1)) return (__m512i)_mm512_cvtne2ps_pbh(c.part[1], c.part[0]);
    low = to_bf16(c.part[0]);
    high = to_bf16(c.part[1]);
  }
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// Columns i to i + n - 1 of a row, zeros after them; n is at most 32.
template <Dtype D>
Columns load(const void* base, int64_t i, int64_t n) {
  if constexpr (D == Dtype::f32) {
    const float* from = static_cast<const float*>(base) + i;
    if (n == 32) return {{_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16)}};
    return {{_mm512_maskz_loadu_ps(static_cast<__mmask16>(first(n)), from),
             _mm512_maskz_loadu_ps(static_cast<__mmask16>(first(n) >> 16), from + 16)}};
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(base) + i;
    return widen<D>(n == 32 ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(first(n), from));
  }
}

// Returns what it has stored, rounding included. Whole stores where possible: masked ones of 16-bit elements are slow.
template <Dtype D>
Columns store(void* base, int64_t i, int64_t n, Columns c) {
  if constexpr (D == Dtype::f32) {
    float* to = static_cast<float*>(base) + i;
    if (n == 32) {
      _mm512_storeu_ps(to, c.part[0]);
      _mm512_storeu_ps(to + 16, c.part[1]);
    } else {
      _mm512_mask_storeu_ps(to, static_cast<__mmask16>(first(n)), c.part[0]);
      _mm512_mask_storeu_ps(to + 16, static_cast<__mmask16>(first(n) >> 16), c.part[1]);
    }
    return c;
  } else {
    uint16_t* to = static_cast<uint16_t*>(base) + i;
    const __m512i halves = narrow<D>(c);
    if (n == 32) {
      _mm512_storeu_si512(to, halves);
    } else {
      _mm512_mask_storeu_epi16(to, first(n), halves);
    }
    return widen<D>(halves);
  }
}

// Asks for columns i to i + 31 of a row that is read next. Into L2: L1 holds the row that is being written.
template <Dtype D>
void prefetch(const void* base, int64_t i) {
  const char* line = static_cast<const char*>(base) + i * (D == Dtype::f32 ? 4 : 2);
  _mm_prefetch(line, _MM_HINT_T1);
  if constexpr (D == Dtype::f32) _mm_prefetch(line + 64, _MM_HINT_T1);
}

// Calls step(i, n) for columns i to i + n - 1, 32 at a time and then what is left.
template <class Step>
void for_columns(int64_t width, Step step) {
  int64_t i = 0;
  for (; i + 32 <= width; i += 32) step(i, static_cast<int64_t>(32));
  if (i < width) step(i, width - i);
}

}  // namespace
}  // namespace personafast::avx512
