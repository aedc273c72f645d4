#pragma once

#include <stdint.h>

#include "personafast/dtype.h"

namespace personafast {

// out[t, o] += sum_r scale[m] * (sum_i a[m, r, i] * x[t, i]) * b[m, o, r], r < ranks[m] and m = slots[t], both sums in
// fp32 and rounded once. A slot of -1, or of a rank of 0, leaves the row alone.
struct LoraDeltaArgs {
  void* out;             // [rows, outputs]
  int64_t out_stride;    // elements from one row to the next
  const void* x;         // [rows, features]
  int64_t x_stride;      // likewise
  const void* a;         // [adapters, rank, features], features adjacent
  int64_t a_stride_m;    // elements from one adapter to the next
  int64_t a_stride_r;    // and from one rank to the next
  const void* b;         // [adapters, outputs, rank]
  int64_t b_stride_m;    // elements from one adapter to the next
  int64_t b_stride_o;    // from one output to the next: 1 is fast, anything else is plain C++ on every machine
  int64_t b_stride_r;    // and from one rank to the next
  const int32_t* slots;  // [rows]
  const float* scale;    // [adapters]
  const int32_t* ranks;  // [adapters], taken as 0 below 0 and as `rank` above it
  int64_t rows;
  int64_t outputs;
  int64_t features;
  int64_t adapters;
  int64_t rank;
  Dtype dtype;  // of out, x, a and b
};

// Threads split the ranks, then the outputs, and both sums of a row are formed in the same order whatever else is in
// the batch: the result depends neither on `threads` nor on the other rows. Returns -1, or the first row whose slot is
// outside [-1, adapters); then nothing has been written.
int64_t lora_delta_cpu(const LoraDeltaArgs& args, int threads);

struct LoraDeltaCudaArgs {
  LoraDeltaArgs delta;
  // Memory for ceil(rows / 8) * kLoraDeltaInner * rank numbers, for two launches; or null, for one launch of clusters,
  // which needs compute capability 9.0.
  float* inner;
};

// The greatest rank that lora_delta_cuda takes; of others it returns cudaErrorInvalidValue.
constexpr int64_t kLoraDeltaCudaRank = 64;

// Numbers of `inner` for each rank of 8 rows.
constexpr int64_t kLoraDeltaInner = 64;

// See personafast/cuda.h. A row's result depends neither on the other rows nor on the device, and is the same with one
// launch and with two.
int lora_delta_cuda(const LoraDeltaCudaArgs& args, void* stream);

}  // namespace personafast
