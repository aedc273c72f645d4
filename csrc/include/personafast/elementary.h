#pragma once

#include <stdint.h>

namespace personafast {

// out[i] = e^x[i] and out[i] = log x[i], at most 1.02 ulp from the exact value: -inf, denormals and NaN as in libm.
// What the operators use of exp and log, by itself.
void exp_cpu(const float* x, float* out, int64_t count);
void log_cpu(const float* x, float* out, int64_t count);

// Likewise e^x - 1 for x up to 88, and log(1 + x) for x from -0.25 to 1; at most 1.6 ulp from the exact value.
void expm1_cpu(const float* x, float* out, int64_t count);
void log1p_cpu(const float* x, float* out, int64_t count);

}  // namespace personafast
