// inject, 8 columns at a time. Multiply and add stay apart, so that every ISA and the torch reference give the same
// bits.

#include <immintrin.h>
#include <string.h>

#include "kernels.h"

namespace personafast::avx2 {
namespace {

// Columns i to i + n - 1, zeros after them; n is at most 8.
template <Dtype D>
__m256 load(const void* base, int64_t i, int64_t n) {
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

__m128i to_bf16(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

template <Dtype D>
void store(void* base, int64_t i, int64_t n, __m256 value) {
  if constexpr (D == Dtype::f32) {
    float* to = static_cast<float*>(base) + i;
    if (n == 8) return _mm256_storeu_ps(to, value);
    float buffer[8];
    _mm256_storeu_ps(buffer, value);
    memcpy(to, buffer, n * 4);
  } else {
    uint16_t* to = static_cast<uint16_t*>(base) + i;
    const __m128i half = D == Dtype::f16 ? _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT) : to_bf16(value);
    if (n == 8) return _mm_storeu_si128(reinterpret_cast<__m128i*>(to), half);
    uint16_t buffer[8];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(buffer), half);
    memcpy(to, buffer, n * 2);
  }
}

template <Dtype H, Dtype B>
void rows(const InjectArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t kHiddenBytes = H == Dtype::f32 ? 4 : 2;
  constexpr int64_t kBankBytes = B == Dtype::f32 ? 4 : 2;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t slot = a.slots[t];
    if (slot < 0) continue;
    char* hidden = static_cast<char*>(a.hidden) + t * a.hidden_stride * kHiddenBytes;
    const char* bank = static_cast<const char*>(a.bank) + slot * a.bank_stride * kBankBytes;
    const __m256 scale = _mm256_set1_ps(a.scale ? a.scale[t] : 1.0f);
    for (int64_t i = 0; i < a.width; i += 8) {
      const int64_t n = a.width - i < 8 ? a.width - i : 8;
      const __m256 added = _mm256_mul_ps(load<B>(bank, i, n), scale);
      store<H>(hidden, i, n, _mm256_add_ps(load<H>(hidden, i, n), added));
    }
  }
}

}  // namespace

void inject_rows(const InjectArgs& a, int64_t begin, int64_t end) {
  const bool wide = a.bank_dtype == Dtype::f32;
  switch (a.hidden_dtype) {
    case Dtype::f32:
      return rows<Dtype::f32, Dtype::f32>(a, begin, end);
    case Dtype::bf16:
      return wide ? rows<Dtype::bf16, Dtype::f32>(a, begin, end) : rows<Dtype::bf16, Dtype::bf16>(a, begin, end);
    case Dtype::f16:
      return wide ? rows<Dtype::f16, Dtype::f32>(a, begin, end) : rows<Dtype::f16, Dtype::f16>(a, begin, end);
  }
}

}  // namespace personafast::avx2
