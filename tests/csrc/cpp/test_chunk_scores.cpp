#include "personafast/chunk_scores.h"

#include "joined.h"

using namespace check;

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
  Buffer<float> p(random, rows, 0);
  const bool has_carried = random.chance(60);
  for (int64_t i = 0; i < ref.size(); ++i) ref[i] = logp(random);
  for (int64_t i = 0; i < policies.size(); ++i) policies[i] = logp(random);
  int64_t wrong = -1;
  for (int64_t b = 0; b < rows; ++b) {
    aggregator[b] = static_cast<int32_t>(random.between(0, 5));
    p[b] = random.pick({-3.0f, -1.0f, -0.5f, 0.0f, 0.5f, 1.0f, 2.0f});
    for (int64_t i = 0; i < members; ++i) {
      const double low = aggregator[b] < 2 ? -1.5 : 0.01;
      weights[b * members + i] = random.chance(20) ? 0 : static_cast<float>(random.uniform(low, 2));
      carried[b * members + i] = random.chance(5) ? -HUGE_VALF : static_cast<float>(random.uniform(-20, 20));
    }
    if (!random.chance(2)) continue;
    if (members > 0 && aggregator[b] > 1 && random.chance(50)) {
      weights[b * members + random.between(0, members - 1)] = -0.5f;
    } else if (aggregator[b] == 2) {
      p[b] = random.pick({NAN, HUGE_VALF, -HUGE_VALF});
    } else {
      aggregator[b] = random.pick({-1, 6, INT32_MIN, INT32_MAX});
    }
    wrong = wrong < 0 ? b : wrong;
  }

  const int64_t got = personafast::chunk_scores_cpu({out.data(), ref.data(), policies.data(), weights.data(),
                                                     has_carried ? carried.data() : nullptr, aggregator.data(),
                                                     p.data(), rows, members, chunk});
  require(got == wrong, "chunk_scores returned %lld, expected %lld", static_cast<long long>(got),
          static_cast<long long>(wrong));
  if (wrong >= 0) return;
  for (int64_t b = 0; b < rows; ++b) {
    std::vector<double> ratio;
    for (int64_t i = 0; i < members; ++i) {
      ratio.push_back(has_carried ? static_cast<double>(carried[b * members + i]) : 0);
    }
    bool excluded = false;
    for (int64_t j = 0; j < chunk; ++j) {
      excluded = excluded || isinf(ref[b * chunk + j]);
      std::vector<Part> parts;
      for (int64_t i = 0; i < members; ++i) {
        double& sum = ratio[static_cast<size_t>(i)];
        if (!excluded) sum += static_cast<double>(policies[(i * rows + b) * chunk + j]) - ref[b * chunk + j];
        if (weights[b * members + i] != 0) parts.push_back({weights[b * members + i], sum});
      }
      double error = 2e-6;
      const personafast::Aggregator rule = static_cast<personafast::Aggregator>(aggregator[b]);
      const double expected = excluded ? -HUGE_VAL : parts.empty() ? 0 : join(parts, rule, p[b], &error);
      const float value = out[b * chunk + j];
      if (error > 1e-3) continue;  // what a difference leaves is rounding
      if (isinf(expected)) {
        require(value == -HUGE_VALF, "out[%lld, %lld] is %.9g, expected -inf", static_cast<long long>(b),
                static_cast<long long>(j), value);
      } else {
        require_close(value, expected, rounding(Dtype::f32, expected) + error, "out", b, j);
      }
    }
  }
}

int main(int argc, char** argv) { return run(argc, argv, 3000, one); }
