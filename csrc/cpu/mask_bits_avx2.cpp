// pack_mask and unpack_mask, 32 columns at a time: the signs of 32 bytes are a word.

#include <immintrin.h>
#include <string.h>

#include "kernels.h"

namespace personafast::avx2 {
namespace {

uint32_t pack(const uint8_t* from) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return ~static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(bytes, _mm256_setzero_si256())));
}

void unpack(uint32_t word, uint8_t* to) {
  // Byte j of the result gets the byte of the word that holds bit j, then that bit alone.
  const __m256i octet = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201));
  const __m256i octets = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(word)), octet);
  const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(octets, bit), bit);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_and_si256(set, _mm256_set1_epi8(1)));
}

}  // namespace

void pack_mask_rows(const MaskBitsArgs& a, int64_t begin, int64_t end) {
  const int64_t words = (a.columns + 31) / 32;
  const int64_t left = a.columns % 32;
  for (int64_t o = begin; o < end; ++o) {
    const uint8_t* from = static_cast<const uint8_t*>(a.from) + o * a.from_stride;
    uint32_t* to = static_cast<uint32_t*>(a.to) + o * words;
    for (int64_t w = 0; w < a.columns / 32; ++w) to[w] = pack(from + 32 * w);
    if (left > 0) {
      uint8_t buffer[32] = {};
      memcpy(buffer, from + 32 * (words - 1), left);
      to[words - 1] = pack(buffer);
    }
  }
}

void unpack_mask_rows(const MaskBitsArgs& a, int64_t begin, int64_t end) {
  const int64_t whole = a.columns / 32;
  const int64_t left = a.columns % 32;
  for (int64_t o = begin; o < end; ++o) {
    const uint32_t* from = static_cast<const uint32_t*>(a.from) + o * a.from_stride;
    uint8_t* to = static_cast<uint8_t*>(a.to) + o * a.columns;
    for (int64_t w = 0; w < whole; ++w) unpack(from[w], to + 32 * w);
    if (left > 0) {
      uint8_t buffer[32];
      unpack(from[whole], buffer);
      memcpy(to + 32 * whole, buffer, left);
    }
  }
}

}  // namespace personafast::avx2
