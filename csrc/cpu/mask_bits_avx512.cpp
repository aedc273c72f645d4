// pack_mask and unpack_mask, 64 columns at a time: a mask register of 64 bytes is two words.

#include <immintrin.h>

#include "kernels.h"

namespace personafast::avx512 {

void pack_mask_rows(const MaskBitsArgs& a, int64_t begin, int64_t end) {
  const int64_t words = (a.columns + 31) / 32;
  for (int64_t o = begin; o < end; ++o) {
    const uint8_t* from = static_cast<const uint8_t*>(a.from) + o * a.from_stride;
    uint32_t* to = static_cast<uint32_t*>(a.to) + o * words;
    for (int64_t i = 0; i < a.columns; i += 64) {
      const int64_t left = a.columns - i;
      const __mmask64 exist = left >= 64 ? ~0ull : (1ull << left) - 1;
      const __m512i bytes = _mm512_maskz_loadu_epi8(exist, from + i);
      const uint64_t bits = _mm512_test_epi8_mask(bytes, bytes);
      to[i / 32] = static_cast<uint32_t>(bits);
      if (left > 32) to[i / 32 + 1] = static_cast<uint32_t>(bits >> 32);
    }
  }
}

void unpack_mask_rows(const MaskBitsArgs& a, int64_t begin, int64_t end) {
  for (int64_t o = begin; o < end; ++o) {
    const uint32_t* from = static_cast<const uint32_t*>(a.from) + o * a.from_stride;
    uint8_t* to = static_cast<uint8_t*>(a.to) + o * a.columns;
    for (int64_t i = 0; i < a.columns; i += 64) {
      const int64_t left = a.columns - i;
      const __mmask64 exist = left >= 64 ? ~0ull : (1ull << left) - 1;
      const uint64_t high = left > 32 ? from[i / 32 + 1] : 0;
      _mm512_mask_storeu_epi8(to + i, exist, _mm512_maskz_set1_epi8(high << 32 | from[i / 32], 1));
    }
  }
}

}  // namespace personafast::avx512
