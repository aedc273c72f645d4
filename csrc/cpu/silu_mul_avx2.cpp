// silu_mul, 32 numbers at a time.

#include "avx2_columns.h"
#include "avx2_math.h"
#include "kernels.h"

namespace personafast::avx2 {
namespace {

inline Columns silu(Columns x) {
  const __m256 one = _mm256_set1_ps(1.0f);
  for (__m256& part : x.part) {
    const __m256 less = exp_ps(_mm256_sub_ps(_mm256_setzero_ps(), part));
    part = _mm256_div_ps(part, _mm256_add_ps(one, less));
  }
  return x;
}

template <Dtype D>
Columns rounded(Columns c) {
  if constexpr (D == Dtype::f32) return c;
  for (__m256& part : c.part) part = widen<D>(narrow<D>(part));
  return c;
}

template <Dtype D>
void each(const SiluMulArgs& a, int64_t begin, int64_t end) {
  for_columns(end - begin, [&](int64_t i, int64_t n) {
    const Columns gate = rounded<D>(silu(load<D>(a.gate, begin + i, n)));
    store<D>(a.out, begin + i, n, gate * load<D>(a.up, begin + i, n));
  });
}

}  // namespace

void silu_mul_each(const SiluMulArgs& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case Dtype::f32:
      return each<Dtype::f32>(a, begin, end);
    case Dtype::bf16:
      return each<Dtype::bf16>(a, begin, end);
    case Dtype::f16:
      return each<Dtype::f16>(a, begin, end);
  }
}

}  // namespace personafast::avx2
