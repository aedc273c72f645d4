// chunk_scores and chunk_accept in plain C++ for every machine: a few hundred numbers, where the call is the cost.

#include "personafast/chunk_scores.h"

#include <math.h>

#include <limits>
#include <vector>

#include "personafast/aggregator.h"

namespace personafast {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Member {
  const float* logp;  // [chunk]
  double weight;
  double share;  // the weight over the sum of all their sizes
  double log;    // of the weight's size
  double ratio;  // log ratio of the tokens so far
};

// Weights that sum to 1 up to their rounding sum to 1: an exponent near 0 would make much of the rest.
constexpr double kWhole = 1e-6;

using Members = std::vector<Member>;

// log of the sum of exp(log + ratio) over the members whose weight has this sign; what is summed fits fp32.
double log_sum_exp(const Members& members, bool positive) {
  double top = -kInfinity;
  for (const Member& member : members) {
    if ((member.weight > 0.0) != positive) continue;
    const double term = member.log + member.ratio;
    if (term != term) return term;
    if (term > top) top = term;
  }
  if (fabs(top) == kInfinity) return top;
  float sum = 0.0f;
  for (const Member& member : members) {
    if ((member.weight > 0.0) == positive) sum += expf(static_cast<float>(member.log + member.ratio - top));
  }
  return top + logf(sum);
}

double linear(const Members& members) {
  const double added = log_sum_exp(members, true);
  const double taken = log_sum_exp(members, false);
  if (added != added || taken == -kInfinity) return added;
  if (taken - added >= -kCancelled) return -kInfinity;
  return added + log1p(-exp(taken - added));
}

// Sum of factor * ratio; -inf if a ratio is.
template <class Factor>
double product(const Members& members, Factor factor) {
  double sum = 0.0;
  for (const Member& member : members) {
    if (member.ratio == -kInfinity) return -kInfinity;
    sum += factor(member) * member.ratio;
  }
  return sum;
}

// The greatest ratio or the least.
double extreme(const Members& members, bool greatest) {
  double found = members[0].ratio;
  for (const Member& member : members) {
    if (member.ratio != member.ratio) return member.ratio;
    if (greatest ? member.ratio > found : member.ratio < found) found = member.ratio;
  }
  return found;
}

// The sum of the weights is e^log_size.
double power(const Members& members, double p, double log_size) {
  if (fabs(p) < kSmallestExponent) {
    return product(members, [](const Member& member) { return member.share; });
  }
  const double top = extreme(members, p > 0.0);
  if (!(fabs(top) < kInfinity)) return top;
  double more = 0.0, sum = 0.0;
  for (const Member& member : members) more += member.share * expm1f(static_cast<float>(p * (member.ratio - top)));
  if (more > -0.25) return top + (log1p(more) + log_size) / p;
  // Far from 1 the sum of what is added is the more exact one.
  for (const Member& member : members) sum += member.share * expf(static_cast<float>(p * (member.ratio - top)));
  return top + (log(sum) + log_size) / p;
}

double jensen_shannon(const Members& members) {
  const double least = extreme(members, false);
  double u = 0.0;
  if (least > kHarmonicLimit) {
    for (const Member& member : members) u += member.share * expf(static_cast<float>(least - member.ratio));
    return least - log(u);
  }
  // u = -log s, each term log(1 + e^-ratio).
  for (const Member& member : members) {
    const double small = log1pf(expf(-fabsf(static_cast<float>(member.ratio))));
    u += member.share * (member.ratio < 0.0 ? small - member.ratio : small);
  }
  return -u - log(-expm1(-u));
}

double join(const Members& members, int32_t rule, double p, double log_size) {
  switch (static_cast<Aggregator>(rule)) {
    case Aggregator::linear:
      return linear(members);
    case Aggregator::geometric:
      return product(members, [](const Member& member) { return member.weight; });
    case Aggregator::power:
      return power(members, p, log_size);
    case Aggregator::jensen_shannon:
      return jensen_shannon(members);
    case Aggregator::min:
      return extreme(members, false);
    case Aggregator::max:
      return extreme(members, true);
  }
  return 0.0;
}

}  // namespace

int64_t chunk_scores_cpu(const ChunkScoresArgs& args) {
  Members members;
  for (int64_t row = 0; row < args.rows; ++row) {
    const int32_t rule = args.aggregator[row];
    if (!rule_fits(rule, args.p[row])) return row;
    members.clear();
    double size = 0.0;
    for (int64_t i = 0; i < args.members; ++i) {
      const double weight = args.weights[row * args.members + i];
      if (weight == 0.0) continue;
      if (weight < 0.0 && !weights_have_signs(rule)) return row;
      size += fabs(weight);
      members.push_back({args.policies + (i * args.rows + row) * args.chunk, weight, 0.0, log(fabs(weight)),
                         args.carried ? args.carried[row * args.members + i] : 0.0});
    }
    for (Member& member : members) member.share = member.weight / size;
    const double log_size = fabs(size - 1.0) <= kWhole ? 0.0 : log(size);
    const float* ref = args.ref + row * args.chunk;
    bool barred = false;
    for (int64_t j = 0; j < args.chunk; ++j) {
      barred = barred || ref[j] == -kInfinity;
      double score = 0.0;
      if (barred) {
        score = -kInfinity;
      } else if (!members.empty()) {
        for (Member& member : members) member.ratio += static_cast<double>(member.logp[j]) - ref[j];
        score = join(members, rule, args.p[row], log_size);
      }
      args.out[row * args.chunk + j] = static_cast<float>(score);
    }
  }
  return -1;
}

void chunk_accept_cpu(const ChunkAcceptArgs& args) {
  for (int64_t row = 0; row < args.rows; ++row) {
    int64_t j = args.lengths[row] < args.chunk ? args.lengths[row] : args.chunk;
    while (j > 0) {
      const int64_t at = row * args.chunk + j - 1;
      if (args.log_u[at] < args.scores[at] - args.log_bound[at]) break;
      --j;
    }
    args.out[row] = static_cast<int32_t>(j > 0 ? j : 0);
  }
}

}  // namespace personafast
