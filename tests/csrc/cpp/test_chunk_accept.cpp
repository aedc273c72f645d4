#include "check.h"
#include "personafast/chunk_scores.h"

using namespace check;

static void one(Random& random) {
  const int64_t rows = random.between(0, 6);
  const int64_t chunk = random.between(0, 20);
  Buffer<float> scores(random, rows * chunk, 0);
  Buffer<float> log_bound(random, rows * chunk, 0);
  Buffer<float> log_u(random, rows * chunk, 0);
  Buffer<int32_t> lengths(random, rows, 0);
  Buffer<int32_t> out(random, rows, -77);
  for (int64_t i = 0; i < rows * chunk; ++i) {
    scores[i] =
        random.chance(10) ? random.pick({-HUGE_VALF, HUGE_VALF, NAN}) : static_cast<float>(random.uniform(-3, 3));
    log_bound[i] = static_cast<float>(random.uniform(-1, 3));
    log_u[i] = static_cast<float>(random.uniform(-3, 0));
  }
  for (int64_t b = 0; b < rows; ++b) {
    const int64_t length = random.chance(5) ? random.pick<int64_t>({INT32_MIN, INT32_MAX}) : random.between(0, chunk);
    lengths[b] = static_cast<int32_t>(length);
  }
  personafast::chunk_accept_cpu(
      {out.data(), scores.data(), log_bound.data(), log_u.data(), lengths.data(), rows, chunk});
  for (int64_t b = 0; b < rows; ++b) {
    int32_t expected = 0;
    for (int32_t j = 1; j <= lengths[b] && j <= chunk; ++j) {
      const int64_t at = b * chunk + j - 1;
      if (log_u[at] < scores[at] - log_bound[at]) expected = j;
    }
    require(out[b] == expected, "out[%lld] is %d, expected %d", static_cast<long long>(b), out[b], expected);
  }
}

int main(int argc, char** argv) { return run(argc, argv, 2000, one); }
