// inject: 16 columns at a time, memory bound. Multiply and add stay apart, so that every ISA and the torch reference
// give the same bits.

#include <immintrin.h>

#include "kernels.h"

namespace personafast::avx512 {
namespace {

template <Dtype D>
__m512 load(const void* base, int64_t i, __mmask16 m) {
  if constexpr (D == Dtype::f32) {
    return _mm512_maskz_loadu_ps(m, static_cast<const float*>(base) + i);
  } else {
    const __m256i half = _mm256_maskz_loadu_epi16(m, static_cast<const uint16_t*>(base) + i);
    if constexpr (D == Dtype::f16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
}

// Round to nearest even in integers: cvtneps_pbh would flush denormals.
__m256i to_bf16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
}

template <Dtype D>
void store(void* base, int64_t i, __mmask16 m, __m512 value) {
  if constexpr (D == Dtype::f32) {
    _mm512_mask_storeu_ps(static_cast<float*>(base) + i, m, value);
  } else {
    const __m256i half = D == Dtype::f16 ? _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT) : to_bf16(value);
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(base) + i, m, half);
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
    const __m512 scale = _mm512_set1_ps(a.scale ? a.scale[t] : 1.0f);
    for (int64_t i = 0; i < a.width; i += 16) {
      const int64_t left = a.width - i;
      const __mmask16 m = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
      const __m512 added = _mm512_mul_ps(load<B>(bank, i, m), scale);
      store<H>(hidden, i, m, _mm512_add_ps(load<H>(hidden, i, m), added));
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

}  // namespace personafast::avx512
