// The residual of verify_draft in plain C++.

#include "kernels.h"
#include "scalar_float.h"
#include "scalar_math.h"

namespace personafast::scalar {
namespace {

template <Dtype D>
float weight(const Residual& r, int64_t i) {
  if (i == r.barred) return 0.0f;
  float left = r.scale * exp_ps(load<D>(r.target, i));
  if (r.draft) left -= exp_ps(load<D>(r.draft, i));
  return left < 0.0f ? 0.0f : left;
}

template <Dtype D>
void sums_of(const Residual& r, int64_t begin, int64_t end, float* sums) {
  for (int64_t i = begin; i < end; i += kResidualTile) {
    float sum = 0.0f;
    for (int64_t j = i; j < (end - i < kResidualTile ? end : i + kResidualTile); ++j) sum += weight<D>(r, j);
    *sums++ = sum;
  }
}

template <Dtype D>
void weights_of(const Residual& r, int64_t begin, int64_t end, float* weights) {
  for (int64_t i = begin; i < end; ++i) *weights++ = weight<D>(r, i);
}

}  // namespace

void residual_sums(const Residual& r, int64_t begin, int64_t end, float* sums) {
  switch (r.dtype) {
    case Dtype::f32:
      return sums_of<Dtype::f32>(r, begin, end, sums);
    case Dtype::bf16:
      return sums_of<Dtype::bf16>(r, begin, end, sums);
    case Dtype::f16:
      return sums_of<Dtype::f16>(r, begin, end, sums);
  }
}

void residual_weights(const Residual& r, int64_t begin, int64_t end, float* weights) {
  switch (r.dtype) {
    case Dtype::f32:
      return weights_of<Dtype::f32>(r, begin, end, weights);
    case Dtype::bf16:
      return weights_of<Dtype::bf16>(r, begin, end, weights);
    case Dtype::f16:
      return weights_of<Dtype::f16>(r, begin, end, weights);
  }
}

}  // namespace personafast::scalar
