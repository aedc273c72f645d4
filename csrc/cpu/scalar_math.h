#pragma once

#include <math.h>

// exp, log, expm1 and log1p of the scalar units are those of libm, by the names the other units give theirs. They have
// internal linkage, so no other unit can be given this copy.
namespace personafast::scalar {
namespace {

inline float exp_ps(float x) { return expf(x); }

inline float log_ps(float x) { return logf(x); }

inline float expm1_ps(float x) { return expm1f(x); }

inline float log1p_ps(float x) { return log1pf(x); }

}  // namespace
}  // namespace personafast::scalar
