// aggregate_logits in plain C++, and the shape of the two others.

#include "kernels.h"
#include "scalar_float.h"
#include "scalar_math.h"

namespace personafast::scalar {
namespace {

constexpr float kInfinity = __builtin_inff();

float larger(float value, float max) {
  if (value != value || max != max) return __builtin_nanf("");
  return value > max ? value : max;
}

// Sum of exp(x - max); max is finite.
template <Dtype D>
float sum_exp(const void* x, int64_t begin, int64_t end, float max) {
  // A block has up to 4096 terms: one sum of fp32 would lose what a vector of sums does not.
  double sum = 0.0;
  for (int64_t i = begin; i < end; ++i) sum += exp_ps(load<D>(x, i) - max);
  return static_cast<float>(sum);
}

template <Dtype D>
void max_of_tiles(const void* x, int64_t begin, int64_t end, float* maxima) {
  for (int64_t i = begin; i < end; i += kLogitsTile) {
    const int64_t last = end - i < kLogitsTile ? end : i + kLogitsTile;
    float max = -kInfinity;
    for (int64_t j = i; j < last; ++j) max = larger(load<D>(x, j), max);
    *maxima++ = max;
  }
}

template <Dtype D>
float geometric(const LogitsBlend& b, int64_t i, bool* kept) {
  float target = 0.0f;
  bool barred = false;
  for (int64_t n = 0; n < b.count; ++n) {
    const LogitsMember& member = b.members[n];
    const float x = load<D>(member.logits, i) - member.shift;
    target += member.weight * x;
    barred |= x == -kInfinity;
    *kept |= x >= member.floor;
  }
  return barred ? -kInfinity : target;
}

template <Dtype D>
float mixture(const LogitsBlend& b, int64_t i, bool* kept) {
  // Finite, so that a token no member can produce is exp(-inf) and not exp(NaN).
  float top = -__FLT_MAX__;
  for (int64_t n = 0; n < b.count; ++n) {
    const LogitsMember& member = b.members[n];
    const float x = load<D>(member.logits, i) - member.shift;
    if (x + member.weight > top) top = x + member.weight;
    *kept |= x >= member.floor;
  }
  float sum = 0.0f;
  for (int64_t n = 0; n < b.count; ++n) {
    const LogitsMember& member = b.members[n];
    sum += exp_ps(load<D>(member.logits, i) - member.shift + member.weight - top);
  }
  return top + log_ps(sum);
}

template <Dtype D>
float blend(const LogitsBlend& b, int64_t begin, int64_t end) {
  float max = -kInfinity;
  for (int64_t i = begin; i < end; ++i) {
    bool kept = false;
    float target = b.mixture ? mixture<D>(b, i, &kept) : geometric<D>(b, i, &kept);
    // NaN is in no support, and stays.
    if (b.masked && !kept && target == target) target = -kInfinity;
    b.out[i] = target;
    max = larger(target, max);
  }
  return max;
}

}  // namespace

void logits_max(const void* logits, Dtype dtype, int64_t begin, int64_t end, float* maxima) {
  switch (dtype) {
    case Dtype::f32:
      return max_of_tiles<Dtype::f32>(logits, begin, end, maxima);
    case Dtype::bf16:
      return max_of_tiles<Dtype::bf16>(logits, begin, end, maxima);
    case Dtype::f16:
      return max_of_tiles<Dtype::f16>(logits, begin, end, maxima);
  }
}

void logits_sum_exp(const void* logits, Dtype dtype, int64_t begin, int64_t end, float max, float* sum) {
  switch (dtype) {
    case Dtype::f32:
      *sum = sum_exp<Dtype::f32>(logits, begin, end, max);
      return;
    case Dtype::bf16:
      *sum = sum_exp<Dtype::bf16>(logits, begin, end, max);
      return;
    case Dtype::f16:
      *sum = sum_exp<Dtype::f16>(logits, begin, end, max);
      return;
  }
}

void logits_blend(const LogitsBlend& b, int64_t begin, int64_t end, float* max) {
  switch (b.dtype) {
    case Dtype::f32:
      *max = blend<Dtype::f32>(b, begin, end);
      return;
    case Dtype::bf16:
      *max = blend<Dtype::bf16>(b, begin, end);
      return;
    case Dtype::f16:
      *max = blend<Dtype::f16>(b, begin, end);
      return;
  }
}

void logits_shift(float* out, int64_t begin, int64_t end, float norm) {
  for (int64_t i = begin; i < end; ++i) out[i] -= norm;
}

}  // namespace personafast::scalar
