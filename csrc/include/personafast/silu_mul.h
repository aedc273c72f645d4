#pragma once

#include <stdint.h>

#include "personafast/dtype.h"

namespace personafast {

// out[i] = round(round(gate[i] / (1 + exp(-gate[i]))) * up[i]), where round() is to `dtype` and all else is fp32: the
// two roundings of the gated MLP (SwiGLU, arXiv 2002.05202) that most decoders of transformers have.
struct SiluMulArgs {
  void* out;
  const void* gate;
  const void* up;
  int64_t count;
  Dtype dtype;
};

void silu_mul_cpu(const SiluMulArgs& args, int threads);

}  // namespace personafast
