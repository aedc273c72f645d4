// exp and log in plain C++.

#include "kernels.h"
#include "scalar_math.h"

namespace personafast::scalar {

void exp_each(const float* x, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = exp_ps(x[i]);
}

void log_each(const float* x, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = log_ps(x[i]);
}

}  // namespace personafast::scalar
