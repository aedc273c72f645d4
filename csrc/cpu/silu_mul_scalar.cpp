// silu_mul in plain C++: the kernel of machines without AVX2, and the shape of the two others.

#include "kernels.h"
#include "scalar_float.h"
#include "scalar_math.h"

namespace personafast::scalar {
namespace {

template <Dtype D>
void each(const SiluMulArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const float gate = load<D>(a.gate, i);
    store<D>(a.out, i, gate / (1.0f + exp_ps(-gate)));
    store<D>(a.out, i, load<D>(a.out, i) * load<D>(a.up, i));
  }
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

}  // namespace personafast::scalar
