#pragma once

#include <stdint.h>

#include "personafast/dtype.h"
#include "personafast/inject.h"
#include "personafast/lora_delta.h"
#include "personafast/mask_bits.h"
#include "personafast/masked_linear.h"

namespace personafast {

// One member of a blend of logits; what is -inf after the shift is impossible.
struct LogitsMember {
  const void* logits;  // [vocabulary]
  float shift;         // subtracted from each: their largest, or NaN where they have none
  float weight;        // geometric: its coefficient; mixture: the log of its share, less the log of its sum of exp
  float floor;         // a token of at least this, after the shift, is in the support
};

// The target of one row: the sum of weight * (logits - shift), or for a mixture log of the sum of
// exp(weight + logits - shift), -inf where a member bars the token or, if masked, no member supports it.
struct LogitsBlend {
  float* out;  // [vocabulary]
  const LogitsMember* members;
  int64_t count;
  Dtype dtype;  // of the logits
  bool mixture;
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

}  // namespace personafast

// One namespace an instruction set. These are the only names that cross from an ISA unit to the dispatch, and no inline
// function may: the linker keeps one copy of an inline function, perhaps the one the machine cannot run.
#define PERSONAFAST_DECLARE_KERNELS(isa)                                                                   \
  namespace personafast::isa {                                                                             \
  void exp_each(const float* x, float* out, int64_t count);                                                \
  void log_each(const float* x, float* out, int64_t count);                                                \
  void logits_max(const void* logits, Dtype dtype, int64_t begin, int64_t end, float* maxima);             \
  void logits_sum_exp(const void* logits, Dtype dtype, int64_t begin, int64_t end, float max, float* sum); \
  void logits_blend(const LogitsBlend& blend, int64_t begin, int64_t end, float* max);                     \
  void logits_shift(float* out, int64_t begin, int64_t end, float norm);                                   \
  void inject_rows(const InjectArgs& args, int64_t begin, int64_t end);                                    \
  void pack_mask_rows(const MaskBitsArgs& args, int64_t begin, int64_t end);                               \
  void unpack_mask_rows(const MaskBitsArgs& args, int64_t begin, int64_t end);                             \
  void masked_linear_outputs(const MaskedLinearArgs& args, int64_t begin, int64_t end);                    \
  void lora_delta_inner(const LoraDeltaArgs& args, const LoraGroup& group, int64_t begin, int64_t end);    \
  void lora_delta_outputs(const LoraDeltaArgs& args, const LoraGroup& group, int64_t begin, int64_t end);  \
  void residual_sums(const Residual& residual, int64_t begin, int64_t end, float* sums);                   \
  void residual_weights(const Residual& residual, int64_t begin, int64_t end, float* weights);             \
  }

PERSONAFAST_DECLARE_KERNELS(scalar)
PERSONAFAST_DECLARE_KERNELS(avx2)
PERSONAFAST_DECLARE_KERNELS(avx512)

#undef PERSONAFAST_DECLARE_KERNELS
