// exp, log, expm1 and log1p, 16 at a time.

#include "avx512_math.h"
#include "kernels.h"

namespace personafast::avx512 {
namespace {

template <class Function>
void each(const float* x, float* out, int64_t count, Function function) {
  for (int64_t i = 0; i < count; i += 16) {
    const int64_t left = count - i;
    const __mmask16 m = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
    _mm512_mask_storeu_ps(out + i, m, function(_mm512_maskz_loadu_ps(m, x + i)));
  }
}

}  // namespace

void exp_each(const float* x, float* out, int64_t count) {
  each(x, out, count, [](__m512 value) { return exp_ps(value); });
}

void expm1_each(const float* x, float* out, int64_t count) {
  each(x, out, count, [](__m512 value) { return expm1_ps(value); });
}

void log1p_each(const float* x, float* out, int64_t count) {
  each(x, out, count, [](__m512 value) { return log1p_ps(value); });
}

void log_each(const float* x, float* out, int64_t count) {
  each(x, out, count, [](__m512 value) { return log_ps(value); });
}

}  // namespace personafast::avx512
