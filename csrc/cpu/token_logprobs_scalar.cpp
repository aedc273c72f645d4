// token_logprobs in plain C++: 32 partial sums a logit, as in masked_linear.

#include <math.h>

#include "kernels.h"
#include "scalar_float.h"

namespace personafast::scalar {
namespace {

template <Dtype D>
float dot(const void* word, const void* hidden, int64_t features) {
  float sums[32] = {};
  for (int64_t i = 0; i < features; i += 32) {
    const int64_t left = features - i < 32 ? features - i : 32;
    for (int64_t j = 0; j < left; ++j) sums[j] += load<D>(word, i + j) * load<D>(hidden, i + j);
  }
  return pairwise(sums);
}

// Logits of one row of the batch go into its running maximum and sum of exponentials.
template <Dtype D>
void panel(const TokenLogprobsArgs& a, int64_t t, int64_t from, int64_t count, LogSum& sum, float& target) {
  constexpr int64_t kBytes = D == Dtype::f32 ? 4 : 2;
  const void* hidden = static_cast<const char*>(a.hidden) + t * a.hidden_stride * kBytes;
  float logits[kLogitPanel];
  float max = sum.max;
  for (int64_t j = 0; j < count; ++j) {
    const void* word = static_cast<const char*>(a.head) + (from + j) * a.head_stride * kBytes;
    float l = dot<D>(word, hidden, a.features);
    if (a.bias) l += load<D>(a.bias, from + j);
    if (a.logit_scale != 1.0f) l *= a.logit_scale;
    if (a.softcap > 0.0f) l = a.softcap * tanhf(l / a.softcap);
    if (a.temperature) l /= a.temperature[t];
    if (from + j == a.tokens[t]) target = l;
    if (l > max) max = l;
    logits[j] = l;
  }
  const float shift = max == -__builtin_inff() ? 0.0f : max;
  if (max != sum.max) {
    sum.sum *= expf(sum.max - max);
    sum.max = max;
  }
  for (int64_t j = 0; j < count; ++j) sum.sum += expf(logits[j] - shift);
}

template <Dtype D>
void all_parts(const TokenLogprobsArgs& a, const LinearPlan& plan, int64_t part, int64_t begin, int64_t end,
               LogSum* sums, float* target) {
  for (int64_t p = begin; p < end; ++p) {
    const int64_t until = (p + 1) * part < a.vocabulary ? (p + 1) * part : a.vocabulary;
    for (int64_t k = 0; k < plan.rows; ++k) sums[p * kPlanRows + k] = {-__builtin_inff(), 0.0f};
    for (int64_t from = p * part; from < until; from += kLogitPanel) {
      const int64_t count = until - from < kLogitPanel ? until - from : kLogitPanel;
      for (int64_t k = 0; k < plan.rows; ++k) {
        panel<D>(a, plan.order[k], from, count, sums[p * kPlanRows + k], target[k]);
      }
    }
  }
}

}  // namespace

void token_logprobs_parts(const TokenLogprobsArgs& a, const LinearPlan& plan, Scratch, int64_t part, int64_t begin,
                          int64_t end, LogSum* sums, float* target) {
  switch (a.dtype) {
    case Dtype::f32:
      return all_parts<Dtype::f32>(a, plan, part, begin, end, sums, target);
    case Dtype::bf16:
      return all_parts<Dtype::bf16>(a, plan, part, begin, end, sums, target);
    case Dtype::f16:
      return all_parts<Dtype::f16>(a, plan, part, begin, end, sums, target);
  }
}

}  // namespace personafast::scalar
