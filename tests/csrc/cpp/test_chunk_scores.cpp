#include "personafast/chunk_scores.h"

#include "check.h"

using namespace check;

static float logp(Random& random) { return random.chance(5) ? -HUGE_VALF : static_cast<float>(random.uniform(-12, 0)); }

static void one(Random& random) {
  const int64_t rows = random.between(0, 6);
  const int64_t members = random.between(0, 4);
  const int64_t chunk = random.between(0, 12);
  Buffer<float> out(random, rows * chunk, NAN);
  Buffer<float> ref(random, rows * chunk, 0);
  Buffer<float> policies(random, members * rows * chunk, 0);
  Buffer<float> weights(random, rows * members, 0);
  Buffer<float> carried(random, rows * members, 0);
  Buffer<int32_t> aggregator(random, rows, 0);
  const bool has_carried = random.chance(60);
  for (int64_t i = 0; i < ref.size(); ++i) ref[i] = logp(random);
  for (int64_t i = 0; i < policies.size(); ++i) policies[i] = logp(random);
  int64_t wrong = -1;
  for (int64_t b = 0; b < rows; ++b) {
    aggregator[b] = static_cast<int32_t>(random.between(0, 1));
    for (int64_t i = 0; i < members; ++i) {
      const double low = aggregator[b] == 1 ? -1.5 : 0.01;
      weights[b * members + i] = random.chance(20) ? 0 : static_cast<float>(random.uniform(low, 2));
      carried[b * members + i] = random.chance(5) ? -HUGE_VALF : static_cast<float>(random.uniform(-20, 20));
    }
    if (!random.chance(2)) continue;
    if (members > 0 && aggregator[b] == 0 && random.chance(50)) {
      weights[b * members + random.between(0, members - 1)] = -0.5f;
    } else {
      aggregator[b] = random.pick({-1, 2, INT32_MIN, INT32_MAX});
    }
    wrong = wrong < 0 ? b : wrong;
  }

  const int64_t got =
      personafast::chunk_scores_cpu({out.data(), ref.data(), policies.data(), weights.data(),
                                     has_carried ? carried.data() : nullptr, aggregator.data(), rows, members, chunk});
  require(got == wrong, "chunk_scores returned %lld, expected %lld", static_cast<long long>(got),
          static_cast<long long>(wrong));
  if (wrong >= 0) return;
  const double infinity = HUGE_VAL;
  for (int64_t b = 0; b < rows; ++b) {
    std::vector<double> ratio;
    for (int64_t i = 0; i < members; ++i) {
      ratio.push_back(has_carried ? static_cast<double>(carried[b * members + i]) : 0);
    }
    bool excluded = false;
    for (int64_t j = 0; j < chunk; ++j) {
      excluded = excluded || isinf(ref[b * chunk + j]);
      double top = -infinity, blend = 0, magnitude = 1;
      bool any = false, impossible = false;
      for (int64_t i = 0; i < members; ++i) {
        double& part = ratio[static_cast<size_t>(i)];
        if (!excluded) part += static_cast<double>(policies[(i * rows + b) * chunk + j]) - ref[b * chunk + j];
        const double weight = weights[b * members + i];
        if (weight == 0) continue;
        any = true;
        impossible = impossible || part == -infinity;
        top = fmax(top, part);
        if (part != -infinity) {
          blend += weight * part;
          magnitude += fabs(weight * part);
        }
      }
      double expected = blend;
      if (aggregator[b] == 0) {
        double sum = 0;
        for (int64_t i = 0; i < members && top > -infinity; ++i) {
          const double weight = weights[b * members + i];
          if (weight != 0) sum += weight * exp(ratio[static_cast<size_t>(i)] - top);
        }
        expected = top + log(sum);
        magnitude = 1 + fabs(top);
      }
      if (!any) expected = 0;
      if (excluded || (any && (aggregator[b] == 0 ? top == -infinity : impossible))) expected = -infinity;
      const float value = out[b * chunk + j];
      if (isinf(expected)) {
        require(value == -HUGE_VALF, "out[%lld, %lld] is %.9g, expected -inf", static_cast<long long>(b),
                static_cast<long long>(j), value);
      } else {
        require_close(value, expected, rounding(Dtype::f32, expected) + 1e-6 + 1e-9 * magnitude, "out", b, j);
      }
    }
  }
}

int main(int argc, char** argv) { return run(argc, argv, 3000, one); }
