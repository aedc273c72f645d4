#pragma once

#include <stdint.h>

namespace personafast {

// out[b, j] = the log of the aggregated density ratio of the first j + 1 tokens of row b: of the exp(L_i),
// L_i = carried[b, i] + the sum of policies[i, b, :j + 1] - ref[b, :j + 1], over members of w_i = weights[b, i] != 0,
// joined as personafast/aggregator.h says. 0 without members, -inf from the first token on that ref excludes.
struct ChunkScoresArgs {
  float* out;                 // [rows, chunk]
  const float* ref;           // [rows, chunk]
  const float* policies;      // [members, rows, chunk]
  const float* weights;       // [rows, members]
  const float* carried;       // [rows, members], or null for 0
  const int32_t* aggregator;  // [rows]
  const float* p;             // [rows], the exponent of rows that have one
  int64_t rows;
  int64_t members;
  int64_t chunk;
};

// Returns -1, or the first row of an unknown rule, of an exponent that is not finite or of a negative weight where its
// rule allows none; then what has been written is of no use.
int64_t chunk_scores_cpu(const ChunkScoresArgs& args);

// See personafast/cuda.h. A row for which the CPU's returns is NaN.
int chunk_scores_cuda(const ChunkScoresArgs& args, void* stream);

// out[b] = the largest j <= lengths[b] with log_u[b, j - 1] < scores[b, j - 1] - log_bound[b, j - 1], or 0. All
// [rows, chunk] but lengths and out, [rows].
struct ChunkAcceptArgs {
  int32_t* out;
  const float* scores;
  const float* log_bound;
  const float* log_u;
  const int32_t* lengths;
  int64_t rows;
  int64_t chunk;
};

void chunk_accept_cpu(const ChunkAcceptArgs& args);

int chunk_accept_cuda(const ChunkAcceptArgs& args, void* stream);

// Both, of the scores that the first writes; `accept` has the same rows and chunk.
struct ChunkScoresAcceptArgs {
  ChunkScoresArgs scores;
  ChunkAcceptArgs accept;
};

int chunk_scores_accept_cuda(const ChunkScoresAcceptArgs& args, void* stream);

}  // namespace personafast
