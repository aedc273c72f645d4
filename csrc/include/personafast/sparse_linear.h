#pragma once

#include <stdint.h>

#include "personafast/dtype.h"

namespace personafast {

// out[t, o] = sum_i w(o, i) x[t, i] + bias[o], summed in fp32 and rounded once. Of w only what the bitmap keeps is
// stored: the weights of output o begin at values[row_offsets[o]] and follow each other in the order of its set bits.
struct SparseLinearArgs {
  void* out;      // [rows, outputs], dense
  const void* x;  // [rows, features]
  int64_t x_stride;
  const void* values;          // [value_count]
  const int32_t* bitmap;       // [outputs, ceil(features / 32)], dense, least significant bit first
  const int64_t* row_offsets;  // [outputs + 1]
  const void* bias;            // [outputs], or null
  int64_t value_count;
  int64_t rows;
  int64_t outputs;
  int64_t features;
  Dtype dtype;  // of out, x, values and bias
};

// As masked_linear_cpu in what the result does not depend on; with AVX-512 it is the same bits. Bits beyond `features`
// are ignored. Returns -1, or the first output whose row_offsets lie outside [0, value_count] or fall; then nothing has
// been written. A bitmap that keeps more than its row has reads the next rows' values, zeros beyond the last.
int64_t sparse_linear_cpu(const SparseLinearArgs& args, int threads);

// See personafast/cuda.h. Offsets out of range are taken for the nearest that are not; of values that are not there
// zeros are taken. A row's result does not depend on the other rows, nor on the device.
int sparse_linear_cuda(const SparseLinearArgs& args, void* stream);

// values and row_offsets of the weights that `bitmap` keeps, in the layout of SparseLinearArgs: `fill` false counts
// into row_offsets, `fill` true copies, with row_offsets as the first call left them.
struct CompressArgs {
  const void* weight;  // [outputs, features]
  int64_t weight_stride;
  const int32_t* bitmap;
  int64_t* row_offsets;
  void* values;
  int64_t outputs;
  int64_t features;
  Dtype dtype;
};

void compress_cpu(const CompressArgs& args, bool fill);

}  // namespace personafast
