// token_logprobs: a panel of logits comes from the tiles of masked_linear into L1 and goes at once into the running
// maximum and sum of exponentials of its row.

#include <immintrin.h>

#include "avx512_dot.h"
#include "avx512_math.h"
#include "kernels.h"

namespace personafast::avx512 {
namespace {

// tanh x = 1 - 2 / (e^2x + 1); near 0, where that cancels, x times a polynomial in x^2.
__m512 tanh_ps(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 e = exp_ps(_mm512_add_ps(x, x));
  const __m512 far = _mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(e, one)));
  const __m512 x2 = _mm512_mul_ps(x, x);
  __m512 p = _mm512_set1_ps(62.0f / 2835.0f);
  p = _mm512_fmadd_ps(p, x2, _mm512_set1_ps(-17.0f / 315.0f));
  p = _mm512_fmadd_ps(p, x2, _mm512_set1_ps(2.0f / 15.0f));
  p = _mm512_fmadd_ps(p, x2, _mm512_set1_ps(-1.0f / 3.0f));
  const __m512 close = _mm512_fmadd_ps(_mm512_mul_ps(p, x2), x, x);
  return _mm512_mask_mov_ps(far, _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(0.3f), _CMP_LT_OQ), close);
}

template <Dtype D>
struct Head {
  const TokenLogprobsArgs& a;
  Linear<D, false> linear;
  float* target;
  alignas(64) float panel[kPlanRows * kLogitPanel];

  Head(const TokenLogprobsArgs& args, const LinearPlan& plan, Scratch scratch, float* to)
      : a(args),
        linear({args.hidden, args.hidden_stride, args.head, args.head_stride, nullptr, args.vocabulary, args.features},
               plan, scratch),
        target(to) {}

  // Logits o to o + count - 1 of row k of the plan, as they enter the softmax.
  void logits(int64_t k, int64_t o, int64_t count, __m512* to) const {
    const int64_t t = linear.plan.order[k];
    for (int64_t v = 0; v < kLogitPanel / 16; ++v) {
      const int64_t left = count - 16 * v;
      const __mmask16 m = left <= 0 ? static_cast<__mmask16>(0) : static_cast<__mmask16>(first_bits(left));
      __m512 l = _mm512_load_ps(panel + k * kLogitPanel + 16 * v);
      if (a.bias) l = _mm512_add_ps(l, load16<D>(a.bias, o + 16 * v, m));
      if (a.logit_scale != 1.0f) l = _mm512_mul_ps(l, _mm512_set1_ps(a.logit_scale));
      if (a.softcap > 0.0f) {
        const __m512 cap = _mm512_set1_ps(a.softcap);
        l = _mm512_mul_ps(cap, tanh_ps(_mm512_div_ps(l, cap)));
      }
      if (a.temperature) l = _mm512_div_ps(l, _mm512_set1_ps(a.temperature[t]));
      to[v] = _mm512_mask_mov_ps(_mm512_set1_ps(-__builtin_inff()), m, l);
    }
  }

  void add(int64_t o, int64_t count, LogSum* sums) {
    for (int64_t k = 0; k < linear.plan.rows; ++k) {
      __m512 l[kLogitPanel / 16];
      logits(k, o, count, l);
      const int64_t token = a.tokens[linear.plan.order[k]] - o;
      if (token >= 0 && token < count) {
        alignas(64) float values[kLogitPanel];
        for (int64_t v = 0; v < kLogitPanel / 16; ++v) _mm512_store_ps(values + 16 * v, l[v]);
        target[k] = values[token];
      }
      const float panel_max = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(l[0], l[1]), _mm512_max_ps(l[2], l[3])));
      LogSum& sum = sums[k];
      // NaN is larger than nothing, and reaches the sum through its own exponential.
      const float max = panel_max > sum.max ? panel_max : sum.max;
      const __m512 shift = _mm512_set1_ps(max == -__builtin_inff() ? 0.0f : max);
      __m512 e = _mm512_setzero_ps();
      for (int64_t v = 0; v < kLogitPanel / 16; ++v) e = _mm512_add_ps(e, exp_ps(_mm512_sub_ps(l[v], shift)));
      if (max != sum.max) {
        sum.sum *= _mm512_cvtss_f32(exp_ps(_mm512_set1_ps(sum.max - max)));
        sum.max = max;
      }
      sum.sum += _mm512_reduce_add_ps(e);
    }
  }

  void part(int64_t begin, int64_t end, int64_t last, LogSum* sums) {
    for (int64_t k = 0; k < linear.plan.rows; ++k) sums[k] = {-__builtin_inff(), 0.0f};
    for (int64_t from = begin; from < end; from += kLogitPanel) {
      const int64_t count = end - from < kLogitPanel ? end - from : kLogitPanel;
      int64_t o = 0;
      for (; o + kGroup <= count; o += kGroup) {
        linear.group(from + o, kGroup, from + o + 2 * kGroup <= last);
        for (int64_t k = 0; k < linear.plan.rows; ++k) {
          _mm_store_ps(panel + k * kLogitPanel + o, _mm_load_ps(linear.kept + k * kGroup));
        }
      }
      // The last few words of the vocabulary, one at a time.
      for (; o < count; ++o) {
        linear.group(from + o, 1, false);
        for (int64_t k = 0; k < linear.plan.rows; ++k) panel[k * kLogitPanel + o] = linear.kept[k * kGroup];
      }
      add(from, count, sums);
    }
  }
};

template <Dtype D>
void all_parts(const TokenLogprobsArgs& a, const LinearPlan& plan, Scratch scratch, int64_t part, int64_t begin,
               int64_t end, LogSum* sums, float* target) {
  Head<D> head(a, plan, scratch, target);
  const int64_t last = end * part < a.vocabulary ? end * part : a.vocabulary;
  for (int64_t p = begin; p < end; ++p) {
    const int64_t until = (p + 1) * part < a.vocabulary ? (p + 1) * part : a.vocabulary;
    head.part(p * part, until, last, sums + p * kPlanRows);
  }
}

}  // namespace

void token_logprobs_parts(const TokenLogprobsArgs& a, const LinearPlan& plan, Scratch scratch, int64_t part,
                          int64_t begin, int64_t end, LogSum* sums, float* target) {
  switch (a.dtype) {
    case Dtype::f32:
      return all_parts<Dtype::f32>(a, plan, scratch, part, begin, end, sums, target);
    case Dtype::bf16:
      return all_parts<Dtype::bf16>(a, plan, scratch, part, begin, end, sums, target);
    case Dtype::f16:
      return all_parts<Dtype::f16>(a, plan, scratch, part, begin, end, sums, target);
  }
}

}  // namespace personafast::avx512
