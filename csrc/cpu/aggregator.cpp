#include "personafast/aggregator.h"

#include <math.h>

namespace personafast {

bool rule_fits(int32_t rule, float p) {
  if (rule < static_cast<int32_t>(Aggregator::linear) || rule > static_cast<int32_t>(Aggregator::max)) return false;
  return rule != static_cast<int32_t>(Aggregator::power) || isfinite(p);
}

bool weights_have_signs(int32_t rule) { return rule <= static_cast<int32_t>(Aggregator::geometric); }

}  // namespace personafast
