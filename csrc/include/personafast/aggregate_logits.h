#pragma once

#include <stdint.h>

#include "personafast/dtype.h"

namespace personafast {

// out[b, :] = the normalised log probabilities of row b's target: with pi_0 and pi_i the softmax of ref[b] and of
// policies[i, b], pi_0 times the ratios exp(carried[b, i]) pi_i / pi_0 of the members, w_i = weights[b, i] != 0, joined
// as personafast/aggregator.h says; carried does not count under the geometric rule, whose reference is left out where
// 1 - sum_i w_i is less than 1e-6. Then only tokens whose probability under at least one member is min_p times that
// member's largest: members of negative weight are none of a linear target, the reference is one of the geometric
// target while 1 - sum_i w_i > 1e-6. A row without members is the reference's; one left without any token is -inf.
struct AggregateLogitsArgs {
  float* out;                 // [rows, vocabulary]
  const void* ref;            // [rows, vocabulary] raw logits
  int64_t ref_stride;         // elements from one row to the next
  const void* policies;       // [members, rows, vocabulary] raw logits
  int64_t policy_stride_n;    // elements from one policy to the next
  int64_t policy_stride_b;    // and from one row to the next
  const float* weights;       // [rows, members]
  const float* carried;       // [rows, members], or null for 0
  const int32_t* aggregator;  // [rows]
  const float* p;             // [rows], the exponent of rows that have one
  const float* min_p;         // [rows], 0 to 1
  int64_t rows;
  int64_t members;
  int64_t vocabulary;
  Dtype dtype;  // of ref and policies
};

// Threads split the rows, or the blocks of a row where rows are few. What is summed over a row is summed over blocks of
// fixed size and these in their order, so the result depends neither on `threads` nor on the other rows. Returns -1, or
// the first row of an unknown rule, of an exponent that is not finite, of a negative weight where its rule allows none
// or of a min_p that is not 0 to 1; then nothing has been written.
int64_t aggregate_logits_cpu(const AggregateLogitsArgs& args, int threads);

}  // namespace personafast
