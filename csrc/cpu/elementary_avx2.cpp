// exp, log, expm1 and log1p, 8 at a time.

#include <string.h>

#include "avx2_math.h"
#include "kernels.h"

namespace personafast::avx2 {
namespace {

template <class Function>
void each(const float* x, float* out, int64_t count, Function function) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) _mm256_storeu_ps(out + i, function(_mm256_loadu_ps(x + i)));
  if (i < count) {
    float buffer[8] = {};
    memcpy(buffer, x + i, (count - i) * sizeof(float));
    _mm256_storeu_ps(buffer, function(_mm256_loadu_ps(buffer)));
    memcpy(out + i, buffer, (count - i) * sizeof(float));
  }
}

}  // namespace

void exp_each(const float* x, float* out, int64_t count) {
  each(x, out, count, [](__m256 value) { return exp_ps(value); });
}

void expm1_each(const float* x, float* out, int64_t count) {
  each(x, out, count, [](__m256 value) { return expm1_ps(value); });
}

void log1p_each(const float* x, float* out, int64_t count) {
  each(x, out, count, [](__m256 value) { return log1p_ps(value); });
}

void log_each(const float* x, float* out, int64_t count) {
  each(x, out, count, [](__m256 value) { return log_ps(value); });
}

}  // namespace personafast::avx2
