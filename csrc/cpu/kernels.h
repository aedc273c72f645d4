#pragma once

#include <stdint.h>

#include "personafast/inject.h"
#include "personafast/lora_delta.h"
#include "personafast/masked_linear.h"

namespace personafast {

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
#define PERSONAFAST_DECLARE_KERNELS(isa)                                                                  \
  namespace personafast::isa {                                                                            \
  void exp_each(const float* x, float* out, int64_t count);                                               \
  void log_each(const float* x, float* out, int64_t count);                                               \
  void inject_rows(const InjectArgs& args, int64_t begin, int64_t end);                                   \
  void masked_linear_outputs(const MaskedLinearArgs& args, int64_t begin, int64_t end);                   \
  void lora_delta_inner(const LoraDeltaArgs& args, const LoraGroup& group, int64_t begin, int64_t end);   \
  void lora_delta_outputs(const LoraDeltaArgs& args, const LoraGroup& group, int64_t begin, int64_t end); \
  }

PERSONAFAST_DECLARE_KERNELS(scalar)
PERSONAFAST_DECLARE_KERNELS(avx2)
PERSONAFAST_DECLARE_KERNELS(avx512)

#undef PERSONAFAST_DECLARE_KERNELS
