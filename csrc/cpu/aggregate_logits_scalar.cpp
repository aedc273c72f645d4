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
float product(const LogitsBlend& b, int64_t i, bool* kept) {
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

// weight + logits - shift of a token.
template <Dtype D>
float term(const LogitsMember& member, int64_t i) {
  return member.weight + (load<D>(member.logits, i) - member.shift);
}

template <Dtype D>
bool supports(const LogitsMember& member, int64_t i) {
  return load<D>(member.logits, i) - member.shift >= member.floor;
}

template <Dtype D>
float mixture(const LogitsBlend& b, int64_t i, bool* kept) {
  // Finite, so that a token no member can produce is exp(-inf) and not exp(NaN).
  float top = -__FLT_MAX__;
  for (int64_t n = 0; n < b.count; ++n) {
    const float y = term<D>(b.members[n], i);
    if (y > top) top = y;
    *kept |= supports<D>(b.members[n], i);
  }
  float sum = 0.0f, taken = 0.0f;
  for (int64_t n = 0; n < b.added; ++n) sum += exp_ps(term<D>(b.members[n], i) - top);
  for (int64_t n = b.added; n < b.count; ++n) taken += exp_ps(term<D>(b.members[n], i) - top);
  if (b.added < b.count) {
    const float rest = sum - taken;
    sum = rest <= sum * kCancelled ? 0.0f : rest;
  }
  return top + log_ps(sum);
}

template <Dtype D>
float extreme(const LogitsBlend& b, bool greatest, int64_t i, bool* kept) {
  float found = greatest ? -kInfinity : kInfinity;
  for (int64_t n = 0; n < b.count; ++n) {
    const float y = term<D>(b.members[n], i);
    if (greatest ? y > found : y < found) found = y;
    *kept |= supports<D>(b.members[n], i);
  }
  return found;
}

template <Dtype D>
float power(const LogitsBlend& b, int64_t i, bool* kept) {
  // The term that counts most.
  const float top = extreme<D>(b, b.p > 0.0f, i, kept);
  if (top == -kInfinity) return top;
  float sum = 0.0f, more = 0.0f;
  for (int64_t n = 0; n < b.count; ++n) more += b.members[n].share * expm1_ps(b.p * (term<D>(b.members[n], i) - top));
  if (more > -0.25f) return top + log1p_ps(more) / b.p;
  // Far from 1 the sum of what is added is the more exact one.
  for (int64_t n = 0; n < b.count; ++n) sum += b.members[n].share * exp_ps(b.p * (term<D>(b.members[n], i) - top));
  return top + log_ps(sum) / b.p;
}

template <Dtype D>
float jensen_shannon(const LogitsBlend& b, int64_t i, bool* kept) {
  const float y0 = term<D>(b.members[b.count - 1], i);
  float least = kInfinity, u = 0.0f;
  for (int64_t n = 0; n + 1 < b.count; ++n) {
    const float ratio = term<D>(b.members[n], i) - y0;
    if (ratio < least) least = ratio;
    // -log sigmoid(ratio) = log(1 + e^-ratio)
    const float small = log1p_ps(exp_ps(-fabsf(ratio)));
    u += b.members[n].share * (small - (ratio < 0.0f ? ratio : 0.0f));
    *kept |= supports<D>(b.members[n], i);
  }
  if (y0 == -kInfinity) return y0;
  // u is -log s, so log(s / (1 - s)) = -u - log(1 - e^-u).
  if (!(least > kHarmonicLimit)) return y0 + (-u - log_ps(-expm1_ps(-u)));
  // Where every ratio is so large that log s rounds to 0, it is their harmonic mean.
  float sum = 0.0f;
  for (int64_t n = 0; n + 1 < b.count; ++n) {
    sum += b.members[n].share * exp_ps(least - (term<D>(b.members[n], i) - y0));
  }
  return y0 + (least - log_ps(sum));
}

template <Dtype D>
float target_of(const LogitsBlend& b, int64_t i, bool* kept) {
  switch (b.rule) {
    case LogitsRule::product:
      return product<D>(b, i, kept);
    case LogitsRule::mixture:
      return mixture<D>(b, i, kept);
    case LogitsRule::power:
      return power<D>(b, i, kept);
    case LogitsRule::jensen_shannon:
      return jensen_shannon<D>(b, i, kept);
    case LogitsRule::least:
    case LogitsRule::greatest:
      return extreme<D>(b, b.rule == LogitsRule::greatest, i, kept);
  }
  return __builtin_nanf("");
}

template <Dtype D>
float blend(const LogitsBlend& b, int64_t begin, int64_t end) {
  float max = -kInfinity;
  for (int64_t i = begin; i < end; ++i) {
    bool kept = false;
    float target = target_of<D>(b, i, &kept);
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
