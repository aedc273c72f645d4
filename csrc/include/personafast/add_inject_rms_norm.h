#pragma once

#include <stdint.h>

#include "personafast/dtype.h"

namespace personafast {

// residual_out[t, :] = (update[t, :] + residual[t, :]) + scale[t] * bank[slots[t], :], in fp32, rounded once to dtype;
// normed[t, :] = residual_out[t, :] / sqrt(mean(residual_out[t, :]^2) + eps) * weight, in fp32 from the rounded
// residual_out, rounded once to dtype. A slot of -1 adds nothing from the bank.
struct AddInjectRmsNormArgs {
  void* normed;        // [rows, width] of dtype, dense; may not overlap an input
  void* residual_out;  // the same
  const void* update;  // [rows, width] of dtype
  int64_t update_stride;
  const void* residual;  // [rows, width] of dtype
  int64_t residual_stride;
  Dtype dtype;
  const void* bank;  // [bank_rows, width] of bank_dtype
  int64_t bank_stride;
  Dtype bank_dtype;      // dtype or f32
  const int32_t* slots;  // [rows]
  const float* scale;    // [rows], or null for 1
  const void* weight;    // [width] of weight_dtype
  Dtype weight_dtype;    // dtype or f32
  float eps;
  int64_t rows;
  int64_t width;
  int64_t bank_rows;
};

// Returns -1, or the first row whose slot is outside [-1, bank_rows); then nothing has been written.
int64_t add_inject_rms_norm_cpu(const AddInjectRmsNormArgs& args, int threads);

// See personafast/cuda.h.
int add_inject_rms_norm_cuda(const AddInjectRmsNormArgs& args, void* stream);

}  // namespace personafast
