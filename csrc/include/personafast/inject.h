#pragma once

#include <stdint.h>

#include "personafast/dtype.h"

namespace personafast {

// hidden[t, :] += scale[t] * bank[slots[t], :], rounded once from fp32. A slot of -1 leaves the row alone.
struct InjectArgs {
  void* hidden;           // [rows, width] of hidden_dtype
  int64_t hidden_stride;  // elements from one row to the next
  Dtype hidden_dtype;
  const void* bank;  // [bank_rows, width] of bank_dtype
  int64_t bank_stride;
  Dtype bank_dtype;      // hidden_dtype or f32
  const int32_t* slots;  // [rows]
  const float* scale;    // [rows], or null for 1
  int64_t rows;
  int64_t width;
  int64_t bank_rows;
};

// Returns -1, or the first row whose slot is outside [-1, bank_rows); then nothing has been written.
int64_t inject_cpu(const InjectArgs& args, int threads);

// See personafast/cuda.h.
int inject_cuda(const InjectArgs& args, void* stream);

}  // namespace personafast
