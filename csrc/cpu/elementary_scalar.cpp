// exp, log, expm1 and log1p in plain C++.

#include "kernels.h"
#include "scalar_math.h"

namespace personafast::scalar {

void exp_each(const float* x, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = exp_ps(x[i]);
}

void expm1_each(const float* x, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = expm1_ps(x[i]);
}

void log1p_each(const float* x, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = log1p_ps(x[i]);
}

void log_each(const float* x, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = log_ps(x[i]);
}

}  // namespace personafast::scalar
