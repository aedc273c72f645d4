#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "personafast/dtype.h"

// Loads of the AVX-512 units. They have internal linkage, so no other unit can be given this copy.
namespace personafast::avx512 {
namespace {

// Elements i to i + 15 in fp32, zero where m is not set.
template <Dtype D>
inline __m512 load(const void* base, int64_t i, __mmask16 m) {
  if constexpr (D == Dtype::f32) {
    return _mm512_maskz_loadu_ps(m, static_cast<const float*>(base) + i);
  } else {
    const __m256i half = _mm256_maskz_loadu_epi16(m, static_cast<const uint16_t*>(base) + i);
    if constexpr (D == Dtype::f16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
}

// Which of the 16 elements from `left` before the end exist.
inline __mmask16 first(int64_t left) { return left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1); }

}  // namespace
}  // namespace personafast::avx512
