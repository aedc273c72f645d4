// aggregate_logits: 32 tokens at a time, one vector of 8 at the end of a block.

#include "avx2_float.h"
#include "avx2_math.h"
#include "kernels.h"

namespace personafast::avx2 {
namespace {

constexpr float kInfinity = __builtin_inff();

// Vectors that are worked on side by side, which hides the latency of exp.
constexpr int kVectors = 4;

__m256 where(__m256 condition, __m256 yes, __m256 no) { return _mm256_blendv_ps(no, yes, condition); }

float reduce_add(__m256 x) {
  float lanes[8];
  _mm256_storeu_ps(lanes, x);
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

// The largest value of a block so far, and whether one is no number.
struct Maximum {
  __m256 values = _mm256_set1_ps(-kInfinity);
  __m256 nan = _mm256_setzero_ps();

  void see(__m256 value) {
    // Of an operand that is NaN max returns the second.
    values = _mm256_max_ps(value, values);
    nan = _mm256_or_ps(nan, _mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  }

  void join(const Maximum& other) {
    values = _mm256_max_ps(other.values, values);
    nan = _mm256_or_ps(nan, other.nan);
  }

  float get() const {
    if (_mm256_movemask_ps(nan)) return __builtin_nanf("");
    float lanes[8];
    _mm256_storeu_ps(lanes, values);
    for (int i = 1; i < 8; ++i) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
    return lanes[0];
  }
};

// Sum of exp(x - max); max is finite.
template <Dtype D>
float sum_exp(const void* x, int64_t begin, int64_t end, float max) {
  const __m256 top = _mm256_set1_ps(max);
  __m256 sums[kVectors] = {};
  int64_t i = begin;
  for (; i + 8 * kVectors <= end; i += 8 * kVectors) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sums[v] = _mm256_add_ps(sums[v], exp_ps(_mm256_sub_ps(load<D>(x, i + 8 * v, 8), top)));
    }
  }
  for (; i < end; i += 8) {
    const int64_t n = end - i < 8 ? end - i : 8;
    const __m256 term = exp_ps(_mm256_sub_ps(load<D>(x, i, n), top));
    sums[0] = _mm256_add_ps(sums[0], _mm256_and_ps(term, first(n)));
  }
  return reduce_add(_mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3])));
}

// end - begin is at most kLogitsTile.
template <Dtype D>
float max_of(const void* x, int64_t begin, int64_t end) {
  Maximum maxima[kVectors];
  int64_t i = begin;
  for (; i + 8 * kVectors <= end; i += 8 * kVectors) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) maxima[v].see(load<D>(x, i + 8 * v, 8));
  }
  for (; i < end; i += 8) {
    const int64_t n = end - i < 8 ? end - i : 8;
    maxima[0].see(where(first(n), load<D>(x, i, n), _mm256_set1_ps(-kInfinity)));
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

// Tokens i to i + n - 1 that a member of the blend excludes.
template <Dtype D>
__m256 barred(const LogitsBlend& b, int64_t i, int64_t n) {
  __m256 found = _mm256_setzero_ps();
  for (int64_t k = 0; k < b.count; ++k) {
    const __m256 x = _mm256_sub_ps(load<D>(b.members[k].logits, i, n), _mm256_set1_ps(b.members[k].shift));
    found = _mm256_or_ps(found, _mm256_cmp_ps(x, _mm256_set1_ps(-kInfinity), _CMP_EQ_OQ));
  }
  return found;
}

template <Dtype D, int V>
void product(const LogitsBlend& b, int64_t i, int64_t n, __m256* target, __m256* kept) {
  for (int v = 0; v < V; ++v) target[v] = _mm256_setzero_ps();
  for (int64_t k = 0; k < b.count; ++k) {
    const LogitsMember& member = b.members[k];
    const __m256 shift = _mm256_set1_ps(member.shift);
    const __m256 weight = _mm256_set1_ps(member.weight);
    const __m256 floor = _mm256_set1_ps(member.floor);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const __m256 x = _mm256_sub_ps(load<D>(member.logits, i + 8 * v, n), shift);
      target[v] = _mm256_fmadd_ps(weight, x, target[v]);
      kept[v] = _mm256_or_ps(kept[v], _mm256_cmp_ps(x, floor, _CMP_GE_OQ));
    }
  }
  for (int v = 0; v < V; ++v) {
    // What is -inf under a negative weight, or under weights of both signs, is neither finite nor -inf here.
    if (_mm256_movemask_ps(_mm256_cmp_ps(target[v], _mm256_set1_ps(kInfinity), _CMP_NLT_UQ))) {
      target[v] = where(barred<D>(b, i + 8 * v, n), _mm256_set1_ps(-kInfinity), target[v]);
    }
  }
}

// Tokens from i on of a member, after the shift; which of them are in its support is added to kept.
template <Dtype D, int V>
void see(const LogitsMember& member, int64_t i, int64_t n, __m256* x, __m256* kept) {
  const __m256 shift = _mm256_set1_ps(member.shift);
  const __m256 floor = _mm256_set1_ps(member.floor);
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    x[v] = _mm256_sub_ps(load<D>(member.logits, i + 8 * v, n), shift);
    kept[v] = _mm256_or_ps(kept[v], _mm256_cmp_ps(x[v], floor, _CMP_GE_OQ));
  }
}

// weight + logits - shift of 8 tokens.
template <Dtype D>
__m256 term(const LogitsMember& member, int64_t i, int64_t n) {
  const __m256 x = _mm256_sub_ps(load<D>(member.logits, i, n), _mm256_set1_ps(member.shift));
  return _mm256_add_ps(_mm256_set1_ps(member.weight), x);
}

template <Dtype D, int V>
void mixture(const LogitsBlend& b, int64_t i, int64_t n, __m256* target, __m256* kept) {
  // Finite, so that a token no member can produce is exp(-inf) and not exp(NaN).
  __m256 top[V], x[V];
  for (int v = 0; v < V; ++v) top[v] = _mm256_set1_ps(-__FLT_MAX__);
  for (int64_t k = 0; k < b.count; ++k) {
    see<D, V>(b.members[k], i, n, x, kept);
    const __m256 weight = _mm256_set1_ps(b.members[k].weight);
    for (int v = 0; v < V; ++v) top[v] = _mm256_max_ps(top[v], _mm256_add_ps(weight, x[v]));
  }
  const auto sum_of = [&](int64_t k, int64_t end, __m256* sum) {
    for (int v = 0; v < V; ++v) sum[v] = _mm256_setzero_ps();
    for (; k < end; ++k) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const __m256 y = term<D>(b.members[k], i + 8 * v, n);
        sum[v] = _mm256_add_ps(sum[v], exp_ps(_mm256_sub_ps(y, top[v])));
      }
    }
  };
  __m256 sum[V];
  sum_of(0, b.added, sum);
  if (b.added < b.count) {
    __m256 taken[V];
    sum_of(b.added, b.count, taken);
    for (int v = 0; v < V; ++v) {
      const __m256 rest = _mm256_sub_ps(sum[v], taken[v]);
      const __m256 rounding = _mm256_mul_ps(sum[v], _mm256_set1_ps(kCancelled));
      sum[v] = _mm256_and_ps(rest, _mm256_cmp_ps(rest, rounding, _CMP_NLE_UQ));
    }
  }
  for (int v = 0; v < V; ++v) target[v] = _mm256_add_ps(top[v], log_ps(sum[v]));
}

template <Dtype D, int V>
void extreme(const LogitsBlend& b, bool greatest, int64_t i, int64_t n, __m256* target, __m256* kept) {
  __m256 x[V];
  for (int v = 0; v < V; ++v) target[v] = _mm256_set1_ps(greatest ? -kInfinity : kInfinity);
  for (int64_t k = 0; k < b.count; ++k) {
    see<D, V>(b.members[k], i, n, x, kept);
    const __m256 weight = _mm256_set1_ps(b.members[k].weight);
    for (int v = 0; v < V; ++v) {
      const __m256 y = _mm256_add_ps(weight, x[v]);
      target[v] = greatest ? _mm256_max_ps(target[v], y) : _mm256_min_ps(target[v], y);
    }
  }
}

template <Dtype D, int V>
void power(const LogitsBlend& b, int64_t i, int64_t n, __m256* target, __m256* kept) {
  // The term that counts most.
  __m256 top[V];
  extreme<D, V>(b, b.p > 0.0f, i, n, top, kept);
  const __m256 p = _mm256_set1_ps(b.p);
  __m256 sum[V], more[V];
  for (int v = 0; v < V; ++v) sum[v] = more[v] = _mm256_setzero_ps();
  for (int64_t k = 0; k < b.count; ++k) {
    const __m256 share = _mm256_set1_ps(b.members[k].share);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const __m256 y = _mm256_mul_ps(p, _mm256_sub_ps(term<D>(b.members[k], i + 8 * v, n), top[v]));
      sum[v] = _mm256_fmadd_ps(share, exp_ps(y), sum[v]);
      more[v] = _mm256_fmadd_ps(share, expm1_ps(y), more[v]);
    }
  }
  const __m256 low = _mm256_set1_ps(-kInfinity);
  for (int v = 0; v < V; ++v) {
    // The log of 1 + more, which far from 1 is less exact than that of the sum.
    const __m256 near = _mm256_cmp_ps(more[v], _mm256_set1_ps(-0.25f), _CMP_GT_OQ);
    const __m256 log_sum = where(near, log1p_ps(more[v]), log_ps(sum[v]));
    const __m256 none = _mm256_cmp_ps(top[v], low, _CMP_EQ_OQ);
    target[v] = where(none, low, _mm256_add_ps(top[v], _mm256_div_ps(log_sum, p)));
  }
}

// Where every ratio, y_i less y_0, is so large that log s rounds to 0: log(s / (1 - s)) is then their harmonic mean.
template <Dtype D>
__m256 harmonic(const LogitsBlend& b, int64_t i, int64_t n, __m256 y0, __m256 least) {
  __m256 sum = _mm256_setzero_ps();
  for (int64_t k = 0; k + 1 < b.count; ++k) {
    const __m256 ratio = _mm256_sub_ps(term<D>(b.members[k], i, n), y0);
    sum = _mm256_fmadd_ps(_mm256_set1_ps(b.members[k].share), exp_ps(_mm256_sub_ps(least, ratio)), sum);
  }
  return _mm256_sub_ps(least, log_ps(sum));
}

template <Dtype D, int V>
void jensen_shannon(const LogitsBlend& b, int64_t i, int64_t n, __m256* target, __m256* kept) {
  const LogitsMember& reference = b.members[b.count - 1];
  const __m256 zero = _mm256_setzero_ps();
  const __m256 low = _mm256_set1_ps(-kInfinity);
  const __m256 sign = _mm256_set1_ps(-0.0f);
  __m256 y0[V], least[V], u[V], x[V];
  for (int v = 0; v < V; ++v) {
    y0[v] = term<D>(reference, i + 8 * v, n);
    least[v] = _mm256_set1_ps(kInfinity);
    u[v] = zero;
  }
  for (int64_t k = 0; k + 1 < b.count; ++k) {
    see<D, V>(b.members[k], i, n, x, kept);
    const __m256 weight = _mm256_set1_ps(b.members[k].weight);
    const __m256 share = _mm256_set1_ps(b.members[k].share);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const __m256 ratio = _mm256_sub_ps(_mm256_add_ps(weight, x[v]), y0[v]);
      least[v] = _mm256_min_ps(least[v], ratio);
      // -log sigmoid(ratio) = log(1 + e^-ratio)
      const __m256 small = log1p_ps(exp_ps(_mm256_or_ps(ratio, sign)));
      u[v] = _mm256_fmadd_ps(share, _mm256_sub_ps(small, _mm256_min_ps(ratio, zero)), u[v]);
    }
  }
  for (int v = 0; v < V; ++v) {
    // u is -log s, so log(s / (1 - s)) = -u - log(1 - e^-u).
    const __m256 rest = _mm256_sub_ps(zero, expm1_ps(_mm256_sub_ps(zero, u[v])));
    __m256 mean = _mm256_sub_ps(_mm256_sub_ps(zero, u[v]), log_ps(rest));
    const __m256 large = _mm256_cmp_ps(least[v], _mm256_set1_ps(kHarmonicLimit), _CMP_GT_OQ);
    if (_mm256_movemask_ps(large)) mean = where(large, harmonic<D>(b, i + 8 * v, n, y0[v], least[v]), mean);
    const __m256 none = _mm256_cmp_ps(y0[v], low, _CMP_EQ_OQ);
    target[v] = where(none, low, _mm256_add_ps(y0[v], mean));
  }
}

template <Dtype D, LogitsRule R, int V>
void tile(const LogitsBlend& b, int64_t i, int64_t n, Maximum* maxima) {
  __m256 target[V];
  __m256 kept[V];
  for (int v = 0; v < V; ++v) kept[v] = _mm256_setzero_ps();
  if constexpr (R == LogitsRule::product) {
    product<D, V>(b, i, n, target, kept);
  } else if constexpr (R == LogitsRule::mixture) {
    mixture<D, V>(b, i, n, target, kept);
  } else if constexpr (R == LogitsRule::power) {
    power<D, V>(b, i, n, target, kept);
  } else if constexpr (R == LogitsRule::jensen_shannon) {
    jensen_shannon<D, V>(b, i, n, target, kept);
  } else {
    extreme<D, V>(b, R == LogitsRule::greatest, i, n, target, kept);
  }
  const __m256 low = _mm256_set1_ps(-kInfinity);
  for (int v = 0; v < V; ++v) {
    // NaN is in no support, and stays.
    const __m256 nan = _mm256_cmp_ps(target[v], target[v], _CMP_UNORD_Q);
    if (b.masked) target[v] = where(_mm256_or_ps(kept[v], nan), target[v], low);
    float* to = b.out + i + 8 * v;
    if (n == 8) {
      _mm256_storeu_ps(to, target[v]);
    } else {
      float buffer[8];
      _mm256_storeu_ps(buffer, target[v]);
      memcpy(to, buffer, n * sizeof(float));
      target[v] = where(first(n), target[v], low);
    }
    maxima[v].see(target[v]);
  }
}

template <Dtype D, LogitsRule R>
float blend(const LogitsBlend& b, int64_t begin, int64_t end) {
  Maximum maxima[kVectors];
  int64_t i = begin;
  for (; i + 8 * kVectors <= end; i += 8 * kVectors) tile<D, R, kVectors>(b, i, 8, maxima);
  for (; i < end; i += 8) tile<D, R, 1>(b, i, end - i < 8 ? end - i : 8, maxima);
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
  const __m256 by = _mm256_set1_ps(norm);
  int64_t i = begin;
  for (; i + 8 <= end; i += 8) _mm256_storeu_ps(out + i, _mm256_sub_ps(_mm256_loadu_ps(out + i), by));
  for (; i < end; ++i) out[i] -= norm;
}

}  // namespace personafast::avx2
