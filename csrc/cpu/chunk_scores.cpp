// chunk_scores and chunk_accept in plain C++ for every machine: a few hundred numbers, where the call is the cost.

#include "personafast/chunk_scores.h"

#include <math.h>

#include <limits>
#include <vector>

namespace personafast {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// log of the sum of exp(terms); the sum of terms less their largest fits fp32.
double log_sum_exp(const std::vector<double>& terms) {
  double top = -kInfinity;
  for (const double term : terms) {
    if (term != term) return term;
    if (term > top) top = term;
  }
  if (fabs(top) == kInfinity) return top;
  float sum = 0.0f;
  for (const double term : terms) sum += expf(static_cast<float>(term - top));
  return top + logf(sum);
}

double weighted_sum(const std::vector<double>& terms) {
  double sum = 0.0;
  for (const double term : terms) {
    if (term == -kInfinity) return term;
    sum += term;
  }
  return sum;
}

}  // namespace

int64_t chunk_scores_cpu(const ChunkScoresArgs& args) {
  struct Member {
    const float* logp;  // [chunk]
    double weight;      // its logarithm under the linear rule
    double ratio;       // of the tokens so far
  };
  std::vector<Member> members;
  std::vector<double> terms;
  for (int64_t row = 0; row < args.rows; ++row) {
    const bool linear = args.aggregator[row] == 0;
    if (!linear && args.aggregator[row] != 1) return row;
    members.clear();
    for (int64_t i = 0; i < args.members; ++i) {
      const double weight = args.weights[row * args.members + i];
      if (weight == 0.0) continue;
      if (linear && weight < 0.0) return row;
      members.push_back({args.policies + (i * args.rows + row) * args.chunk, linear ? log(weight) : weight,
                         args.carried ? args.carried[row * args.members + i] : 0.0});
    }
    const float* ref = args.ref + row * args.chunk;
    bool barred = false;
    for (int64_t j = 0; j < args.chunk; ++j) {
      barred = barred || ref[j] == -kInfinity;
      double score = 0.0;
      if (barred) {
        score = -kInfinity;
      } else if (!members.empty()) {
        terms.clear();
        for (Member& member : members) {
          member.ratio += static_cast<double>(member.logp[j]) - ref[j];
          const bool possible = member.ratio != -kInfinity;
          terms.push_back(linear ? member.weight + member.ratio : possible ? member.weight * member.ratio : -kInfinity);
        }
        score = linear ? log_sum_exp(terms) : weighted_sum(terms);
      }
      args.out[row * args.chunk + j] = static_cast<float>(score);
    }
  }
  return -1;
}

void chunk_accept_cpu(int32_t* out, const float* scores, const float* log_bound, const float* log_u,
                      const int32_t* lengths, int64_t rows, int64_t chunk) {
  for (int64_t row = 0; row < rows; ++row) {
    int64_t j = lengths[row] < chunk ? lengths[row] : chunk;
    while (j > 0) {
      const int64_t at = row * chunk + j - 1;
      if (log_u[at] < scores[at] - log_bound[at]) break;
      --j;
    }
    out[row] = static_cast<int32_t>(j > 0 ? j : 0);
  }
}

}  // namespace personafast
