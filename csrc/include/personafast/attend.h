#pragma once

#include <stdint.h>

#include "personafast/dtype.h"

namespace personafast {

// out[b, h, j] = sum_i w_i value[b, k, i] / sum_i w_i, w_i = exp(scale query[b, h, j] . key[b, k, i] + mask[b, j, i]),
// where head h attends to key head k = h / groups: scaled dot-product attention (arXiv 1706.03762, eq. 1) with grouped
// heads (arXiv 2305.13245). Scores, weights and sums are fp32, and the quotient is rounded once. A query that the mask
// lets see nothing gets zeros.
//
// A (b, k) is one thread's, its keys in blocks and its rows in one order: nothing depends on what else is computed.
struct AttendArgs {
  void* out;  // [batch, key_heads * groups, queries, width]
  int64_t out_stride_b;
  int64_t out_stride_h;
  int64_t out_stride_q;
  const void* query;  // likewise
  int64_t query_stride_b;
  int64_t query_stride_h;
  int64_t query_stride_q;
  const void* key;  // [batch, key_heads, keys, width]
  int64_t key_stride_b;
  int64_t key_stride_h;
  int64_t key_stride_n;
  const void* value;  // likewise
  int64_t value_stride_b;
  int64_t value_stride_h;
  int64_t value_stride_n;
  const void* mask;  // [batch, queries, keys], or null: bytes, of which 0 hides a key, or numbers that are added
  int64_t mask_stride_b;
  int64_t mask_stride_q;
  bool mask_adds;
  float scale;
  int64_t batch;
  int64_t key_heads;
  int64_t groups;
  int64_t queries;
  int64_t keys;
  int64_t width;
  Dtype dtype;  // of all but a mask of bytes
};

void attend_cpu(const AttendArgs& args, int threads);

}  // namespace personafast
