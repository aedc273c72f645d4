#pragma once

#include <math.h>

// exp and log of the scalar units are those of libm, by the names the other units give theirs. They have internal
// linkage, so no other unit can be given this copy.
namespace personafast::scalar {
namespace {

inline float exp_ps(float x) { return expf(x); }

inline float log_ps(float x) { return logf(x); }

}  // namespace
}  // namespace personafast::scalar
