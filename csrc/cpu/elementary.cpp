#include "personafast/elementary.h"

#include "host.h"

namespace personafast {

void exp_cpu(const float* x, float* out, int64_t count) { PERSONAFAST_RUN(isa_chosen(), exp_each, x, out, count); }

void expm1_cpu(const float* x, float* out, int64_t count) { PERSONAFAST_RUN(isa_chosen(), expm1_each, x, out, count); }

void log1p_cpu(const float* x, float* out, int64_t count) { PERSONAFAST_RUN(isa_chosen(), log1p_each, x, out, count); }

void log_cpu(const float* x, float* out, int64_t count) { PERSONAFAST_RUN(isa_chosen(), log_each, x, out, count); }

}  // namespace personafast
