#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "personafast/dtype.h"

// Loads of the AVX2 units. They have internal linkage, so no other unit can be given this copy.
namespace personafast::avx2 {
namespace {

// Elements i to i + n - 1 in fp32, zero after them; n is at most 8.
template <Dtype D>
inline __m256 load(const void* base, int64_t i, int64_t n) {
  if constexpr (D == Dtype::f32) {
    const float* from = static_cast<const float*>(base) + i;
    if (n == 8) return _mm256_loadu_ps(from);
    float buffer[8] = {};
    memcpy(buffer, from, n * 4);
    return _mm256_loadu_ps(buffer);
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(base) + i;
    uint16_t buffer[8] = {};
    if (n < 8) {
      memcpy(buffer, from, n * 2);
      from = buffer;
    }
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    if constexpr (D == Dtype::f16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
}

// All bits of the first n lanes.
inline __m256 first(int64_t n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane));
}

}  // namespace
}  // namespace personafast::avx2
