// aggregate_logits: 64 tokens at a time, one vector of 16 at the end of a block.

#include "avx512_float.h"
#include "avx512_math.h"
#include "kernels.h"

namespace personafast::avx512 {
namespace {

constexpr __mmask16 kAll = 0xffff;
constexpr float kInfinity = __builtin_inff();

// Vectors that are worked on side by side, which hides the latency of exp.
constexpr int kVectors = 4;

// The largest value of a block so far, and whether one is no number.
struct Maximum {
  __m512 values = _mm512_set1_ps(-kInfinity);
  __mmask16 nan = 0;

  void see(__m512 value) {
    // Of an operand that is NaN max returns the second.
    values = _mm512_max_ps(value, values);
    nan |= _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  }

  void join(const Maximum& other) {
    values = _mm512_max_ps(other.values, values);
    nan |= other.nan;
  }

  float get() const { return nan ? __builtin_nanf("") : _mm512_reduce_max_ps(values); }
};

// Sum of exp(x - max); max is finite.
template <Dtype D>
float sum_exp(const void* x, int64_t begin, int64_t end, float max) {
  const __m512 top = _mm512_set1_ps(max);
  __m512 sums[kVectors] = {};
  int64_t i = begin;
  for (; i + 16 * kVectors <= end; i += 16 * kVectors) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sums[v] = _mm512_add_ps(sums[v], exp_ps(_mm512_sub_ps(load<D>(x, i + 16 * v, kAll), top)));
    }
  }
  for (; i < end; i += 16) {
    const __mmask16 m = first(end - i);
    sums[0] = _mm512_mask_add_ps(sums[0], m, sums[0], exp_ps(_mm512_sub_ps(load<D>(x, i, m), top)));
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}

// end - begin is at most kLogitsTile.
template <Dtype D>
float max_of(const void* x, int64_t begin, int64_t end) {
  Maximum maxima[kVectors];
  int64_t i = begin;
  for (; i + 16 * kVectors <= end; i += 16 * kVectors) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) maxima[v].see(load<D>(x, i + 16 * v, kAll));
  }
  for (; i < end; i += 16) {
    const __mmask16 m = first(end - i);
    maxima[0].see(_mm512_mask_mov_ps(_mm512_set1_ps(-kInfinity), m, load<D>(x, i, m)));
  }
  for (int v = 1; v < kVectors; ++v) maxima[0].join(maxima[v]);
  return maxima[0].get();
}

template <Dtype D>
void max_of_tiles(const void* x, int64_t begin, int64_t end, float* maxima) {
  for (int64_t i = begin; i < end; i += kLogitsTile) {
    *maxima++ = max_of<D>(x, i, end - i < kLogitsTile ? end : i + kLogitsTile);
  }
}

// Tokens i to i + 15 that a member of the blend excludes.
template <Dtype D>
__mmask16 barred(const LogitsBlend& b, int64_t i, __mmask16 m) {
  __mmask16 found = 0;
  for (int64_t n = 0; n < b.count; ++n) {
    const __m512 x = _mm512_sub_ps(load<D>(b.members[n].logits, i, m), _mm512_set1_ps(b.members[n].shift));
    found |= _mm512_cmp_ps_mask(x, _mm512_set1_ps(-kInfinity), _CMP_EQ_OQ);
  }
  return found;
}

template <Dtype D, int V>
void product(const LogitsBlend& b, int64_t i, __mmask16 m, __m512* target, __mmask16* kept) {
  for (int v = 0; v < V; ++v) target[v] = _mm512_setzero_ps();
  for (int64_t n = 0; n < b.count; ++n) {
    const LogitsMember& member = b.members[n];
    const __m512 shift = _mm512_set1_ps(member.shift);
    const __m512 weight = _mm512_set1_ps(member.weight);
    const __m512 floor = _mm512_set1_ps(member.floor);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const __m512 x = _mm512_sub_ps(load<D>(member.logits, i + 16 * v, m), shift);
      target[v] = _mm512_fmadd_ps(weight, x, target[v]);
      kept[v] |= _mm512_cmp_ps_mask(x, floor, _CMP_GE_OQ);
    }
  }
  for (int v = 0; v < V; ++v) {
    // What is -inf under a negative weight, or under weights of both signs, is neither finite nor -inf here.
    if (_mm512_cmp_ps_mask(target[v], _mm512_set1_ps(kInfinity), _CMP_NLT_UQ)) {
      target[v] = _mm512_mask_mov_ps(target[v], barred<D>(b, i + 16 * v, m), _mm512_set1_ps(-kInfinity));
    }
  }
}

// Tokens from i on of a member, after the shift; which of them are in its support is added to kept.
template <Dtype D, int V>
void see(const LogitsMember& member, int64_t i, __mmask16 m, __m512* x, __mmask16* kept) {
  const __m512 shift = _mm512_set1_ps(member.shift);
  const __m512 floor = _mm512_set1_ps(member.floor);
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    x[v] = _mm512_sub_ps(load<D>(member.logits, i + 16 * v, m), shift);
    kept[v] |= _mm512_cmp_ps_mask(x[v], floor, _CMP_GE_OQ);
  }
}

// weight + logits - shift of 16 tokens.
template <Dtype D>
__m512 term(const LogitsMember& member, int64_t i, __mmask16 m) {
  const __m512 x = _mm512_sub_ps(load<D>(member.logits, i, m), _mm512_set1_ps(member.shift));
  return _mm512_add_ps(_mm512_set1_ps(member.weight), x);
}

template <Dtype D, int V>
void mixture(const LogitsBlend& b, int64_t i, __mmask16 m, __m512* target, __mmask16* kept) {
  // Finite, so that a token no member can produce is exp(-inf) and not exp(NaN).
  __m512 top[V], x[V];
  for (int v = 0; v < V; ++v) top[v] = _mm512_set1_ps(-__FLT_MAX__);
  for (int64_t n = 0; n < b.count; ++n) {
    see<D, V>(b.members[n], i, m, x, kept);
    const __m512 weight = _mm512_set1_ps(b.members[n].weight);
    for (int v = 0; v < V; ++v) top[v] = _mm512_max_ps(top[v], _mm512_add_ps(weight, x[v]));
  }
  const auto sum_of = [&](int64_t n, int64_t end, __m512* sum) {
    for (int v = 0; v < V; ++v) sum[v] = _mm512_setzero_ps();
    for (; n < end; ++n) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const __m512 y = term<D>(b.members[n], i + 16 * v, m);
        sum[v] = _mm512_add_ps(sum[v], exp_ps(_mm512_sub_ps(y, top[v])));
      }
    }
  };
  __m512 sum[V];
  sum_of(0, b.added, sum);
  if (b.added < b.count) {
    __m512 taken[V];
    sum_of(b.added, b.count, taken);
    for (int v = 0; v < V; ++v) {
      const __m512 rest = _mm512_sub_ps(sum[v], taken[v]);
      const __m512 rounding = _mm512_mul_ps(sum[v], _mm512_set1_ps(kCancelled));
      sum[v] = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(rest, rounding, _CMP_NLE_UQ), rest);
    }
  }
  for (int v = 0; v < V; ++v) target[v] = _mm512_add_ps(top[v], log_ps(sum[v]));
}

template <Dtype D, int V>
void extreme(const LogitsBlend& b, bool greatest, int64_t i, __mmask16 m, __m512* target, __mmask16* kept) {
  __m512 x[V];
  for (int v = 0; v < V; ++v) target[v] = _mm512_set1_ps(greatest ? -kInfinity : kInfinity);
  for (int64_t n = 0; n < b.count; ++n) {
    see<D, V>(b.members[n], i, m, x, kept);
    const __m512 weight = _mm512_set1_ps(b.members[n].weight);
    for (int v = 0; v < V; ++v) {
      const __m512 y = _mm512_add_ps(weight, x[v]);
      target[v] = greatest ? _mm512_max_ps(target[v], y) : _mm512_min_ps(target[v], y);
    }
  }
}

template <Dtype D, int V>
void power(const LogitsBlend& b, int64_t i, __mmask16 m, __m512* target, __mmask16* kept) {
  // The term that counts most.
  __m512 top[V];
  extreme<D, V>(b, b.p > 0.0f, i, m, top, kept);
  const __m512 p = _mm512_set1_ps(b.p);
  __m512 sum[V], more[V];
  for (int v = 0; v < V; ++v) sum[v] = more[v] = _mm512_setzero_ps();
  for (int64_t n = 0; n < b.count; ++n) {
    const __m512 share = _mm512_set1_ps(b.members[n].share);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const __m512 y = _mm512_mul_ps(p, _mm512_sub_ps(term<D>(b.members[n], i + 16 * v, m), top[v]));
      sum[v] = _mm512_fmadd_ps(share, exp_ps(y), sum[v]);
      more[v] = _mm512_fmadd_ps(share, expm1_ps(y), more[v]);
    }
  }
  const __m512 low = _mm512_set1_ps(-kInfinity);
  for (int v = 0; v < V; ++v) {
    // The log of 1 + more, which far from 1 is less exact than that of the sum.
    const __mmask16 near = _mm512_cmp_ps_mask(more[v], _mm512_set1_ps(-0.25f), _CMP_GT_OQ);
    const __m512 log_sum = _mm512_mask_mov_ps(log_ps(sum[v]), near, log1p_ps(more[v]));
    const __mmask16 none = _mm512_cmp_ps_mask(top[v], low, _CMP_EQ_OQ);
    target[v] = _mm512_mask_mov_ps(_mm512_add_ps(top[v], _mm512_div_ps(log_sum, p)), none, low);
  }
}

// Where every ratio, y_i less y_0, is so large that log s rounds to 0: log(s / (1 - s)) is then their harmonic mean.
template <Dtype D>
__m512 harmonic(const LogitsBlend& b, int64_t i, __mmask16 m, __m512 y0, __m512 least) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t n = 0; n + 1 < b.count; ++n) {
    const __m512 ratio = _mm512_sub_ps(term<D>(b.members[n], i, m), y0);
    sum = _mm512_fmadd_ps(_mm512_set1_ps(b.members[n].share), exp_ps(_mm512_sub_ps(least, ratio)), sum);
  }
  return _mm512_sub_ps(least, log_ps(sum));
}

template <Dtype D, int V>
void jensen_shannon(const LogitsBlend& b, int64_t i, __mmask16 m, __m512* target, __mmask16* kept) {
  const LogitsMember& reference = b.members[b.count - 1];
  const __m512 zero = _mm512_setzero_ps();
  const __m512 low = _mm512_set1_ps(-kInfinity);
  __m512 y0[V], least[V], u[V], x[V];
  for (int v = 0; v < V; ++v) {
    y0[v] = term<D>(reference, i + 16 * v, m);
    least[v] = _mm512_set1_ps(kInfinity);
    u[v] = zero;
  }
  for (int64_t n = 0; n + 1 < b.count; ++n) {
    see<D, V>(b.members[n], i, m, x, kept);
    const __m512 weight = _mm512_set1_ps(b.members[n].weight);
    const __m512 share = _mm512_set1_ps(b.members[n].share);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const __m512 ratio = _mm512_sub_ps(_mm512_add_ps(weight, x[v]), y0[v]);
      least[v] = _mm512_min_ps(least[v], ratio);
      // -log sigmoid(ratio) = log(1 + e^-ratio)
      const __m512 small = log1p_ps(exp_ps(_mm512_sub_ps(zero, _mm512_abs_ps(ratio))));
      u[v] = _mm512_fmadd_ps(share, _mm512_sub_ps(small, _mm512_min_ps(ratio, zero)), u[v]);
    }
  }
  for (int v = 0; v < V; ++v) {
    // u is -log s, so log(s / (1 - s)) = -u - log(1 - e^-u).
    const __m512 rest = _mm512_sub_ps(zero, expm1_ps(_mm512_sub_ps(zero, u[v])));
    __m512 mean = _mm512_sub_ps(_mm512_sub_ps(zero, u[v]), log_ps(rest));
    const __mmask16 large = _mm512_cmp_ps_mask(least[v], _mm512_set1_ps(kHarmonicLimit), _CMP_GT_OQ);
    if (large) mean = _mm512_mask_mov_ps(mean, large, harmonic<D>(b, i + 16 * v, m, y0[v], least[v]));
    const __mmask16 none = _mm512_cmp_ps_mask(y0[v], low, _CMP_EQ_OQ);
    target[v] = _mm512_mask_mov_ps(_mm512_add_ps(y0[v], mean), none, low);
  }
}

template <Dtype D, LogitsRule R, int V>
void tile(const LogitsBlend& b, int64_t i, __mmask16 m, Maximum* maxima) {
  __m512 target[V];
  __mmask16 kept[V] = {};
  if constexpr (R == LogitsRule::product) {
    product<D, V>(b, i, m, target, kept);
  } else if constexpr (R == LogitsRule::mixture) {
    mixture<D, V>(b, i, m, target, kept);
  } else if constexpr (R == LogitsRule::power) {
    power<D, V>(b, i, m, target, kept);
  } else if constexpr (R == LogitsRule::jensen_shannon) {
    jensen_shannon<D, V>(b, i, m, target, kept);
  } else {
    extreme<D, V>(b, R == LogitsRule::greatest, i, m, target, kept);
  }
  const __m512 low = _mm512_set1_ps(-kInfinity);
  for (int v = 0; v < V; ++v) {
    // NaN is in no support, and stays.
    const __mmask16 nan = _mm512_cmp_ps_mask(target[v], target[v], _CMP_UNORD_Q);
    if (b.masked) target[v] = _mm512_mask_mov_ps(low, static_cast<__mmask16>(kept[v] | nan), target[v]);
    _mm512_mask_storeu_ps(b.out + i + 16 * v, m, target[v]);
    maxima[v].see(_mm512_mask_mov_ps(low, m, target[v]));
  }
}

template <Dtype D, LogitsRule R>
float blend(const LogitsBlend& b, int64_t begin, int64_t end) {
  Maximum maxima[kVectors];
  int64_t i = begin;
  for (; i + 16 * kVectors <= end; i += 16 * kVectors) tile<D, R, kVectors>(b, i, kAll, maxima);
  for (; i < end; i += 16) tile<D, R, 1>(b, i, first(end - i), maxima);
  for (int v = 1; v < kVectors; ++v) maxima[0].join(maxima[v]);
  return maxima[0].get();
}

template <Dtype D>
float blend(const LogitsBlend& b, int64_t begin, int64_t end) {
  switch (b.rule) {
    case LogitsRule::product:
      return blend<D, LogitsRule::product>(b, begin, end);
    case LogitsRule::mixture:
      return blend<D, LogitsRule::mixture>(b, begin, end);
    case LogitsRule::power:
      return blend<D, LogitsRule::power>(b, begin, end);
    case LogitsRule::jensen_shannon:
      return blend<D, LogitsRule::jensen_shannon>(b, begin, end);
    case LogitsRule::least:
      return blend<D, LogitsRule::least>(b, begin, end);
    case LogitsRule::greatest:
      return blend<D, LogitsRule::greatest>(b, begin, end);
  }
  return __builtin_nanf("");
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
  const __m512 by = _mm512_set1_ps(norm);
  for (int64_t i = begin; i < end; i += 16) {
    const __mmask16 m = first(end - i);
    _mm512_mask_storeu_ps(out + i, m, _mm512_sub_ps(load<Dtype::f32>(out, i, m), by));
  }
}

}  // namespace personafast::avx512
