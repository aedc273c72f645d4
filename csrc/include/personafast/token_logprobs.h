#pragma once

#include <stdint.h>

#include "personafast/dtype.h"

namespace personafast {

// out[t] = log softmax(l[t])[tokens[t]], l = f(logit_scale (head hidden[t] + bias)) / temperature[t] with
// f(l) = softcap tanh(l / softcap), or l itself where softcap is 0. Logits are fp32 and never stored.
struct TokenLogprobsArgs {
  float* out;          // [rows]
  const void* hidden;  // [rows, features]
  int64_t hidden_stride;
  const void* head;  // [vocabulary, features]
  int64_t head_stride;
  const int64_t* tokens;     // [rows]
  const float* temperature;  // [rows], or null for 1
  const void* bias;          // [vocabulary], or null
  float logit_scale;
  float softcap;
  int64_t rows;
  int64_t vocabulary;
  int64_t features;
  Dtype dtype;  // of hidden, head and bias
};

// The vocabulary is cut into at most 64 parts, whatever the threads: each keeps a running maximum and a sum of
// exponentials a row, and they are joined in order. The result depends neither on `threads` nor on the other rows.
// Returns -1, or the first row whose token is outside [0, vocabulary) or whose temperature is not above 0; then nothing
// has been written.
int64_t token_logprobs_cpu(const TokenLogprobsArgs& args, int threads);

}  // namespace personafast
