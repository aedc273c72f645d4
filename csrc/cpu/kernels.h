#pragma once

#include <stdint.h>

#include "personafast/add_inject_rms_norm.h"
#include "personafast/aggregator.h"
#include "personafast/attend.h"
#include "personafast/dtype.h"
#include "personafast/inject.h"
#include "personafast/lora_delta.h"
#include "personafast/mask_bits.h"
#include "personafast/masked_linear.h"
#include "personafast/silu_mul.h"
#include "personafast/sparse_linear.h"
#include "personafast/steer.h"
#include "personafast/token_logprobs.h"

namespace personafast {

// Keys that are attended to together, and the columns that rows of sums are padded to.
constexpr int64_t kAttendKeys = 128;
constexpr int64_t kAttendColumns = 32;

// Rows of queries that see the same keys, a block of these, and what the rows have of the blocks before: the softmax
// over all keys is built up block by block (arXiv 1805.02867).
struct AttendBlock {
  const void* const* queries;  // [rows]
  const void* const* masks;    // [rows], at the first of all keys; null pointers without a mask
  void* const* out;            // [rows], written with the last block
  int64_t rows;
  const void* key;    // the first of the block
  const void* value;  // likewise
  const void* next;   // keys that are wanted after this block, or null
  int64_t first;      // the place of the block among all keys
  int64_t count;      // at most kAttendKeys
  bool last;
  float* scores;   // [rows, kAttendKeys], then the weights
  float* sums;     // [rows, padded]: of the weighted values
  int64_t padded;  // width, up to a multiple of kAttendColumns
  float* most;     // [rows]: the greatest score
  float* total;    // [rows]: the sum of exp(score - most)
  float* keep;     // [rows]: what sums and totals so far are multiplied by, as most has grown
};

// How the members of a blend of logits are joined. With x_i = logits_i - shift_i, and y_i = weight_i + x_i:
enum class LogitsRule : int {
  product,         // sum_i weight_i x_i
  mixture,         // log (sum_i e^y_i)+, the members from `added` on subtracted
  power,           // log (sum_i share_i e^(p y_i))^(1/p)
  jensen_shannon,  // y_0 + log(s / (1 - s)), log s = sum_i share_i log sigmoid(y_i - y_0); y_0 is the last member
  least,           // min_i y_i
  greatest,        // max_i y_i
};

// One member of a blend of logits; what is -inf after the shift is impossible.
struct LogitsMember {
  const void* logits;  // [vocabulary]
  float shift;         // subtracted from each: their largest, or NaN where they have none
  float weight;
  float share;
  float floor;  // a token of at least this, after the shift, is in the support
};

// The target of one row, -inf where the rule gives 0 or, if masked, no member supports the token.
struct LogitsBlend {
  float* out;  // [vocabulary]
  const LogitsMember* members;
  int64_t count;
  int64_t added;
  Dtype dtype;  // of the logits
  LogitsRule rule;
  float p;
  bool masked;
};

// Tokens whose largest logit logits_max notes together.
constexpr int64_t kLogitsTile = 256;

// What a draft leaves of a target: (scale * exp(target) - exp(draft))+ for every token, 0 for one that is barred.
struct Residual {
  const void* target;  // [vocabulary] log probabilities
  const void* draft;   // likewise, or null for none
  int64_t barred;      // a token, or -1
  float scale;
  Dtype dtype;  // of target and draft
};

// Tokens whose residual is summed together.
constexpr int64_t kResidualTile = 256;

// Rows of one call that share an adapter.
struct LoraGroup {
  const int64_t* rows;  // [count], where they stand in the batch
  int64_t count;
  int64_t adapter;
  int64_t rank;  // at least 1
  float* inner;  // [count, rank]: scale * A x of each row
};

// Which mask the rows of a tile multiply the weights by: none, one for all of them, or one each.
enum class Keep : int { all, shared, each };

// Rows of one call that are multiplied together. With Keep::each there are two of them.
struct LinearTile {
  const int64_t* rows;  // [count], where they stand in the batch
  int64_t count;
  Keep keep;
  int32_t slots[2];
};

struct LinearPlan {
  const LinearTile* tiles;
  int64_t count;
  const int64_t* order;  // [rows], the rows of all tiles, one after the other
  int64_t rows;
};

// Most rows a tile may have, and most where there is a gamma; most rows of a plan.
constexpr int64_t kTileRows = 6;
constexpr int64_t kSoftTileRows = 3;
constexpr int64_t kPlanRows = 64;

// Memory of a thread's own, 64 byte aligned; `packed` says that x is in it already, from another part of the same call.
struct Scratch {
  void* at;
  bool packed;
};

// Outputs that are summed side by side. Threads take whole groups, so that which outputs share one depends on nothing.
constexpr int64_t kOutputGroup = 4;

// exp(max) * sum is a sum of exponentials.
struct LogSum {
  float max;
  float sum;
};

// Logits of a row that go into its LogSum at one time.
constexpr int64_t kLogitPanel = 64;
// Sums over a row h with direction d that its new value depends on; 0 where the mode needs them not.
struct SteerSums {
  float hd;  // h.d and d.d: ablate, clamp
  float dd;
  float hh;  // h.h and m.m with m = h + (scale p0) d: norm-preserving addition
  float mm;
};

// The row becomes (keep * h + add * d) * ratio. Where keep is 1 and add is 0 it is left alone.
struct SteerUpdate {
  float keep;
  float add;
  float ratio;
};

// What `sums` mean for row t, whose slot is not -1. One function for all instruction sets, in steer.cpp.
SteerUpdate steer_update(const SteerArgs& args, int64_t t, SteerSums sums);

}  // namespace personafast

// The kernels, once a namespace of an instruction set. These are the only names that cross from an ISA unit to the host
// units, and no inline function may: the linker keeps one copy of an inline function, perhaps the one the machine
// cannot run.
namespace personafast::scalar {
#include "declarations.inc"
}
namespace personafast::avx2 {
#include "declarations.inc"
}
namespace personafast::avx512 {
#include "declarations.inc"
}
