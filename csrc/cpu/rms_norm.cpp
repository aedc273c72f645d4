// rms_norm in plain C++ on one thread: a few rows of a few thousand numbers, of which the call costs more than the
// arithmetic. A row is summed in 32 lanes, whatever else is in the batch.

#include "personafast/rms_norm.h"

#include <math.h>

#include "scalar_float.h"

namespace personafast {
namespace {

using scalar::load;
using scalar::store;

template <Dtype D>
float rounded(float value) {
  if constexpr (D == Dtype::f32) return value;
  uint16_t half;
  store<D>(&half, 0, value);
  return load<D>(&half, 0);
}

template <Dtype D>
void rows(const RmsNormArgs& a) {
  constexpr int64_t kBytes = D == Dtype::f32 ? 4 : 2;
  for (int64_t t = 0; t < a.rows; ++t) {
    const void* x = static_cast<const char*>(a.x) + t * a.width * kBytes;
    void* out = static_cast<char*>(a.out) + t * a.width * kBytes;
    float lanes[32] = {};
    int64_t i = 0;
    for (; i + 32 <= a.width; i += 32) {
      for (int64_t j = 0; j < 32; ++j) {
        const float value = load<D>(x, i + j);
        lanes[j] += value * value;
      }
    }
    for (int64_t j = 0; i + j < a.width; ++j) {
      const float value = load<D>(x, i + j);
      lanes[j] += value * value;
    }
    const float scale = 1.0f / sqrtf(scalar::pairwise(lanes) / static_cast<float>(a.width) + a.eps);
    for (i = 0; i < a.width; ++i) {
      store<D>(out, i, load<D>(a.weight, i) * rounded<D>(load<D>(x, i) * scale));
    }
  }
}

}  // namespace

void rms_norm_cpu(const RmsNormArgs& args) {
  switch (args.dtype) {
    case Dtype::f32:
      return rows<Dtype::f32>(args);
    case Dtype::bf16:
      return rows<Dtype::bf16>(args);
    case Dtype::f16:
      return rows<Dtype::f16>(args);
  }
}

}  // namespace personafast
