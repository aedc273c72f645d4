#pragma once

#include <stdint.h>

#include "personafast/dtype.h"

namespace personafast {

// How many of a row's drafted tokens x_1 ... x_L stand, and the token after them. With target q_j and draft p_j at the
// place of x_j, probabilities whose logarithms are given, and uniforms u_j of (seed, position, accept_stream):
//   token by token  x_j stands while u_j < q_j(x_j) / p_j(x_j); the next token is drawn from (q_j - p_j)+
//   block           c_j = min(1, c_(j-1) q_j(x_j) / p_j(x_j)), R_j the sum of (c_j q_(j+1) - p_(j+1))+; all up to the
//                   last j with u_j < R_j / (R_j + 1 - c_j), or u_L < c_L, stand; the next token is drawn from
//                   (c_j q_(j+1) - p_(j+1))+
// and from q_(L+1) where all stand. A residual without any mass gives way to q.
struct VerifyDraftArgs {
  int64_t* out;             // [rows, chunk + 1]: the tokens that stand, the one drawn, then -1
  int32_t* accepted;        // [rows]: how many stand
  const void* target;       // [rows, chunk + 1, vocabulary]
  int64_t target_stride_b;  // elements from one row to the next
  int64_t target_stride_j;  // and from one place to the next
  const void* draft;        // [rows, chunk, vocabulary], or null for a draft that was certain of its tokens
  int64_t draft_stride_b;
  int64_t draft_stride_j;
  const int64_t* tokens;     // [rows, chunk]
  const int32_t* lengths;    // [rows], 0 to chunk
  const int64_t* seeds;      // [rows]
  const int64_t* positions;  // [rows], of the first drafted token
  uint32_t accept_stream;
  uint32_t sample_stream;  // of the token drawn, at its own position
  int64_t rows;
  int64_t chunk;
  int64_t vocabulary;  // at least 1
  bool block;
  Dtype dtype;  // of target and draft
};

// Threads split the rows. Returns -1; or the first row whose length, or one of whose tokens, is out of range, and then
// nothing has been written; or the first row that had nothing to draw, its drawn token -1.
int64_t verify_draft_cpu(const VerifyDraftArgs& args, int threads);

}  // namespace personafast
