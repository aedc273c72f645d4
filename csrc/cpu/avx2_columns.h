#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "personafast/dtype.h"

// 32 columns of a row in fp32, for the AVX2 units alone. Multiply and add stay apart and are rounded apart.
namespace personafast::avx2 {
namespace {

struct Columns {
  __m256 part[4];  // columns 0 to 7, 8 to 15, and so on
};

inline Columns all(float value) {
  const __m256 part = _mm256_set1_ps(value);
  return {{part, part, part, part}};
}

inline Columns operator+(Columns a, Columns b) {
  return {{_mm256_add_ps(a.part[0], b.part[0]), _mm256_add_ps(a.part[1], b.part[1]),
           _mm256_add_ps(a.part[2], b.part[2]), _mm256_add_ps(a.part[3], b.part[3])}};
}

inline Columns operator*(Columns a, Columns b) {
  return {{_mm256_mul_ps(a.part[0], b.part[0]), _mm256_mul_ps(a.part[1], b.part[1]),
           _mm256_mul_ps(a.part[2], b.part[2]), _mm256_mul_ps(a.part[3], b.part[3])}};
}

// Column l + n is added to column l for n = 16, 8, 4, 2, 1: the same order in every instruction set.
inline float total(Columns c) {
  const __m256 by8 = _mm256_add_ps(_mm256_add_ps(c.part[0], c.part[2]), _mm256_add_ps(c.part[1], c.part[3]));
  const __m128 by4 = _mm_add_ps(_mm256_castps256_ps128(by8), _mm256_extractf128_ps(by8, 1));
  const __m128 by2 = _mm_add_ps(by4, _mm_movehl_ps(by4, by4));
  return _mm_cvtss_f32(_mm_add_ss(by2, _mm_movehdup_ps(by2)));
}

template <Dtype D>
__m256 widen(__m128i halves) {
  if constexpr (D == Dtype::f16) return _mm256_cvtph_ps(halves);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

// Round to nearest even in integers.
inline __m128i to_bf16(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

template <Dtype D>
__m128i narrow(__m256 value) {
  if constexpr (D == Dtype::f16) return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
  return to_bf16(value);
}

// Columns i to i + n - 1 of a row, zeros after them; n is at most 32.
template <Dtype D>
Columns load(const void* base, int64_t i, int64_t n) {
  if constexpr (D == Dtype::f32) {
    const float* from = static_cast<const float*>(base) + i;
    float buffer[32] = {};
    if (n < 32) from = static_cast<const float*>(memcpy(buffer, from, n * 4));
    return {{_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8), _mm256_loadu_ps(from + 16), _mm256_loadu_ps(from + 24)}};
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(base) + i;
    uint16_t buffer[32] = {};
    if (n < 32) from = static_cast<const uint16_t*>(memcpy(buffer, from, n * 2));
    const __m128i* halves = reinterpret_cast<const __m128i*>(from);
    return {{widen<D>(_mm_loadu_si128(halves)), widen<D>(_mm_loadu_si128(halves + 1)),
             widen<D>(_mm_loadu_si128(halves + 2)), widen<D>(_mm_loadu_si128(halves + 3))}};
  }
}

// Returns what it has stored, rounding included.
template <Dtype D>
Columns store(void* base, int64_t i, int64_t n, Columns c) {
  if constexpr (D == Dtype::f32) {
    float* to = static_cast<float*>(base) + i;
    float buffer[32];
    float* from = n == 32 ? to : buffer;
    for (int part = 0; part < 4; ++part) _mm256_storeu_ps(from + 8 * part, c.part[part]);
    if (n < 32) memcpy(to, buffer, n * 4);
    return c;
  } else {
    uint16_t* to = static_cast<uint16_t*>(base) + i;
    uint16_t buffer[32];
    uint16_t* from = n == 32 ? to : buffer;
    Columns stored;
    for (int part = 0; part < 4; ++part) {
      const __m128i halves = narrow<D>(c.part[part]);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(from) + part, halves);
      stored.part[part] = widen<D>(halves);
    }
    if (n < 32) memcpy(to, buffer, n * 2);
    return stored;
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
}  // namespace personafast::avx2
