#pragma once

// What the tests of chunk_scores for the CPU and for the GPU share: plain double arithmetic.

#include <math.h>

#include <vector>

#include "check.h"
#include "personafast/aggregator.h"

namespace check {

struct Part {
  double weight, ratio;
};

// Log of the joint ratio; `error` grows with what a difference loses.
inline double join(const std::vector<Part>& parts, personafast::Aggregator rule, double p, double* error) {
  double total = 0, least = HUGE_VAL, greatest = -HUGE_VAL;
  for (const Part& part : parts) {
    total += part.weight;
    least = fmin(least, part.ratio);
    greatest = fmax(greatest, part.ratio);
  }
  const double top = rule == personafast::Aggregator::power && p < 0 ? least : greatest;
  double added = 0, taken = 0, product = 0, powers = 0, u = 0;
  for (const Part& part : parts) {
    const double share = part.weight / total;
    (part.weight > 0 ? added : taken) += greatest > -HUGE_VAL ? fabs(part.weight) * exp(part.ratio - greatest) : 0;
    product += part.weight * part.ratio;
    powers += part.weight * exp(p * (part.ratio - top));
    u += share * (part.ratio < 0 ? log1p(exp(part.ratio)) - part.ratio : log1p(exp(-part.ratio)));
  }
  switch (rule) {
    case personafast::Aggregator::linear:
      if (taken > 0 && added > 0) *error *= added / fmax(fabs(added - taken), 1e-300);
      return added > taken ? greatest + log(added - taken) : -HUGE_VAL;
    case personafast::Aggregator::geometric:
      return least == -HUGE_VAL ? least : product;
    case personafast::Aggregator::power:
      if (greatest == -HUGE_VAL || (p <= 0 && least == -HUGE_VAL)) return -HUGE_VAL;
      return p == 0 ? product / total : top + log(powers) / p;
    case personafast::Aggregator::jensen_shannon:
      return least == -HUGE_VAL ? least : -u - log(-expm1(-u));
    case personafast::Aggregator::min:
      return least;
    case personafast::Aggregator::max:
      return greatest;
  }
  return NAN;
}

// A log probability, at times of what cannot be.
inline float logp(Random& random) { return random.chance(5) ? -HUGE_VALF : static_cast<float>(random.uniform(-12, 0)); }

}  // namespace check
