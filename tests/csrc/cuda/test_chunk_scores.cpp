#include "personafast/chunk_scores.h"

#include "emulated.h"
#include "joined.h"

using namespace check;

namespace {

// Mostly as many as a draft has, and at times more than a tile.
int64_t some_chunk(Random& random) {
  if (random.chance(60)) return random.between(0, 9);
  return random.chance(50) ? random.between(30, 34) : random.between(0, 100);
}

void require_accepted(Buffer<int32_t>& got, Buffer<float>& scores, Buffer<float>& log_bound, Buffer<float>& log_u,
                      Buffer<int32_t>& lengths, int64_t chunk, const char* name) {
  for (int64_t b = 0; b < got.size(); ++b) {
    int32_t expected = 0;
    for (int32_t j = 1; j <= lengths[b] && j <= chunk; ++j) {
      const int64_t at = b * chunk + j - 1;
      if (log_u[at] < scores[at] - log_bound[at]) expected = j;
    }
    require(got[b] == expected, "%s[%lld] is %d, expected %d", name, static_cast<long long>(b), got[b], expected);
  }
}

void one(Random& random) {
  const int64_t rows = random.between(0, 4);
  const int64_t members = random.chance(70) ? random.between(0, 5) : random.between(6, 70);
  const int64_t chunk = some_chunk(random);
  Buffer<float> out(random, rows * chunk, 77);
  Buffer<float> ref(random, rows * chunk, 0);
  Buffer<float> policies(random, members * rows * chunk, 0);
  Buffer<float> weights(random, rows * members, 0);
  Buffer<float> carried(random, rows * members, 0);
  Buffer<int32_t> aggregator(random, rows, 0);
  Buffer<float> p(random, rows, 0);
  Buffer<float> log_bound(random, rows * chunk, 0);
  Buffer<float> log_u(random, rows * chunk, 0);
  Buffer<int32_t> lengths(random, rows, 0);
  Buffer<int32_t> accepted(random, rows, -77);
  const bool has_carried = random.chance(60);
  const int barred = random.pick({0, 1, 5});  // %
  for (int64_t i = 0; i < ref.size(); ++i) {
    ref[i] = random.chance(barred) ? -HUGE_VALF : static_cast<float>(random.uniform(-12, 0));
    log_bound[i] = static_cast<float>(random.uniform(-20, 20));
    log_u[i] = static_cast<float>(random.uniform(-3, 0));
  }
  for (int64_t i = 0; i < policies.size(); ++i) {
    policies[i] = random.chance(barred) ? -HUGE_VALF : static_cast<float>(random.uniform(-12, 0));
  }
  std::vector<bool> fault;
  for (int64_t b = 0; b < rows; ++b) {
    lengths[b] =
        random.chance(5) ? random.pick({INT32_MIN, INT32_MAX, -1}) : static_cast<int32_t>(random.between(0, chunk));
    aggregator[b] = static_cast<int32_t>(random.between(0, 5));
    p[b] = random.pick({-3.0f, -1.0f, -0.5f, 0.0f, 1e-3f, 0.5f, 1.0f, 2.0f});
    const bool signs = random.chance(30);
    const bool whole = random.chance(20);
    const bool high = random.chance(20);  // where e^-ratio is 0
    for (int64_t i = 0; i < members; ++i) {
      const double low = aggregator[b] < 2 && signs ? -1.5 : 0.01;
      weights[b * members + i] = random.chance(20) ? 0 : static_cast<float>(random.uniform(low, 2));
      if (whole) weights[b * members + i] = 1.0f / static_cast<float>(members);
      carried[b * members + i] =
          random.chance(2) ? -HUGE_VALF : static_cast<float>(random.uniform(-40, 40) + (high ? 300 : 0));
    }
    fault.push_back(random.chance(4));
    if (!fault.back()) {
      if (aggregator[b] != 2 && random.chance(10)) p[b] = NAN;  // no rule but the power has an exponent
      continue;
    }
    if (members > 0 && aggregator[b] > 1 && random.chance(50)) {
      weights[b * members + random.between(0, members - 1)] = -0.5f;
    } else if (aggregator[b] == 2) {
      p[b] = random.pick({NAN, HUGE_VALF, -HUGE_VALF});
    } else {
      aggregator[b] = random.pick({-1, 6, INT32_MIN, INT32_MAX});
    }
  }

  const personafast::ChunkScoresArgs args = {out.data(),
                                             ref.data(),
                                             policies.data(),
                                             weights.data(),
                                             has_carried ? carried.data() : nullptr,
                                             aggregator.data(),
                                             p.data(),
                                             rows,
                                             members,
                                             chunk};
  require_launched(personafast::chunk_scores_cuda(args, nullptr));
  for (int64_t b = 0; b < rows; ++b) {
    std::vector<double> ratio;
    for (int64_t i = 0; i < members; ++i) {
      ratio.push_back(has_carried ? static_cast<double>(carried[b * members + i]) : 0);
    }
    bool excluded = false;
    for (int64_t j = 0; j < chunk; ++j) {
      const float value = out[b * chunk + j];
      if (fault[static_cast<size_t>(b)]) {
        require(isnan(value), "out[%lld, %lld] of a row at fault is %.9g", static_cast<long long>(b),
                static_cast<long long>(j), static_cast<double>(value));
        continue;
      }
      excluded = excluded || isinf(ref[b * chunk + j]);
      std::vector<Part> parts;
      double size = 0, total = 0, spread = 0;
      for (int64_t i = 0; i < members; ++i) {
        double& sum = ratio[static_cast<size_t>(i)];
        if (!excluded) sum += static_cast<double>(policies[(i * rows + b) * chunk + j]) - ref[b * chunk + j];
        const double weight = weights[b * members + i];
        if (weight != 0) parts.push_back({weight, sum});
        total += weight;
        if (!isinf(sum)) spread = fmax(spread, 2 * fabs(sum));
        size += fabs(weight) * (1 + (isinf(sum) ? 0 : fabs(sum)));
      }
      double error = 2e-6 + 1e-7 * static_cast<double>(members);
      const personafast::Aggregator rule = static_cast<personafast::Aggregator>(aggregator[b]);
      const double expected = excluded ? -HUGE_VAL : parts.empty() ? 0 : join(parts, rule, p[b], &error);
      if (rule == personafast::Aggregator::power && p[b] != 0 && total > 0) {
        // What is divided by p are logarithms of fp32, that of the weights 0 where they sum to 1 but for their
        // rounding.
        const double scale = log(total) / static_cast<double>(p[b]);
        error += 3e-7 * (fabs(scale) + spread + (isinf(expected) ? 0 : fabs(expected)));
        if (fabs(total - 1) <= 1e-6) error += fabs(scale);
      }
      if (error > 1e-2) continue;  // what a difference leaves is rounding
      if (isinf(expected)) {
        require(value == -HUGE_VALF, "out[%lld, %lld] is %.9g, expected -inf", static_cast<long long>(b),
                static_cast<long long>(j), static_cast<double>(value));
      } else {
        require_close(value, expected, rounding(Dtype::f32, expected) + 1e-13 * size + error, "out", b, j);
      }
    }
  }

  personafast::ChunkAcceptArgs accept = {
      accepted.data(), out.data(), log_bound.data(), log_u.data(), lengths.data(), rows, chunk};
  require_launched(personafast::chunk_accept_cuda(accept, nullptr));
  require_accepted(accepted, out, log_bound, log_u, lengths, chunk, "accepted");

  // Both at once: the same bits in any order of threads, and the same places.
  Buffer<float> again(random, rows * chunk, 77);
  Buffer<int32_t> at_once(random, rows, -77);
  personafast::ChunkScoresAcceptArgs both = {args, accept};
  both.scores.out = again.data();
  both.accept.scores = again.data();
  both.accept.out = at_once.data();
  emulator::schedule ^= 1;
  require_launched(personafast::chunk_scores_accept_cuda(both, nullptr));
  for (int64_t i = 0; i < out.size(); ++i) {
    require(memcmp(&out[i], &again[i], sizeof(float)) == 0, "scores[%lld] differ", static_cast<long long>(i));
  }
  require_accepted(at_once, again, log_bound, log_u, lengths, chunk, "accepted at once");
}

}  // namespace

int main(int argc, char** argv) { return run_emulated(argc, argv, 1000, one); }
