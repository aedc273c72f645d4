#pragma once

#include <stdint.h>

namespace personafast {

// Bit j of word w of a row stands for column 32 w + j, the least significant first; bits beyond the columns are 0 in
// what is packed and ignored in what is unpacked.
struct MaskBitsArgs {
  const void* from;     // pack: bytes [rows, columns], 0 or not; unpack: words [rows, ceil(columns / 32)]
  int64_t from_stride;  // elements from one row to the next
  void* to;             // the other, without gaps between the rows
  int64_t rows;
  int64_t columns;
};

// int32_t words from bytes; threads split the rows.
void pack_mask_cpu(const MaskBitsArgs& args, int threads);

// Bytes of 0 and 1 from int32_t words; threads split the rows.
void unpack_mask_cpu(const MaskBitsArgs& args, int threads);

}  // namespace personafast
