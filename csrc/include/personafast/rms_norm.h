#pragma once

#include <stdint.h>

#include "personafast/dtype.h"

namespace personafast {

// out[t] = round(weight * round(x[t] / sqrt(mean(x[t]^2) + eps))), where round() is to `dtype` and all else is fp32:
// the two roundings of the RMSNorm that most decoders of transformers have.
struct RmsNormArgs {
  void* out;      // [rows, width], dense
  const void* x;  // [rows, width], dense
  const void* weight;
  float eps;
  int64_t rows;
  int64_t width;
  Dtype dtype;
};

void rms_norm_cpu(const RmsNormArgs& args);

}  // namespace personafast
