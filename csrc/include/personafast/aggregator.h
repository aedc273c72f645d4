#pragma once

#include <stdint.h>

namespace personafast {

// How density ratios r_i = policy i / reference are joined, with weights w_i; personafast.ops.Aggregator has the same.
enum class Aggregator : int32_t {
  linear = 0,          // (sum_i w_i r_i)+
  geometric = 1,       // prod_i r_i^w_i
  power = 2,           // (sum_i w_i r_i^p)^(1/p), at p = 0 the geometric mean with weights w_i / sum w
  jensen_shannon = 3,  // s / (1 - s), log s = sum_i (w_i / sum w) log(r_i / (1 + r_i))
  min = 4,
  max = 5,
};

// Exponents nearer to 0 give the geometric mean.
constexpr float kSmallestExponent = 1e-9f;

// A difference of this share of what it is taken from is rounding, and counts as nothing.
constexpr float kCancelled = 1e-5f;

// Where every log ratio is above it, Jensen-Shannon is the harmonic mean up to rounding.
constexpr float kHarmonicLimit = 16.0f;

// Whether `rule` is the code of an aggregator and p an exponent for it.
bool rule_fits(int32_t rule, float p);

// Whether a weight may be negative under `rule`.
bool weights_have_signs(int32_t rule);

}  // namespace personafast
