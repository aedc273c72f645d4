// silu_mul, 32 numbers at a time.

#include "avx512_columns.h"
#include "avx512_math.h"
#include "kernels.h"

namespace personafast::avx512 {
namespace {

inline Columns silu(Columns x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  for (__m512& part : x.part) {
    const __m512 less = exp_ps(_mm512_sub_ps(_mm512_setzero_ps(), part));
    part = _mm512_div_ps(part, _mm512_add_ps(one, less));
  }
  return x;
}

template <Dtype D>
Columns rounded(Columns c) {
  if constexpr (D == Dtype::f32) return c;
  return widen<D>(narrow<D>(c));
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

}  // namespace personafast::avx512
