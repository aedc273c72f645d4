#pragma once

#include <stdint.h>

#include "personafast/dtype.h"

namespace personafast {

// out[t, o] = sum_i weight[o, i] * g(t, o, i) * x[t, i] + bias[o], summed in fp32 and rounded once, where g is 1 at a
// set bit of masks[slots[t], o], gamma[slots[t]] at a clear one, and 1 everywhere for a slot of -1.
struct MaskedLinearArgs {
  void* out;      // [rows, outputs], dense
  const void* x;  // [rows, features]
  int64_t x_stride;
  const void* weight;  // [outputs, features]
  int64_t weight_stride;
  const int32_t* masks;  // [personas, outputs, ceil(features / 32)], dense, least significant bit first
  const int32_t* slots;  // [rows], or null for -1
  const float* gamma;    // [personas], or null for 0
  const void* bias;      // [outputs], or null
  int64_t rows;
  int64_t outputs;
  int64_t features;
  int64_t personas;
  Dtype dtype;  // of out, x, weight and bias
};

// Threads split the outputs, and a row is summed in the same order whatever else is in the batch: the result depends
// neither on `threads` nor on the other rows. Returns -1, or the first row whose slot is outside [-1, personas); then
// nothing has been written.
int64_t masked_linear_cpu(const MaskedLinearArgs& args, int threads);

// See personafast/cuda.h. A row whose slot is out of range takes the dense weight. A row's result does not depend on
// the other rows either.
int masked_linear_cuda(const MaskedLinearArgs& args, void* stream);

}  // namespace personafast
