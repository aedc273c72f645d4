#include "personafast/aggregate_logits.h"

#include <algorithm>

#include "check.h"
#include "personafast/aggregator.h"

using namespace check;

constexpr double kInfinity = HUGE_VAL;

using Row = std::vector<double>;

static Row log_softmax(const Row& logits) {
  const double top = *std::max_element(logits.begin(), logits.end());
  double whole = 0;
  for (const double logit : logits) whole += exp(logit - top);
  Row result;
  for (const double logit : logits) result.push_back(logit - top - log(whole));
  return result;
}

struct Member {
  Row logp;
  double weight;
  double carried;
};

// The target of one row, and what its rounding errors are proportional to. False where a token is too near the edge of
// the support, or of what a difference leaves, to tell in fp32 on which side it is.
struct Target {
  Row logp;
  double magnitude = 10;
  bool clear = true;

  void support(const std::vector<const Row*>& rows, double min_p) {
    std::vector<bool> kept(logp.size());
    for (const Row* row : rows) {
      const double floor = *std::max_element(row->begin(), row->end()) + log(min_p);
      for (size_t v = 0; v < row->size(); ++v) {
        const double above = (*row)[v] - floor;
        if (above != 0 && fabs(above) < 1e-4) clear = false;
        if (above >= 0) kept[v] = true;
      }
    }
    for (size_t v = 0; v < logp.size(); ++v) logp[v] = kept[v] ? logp[v] : -kInfinity;
  }

  bool any() const { return *std::max_element(logp.begin(), logp.end()) > -kInfinity; }

  // log sum_i w_i e^(carried_i + logp_i) of one token.
  double linear(const std::vector<Member>& members, size_t v) {
    double top = -kInfinity, added = 0, taken = 0;
    for (const Member& member : members) top = fmax(top, member.carried + member.logp[v]);
    for (const Member& member : members) {
      const double part = top > -kInfinity ? fabs(member.weight) * exp(member.carried + member.logp[v] - top) : 0;
      (member.weight > 0 ? added : taken) += part;
    }
    if (taken > 0 && fabs(added - taken) < 1e-3 * added) clear = false;
    return added > taken ? top + log(added - taken) : -kInfinity;
  }

  // Of the other rules, whose weights are normalised.
  double mean(const std::vector<Member>& members, const Row& ref, personafast::Aggregator rule, double p, size_t v) {
    double total = 0, least = kInfinity, greatest = -kInfinity;
    for (const Member& member : members) {
      total += member.weight;
      least = fmin(least, member.carried + member.logp[v]);
      greatest = fmax(greatest, member.carried + member.logp[v]);
    }
    if (rule == personafast::Aggregator::max) return greatest;
    const bool all = rule != personafast::Aggregator::power || p <= 0;
    if (rule == personafast::Aggregator::min || greatest == -kInfinity || (all && least == -kInfinity)) return least;
    if (rule == personafast::Aggregator::jensen_shannon && ref[v] == -kInfinity) return -kInfinity;
    double sum = 0;
    for (const Member& member : members) {
      const double y = member.carried + member.logp[v], share = member.weight / total;
      if (rule == personafast::Aggregator::jensen_shannon) {
        const double ratio = y - ref[v];
        sum += share * (ratio < 0 ? log1p(exp(ratio)) - ratio : log1p(exp(-ratio)));
      } else {
        sum += p == 0 ? share * y : share * exp(p * (y - (p > 0 ? greatest : least)));
      }
    }
    if (rule == personafast::Aggregator::jensen_shannon) return ref[v] - sum - log(-expm1(-sum));
    return p == 0 ? sum : (p > 0 ? greatest : least) + log(sum) / p;
  }
};

static Target aggregate(const Row& ref, const std::vector<Member>& members, personafast::Aggregator rule, double p,
                        double min_p) {
  Target target;
  std::vector<const Row*> supporters;
  const bool linear = rule == personafast::Aggregator::linear;
  for (const Member& member : members) {
    if (!linear || member.weight > 0) supporters.push_back(&member.logp);
  }
  if (members.empty()) {
    target.logp = ref;
    supporters.push_back(&ref);
  } else if (rule == personafast::Aggregator::geometric) {
    double rest = 1;
    for (const Member& member : members) rest -= member.weight;
    std::vector<Member> factors = members;
    if (fabs(rest) > 1e-6) factors.push_back({ref, rest, 0});
    if (rest > 1e-6) supporters.push_back(&ref);
    for (size_t v = 0; v < ref.size(); ++v) {
      double sum = 0, size = 0;
      bool barred = false;
      for (const Member& factor : factors) {
        barred = barred || factor.logp[v] == -kInfinity;
        if (barred) break;
        sum += factor.weight * factor.logp[v];
        size += fabs(factor.weight * factor.logp[v]);
      }
      target.logp.push_back(barred ? -kInfinity : sum);
      target.magnitude = fmax(target.magnitude, size);
    }
  } else {
    for (size_t v = 0; v < ref.size(); ++v) {
      target.logp.push_back(linear ? target.linear(members, v) : target.mean(members, ref, rule, p, v));
    }
    // An exponent of less than 1 makes more of the errors, a difference up to 1000 times as much.
    for (const Member& member : members) target.magnitude = fmax(target.magnitude, member.weight < 0 ? 1e4 : 40);
  }
  if (min_p > 0) target.support(supporters, min_p);
  if (target.any()) target.logp = log_softmax(target.logp);
  return target;
}

static void fill_logits(Random& random, Tensor& logits, int64_t rows, int64_t vocabulary, int64_t member) {
  const int none = static_cast<int>(random.pick<int64_t>({0, 0, 5, 70}));
  for (int64_t b = 0; b < rows; ++b) {
    const int64_t one = random.between(0, vocabulary - 1);  // at least one token is possible
    for (int64_t v = 0; v < vocabulary; ++v) {
      const double logit = v != one && random.chance(none) ? -kInfinity : random.uniform(-8, 8);
      member < 0 ? logits.set(logit, b, v) : logits.set(logit, member, b, v);
    }
  }
}

static void one(Random& random) {
  const bool large = random.chance(1);  // enough to wake threads
  const bool wide = random.chance(4);   // more than one block
  const int64_t rows = large ? random.between(1, 3) : random.between(0, 4);
  const int64_t members = random.between(large ? 1 : 0, 3);
  const int64_t vocabulary = large  ? random.between(140000, 150000)
                             : wide ? random.pick<int64_t>({4096, 8192, random.between(4000, 9000)})
                                    : random.size(300);
  const Dtype dtype = random.dtype();

  Buffer<float> out(random, rows * vocabulary, NAN);
  Tensor ref(random, dtype, {rows, vocabulary}, Tensor::gapped(random, {rows, vocabulary}));
  Tensor policies(random, dtype, {members, rows, vocabulary}, Tensor::gapped(random, {members, rows, vocabulary}));
  Buffer<float> weights(random, rows * members, 0);
  Buffer<float> carried(random, rows * members, 0);
  Buffer<int32_t> aggregator(random, rows, 0);
  Buffer<float> p(random, rows, 0);
  Buffer<float> min_p(random, rows, 0);
  const bool has_carried = random.chance(60);
  if (vocabulary > 0) {
    fill_logits(random, ref, rows, vocabulary, -1);
    for (int64_t i = 0; i < members; ++i) fill_logits(random, policies, rows, vocabulary, i);
  }
  for (int64_t b = 0; b < rows; ++b) {
    aggregator[b] = static_cast<int32_t>(random.between(0, 5));
    p[b] = random.pick({-3.0f, -1.0f, -0.5f, 0.0f, 0.5f, 1.0f, 2.0f});
    min_p[b] = random.chance(40) ? 0 : random.chance(10) ? 1 : static_cast<float>(random.uniform(0.001, 0.4));
    for (int64_t i = 0; i < members; ++i) {
      // In eighths, so that sums are exact and 1 is often their sum.
      const int64_t eighths = random.pick<int64_t>({0, 2, 4, 8, aggregator[b] < 2 ? random.between(-8, 16) : 3});
      weights[b * members + i] = static_cast<float>(eighths) / 8;
      carried[b * members + i] = random.chance(10) ? -HUGE_VALF : static_cast<float>(random.uniform(-10, 10));
    }
  }
  int64_t wrong = -1;
  if (rows > 0 && random.chance(5)) {
    wrong = random.between(0, rows - 1);
    const int64_t what = random.between(0, members > 0 ? 3 : 2);
    if (what == 0) aggregator[wrong] = random.pick({-1, 6, INT32_MIN, INT32_MAX});
    if (what == 1) min_p[wrong] = random.pick({-0.1f, 1.1f, NAN, HUGE_VALF});
    if (what == 2) {
      aggregator[wrong] = 2;
      p[wrong] = random.pick({NAN, HUGE_VALF, -HUGE_VALF});
    }
    if (what == 3) {
      aggregator[wrong] = static_cast<int32_t>(random.between(2, 5));
      weights[wrong * members + random.between(0, members - 1)] = -0.5f;
    }
  }

  const personafast::AggregateLogitsArgs args = {out.data(),
                                                 ref.data(),
                                                 ref.stride(0),
                                                 policies.data(),
                                                 policies.stride(0),
                                                 policies.stride(1),
                                                 weights.data(),
                                                 has_carried ? carried.data() : nullptr,
                                                 aggregator.data(),
                                                 p.data(),
                                                 min_p.data(),
                                                 rows,
                                                 members,
                                                 vocabulary,
                                                 dtype};
  const int64_t got = personafast::aggregate_logits_cpu(args, static_cast<int>(random.between(1, 4)));
  require(got == wrong, "aggregate_logits returned %lld, expected %lld", static_cast<long long>(got),
          static_cast<long long>(wrong));
  if (wrong >= 0) {
    for (int64_t i = 0; i < out.size(); ++i) require(isnan(out[i]), "out was written although a row is wrong");
    return;
  }
  for (int64_t b = 0; b < rows && vocabulary > 0; ++b) {
    Row logits;
    for (int64_t v = 0; v < vocabulary; ++v) logits.push_back(ref.get(b, v));
    const Row logp0 = log_softmax(logits);
    std::vector<Member> used;
    for (int64_t i = 0; i < members; ++i) {
      const double weight = weights[b * members + i];
      if (weight == 0) continue;
      for (int64_t v = 0; v < vocabulary; ++v) logits[static_cast<size_t>(v)] = policies.get(i, b, v);
      const double log_ratio = has_carried ? static_cast<double>(carried[b * members + i]) : 0;
      used.push_back({log_softmax(logits), weight, log_ratio});
    }
    const Target target = aggregate(logp0, used, static_cast<personafast::Aggregator>(aggregator[b]), p[b], min_p[b]);
    for (int64_t v = 0; target.clear && v < vocabulary; ++v) {
      const double expected = target.logp[static_cast<size_t>(v)];
      const double value = out[b * vocabulary + v];
      if (isinf(expected)) {
        require(value == -kInfinity, "out[%lld, %lld] is %.9g, expected -inf", static_cast<long long>(b),
                static_cast<long long>(v), value);
      } else {
        require_close(value, expected, 2e-6 * (target.magnitude + fabs(expected)), "out", b, v);
      }
    }
  }

  Buffer<float> again(random, rows * vocabulary, NAN);
  personafast::AggregateLogitsArgs other = args;
  other.out = again.data();
  personafast::aggregate_logits_cpu(other, 1);
  for (int64_t i = 0; i < out.size(); ++i) require(again[i] == out[i], "out depends on the number of threads");

  if (rows == 0 || vocabulary == 0) return;
  const int64_t b = random.between(0, rows - 1);
  other.ref = ref.at(b, 0);
  other.policies = members > 0 ? policies.at(0, b, 0) : nullptr;
  other.weights = weights.data() + b * members;
  other.carried = has_carried && members > 0 ? carried.data() + b * members : nullptr;
  other.aggregator = aggregator.data() + b;
  other.p = p.data() + b;
  other.min_p = min_p.data() + b;
  other.rows = 1;
  personafast::aggregate_logits_cpu(other, 1);
  for (int64_t v = 0; v < vocabulary; ++v) {
    require(again[v] == out[b * vocabulary + v], "out[%lld, %lld] depends on the other rows", static_cast<long long>(b),
            static_cast<long long>(v));
  }
}

int main(int argc, char** argv) { return run(argc, argv, 800, one); }
