// pack_mask and unpack_mask in plain C++, bit by bit.

#include "kernels.h"

namespace personafast::scalar {

void pack_mask_rows(const MaskBitsArgs& a, int64_t begin, int64_t end) {
  const int64_t words = (a.columns + 31) / 32;
  for (int64_t o = begin; o < end; ++o) {
    const uint8_t* from = static_cast<const uint8_t*>(a.from) + o * a.from_stride;
    uint32_t* to = static_cast<uint32_t*>(a.to) + o * words;
    for (int64_t w = 0; w < words; ++w) {
      const int64_t n = a.columns - 32 * w < 32 ? a.columns - 32 * w : 32;
      uint32_t word = 0;
      for (int64_t j = 0; j < n; ++j) word |= static_cast<uint32_t>(from[32 * w + j] != 0) << j;
      to[w] = word;
    }
  }
}

void unpack_mask_rows(const MaskBitsArgs& a, int64_t begin, int64_t end) {
  for (int64_t o = begin; o < end; ++o) {
    const uint32_t* from = static_cast<const uint32_t*>(a.from) + o * a.from_stride;
    uint8_t* to = static_cast<uint8_t*>(a.to) + o * a.columns;
    for (int64_t i = 0; i < a.columns; ++i) to[i] = from[i / 32] >> (i % 32) & 1u;
  }
}

}  // namespace personafast::scalar
