#pragma once

#include <stdint.h>

namespace personafast {

// out[b, i] = the i-th uniform of (seeds[b], positions[b], stream): Philox4x32-10 keyed by the seed, at the counter
// (position low word, position high word, stream, i / 2). Two numbers a block, each an odd multiple of 2^-53 in (0, 1).
void philox_uniform(double* out, const int64_t* seeds, const int64_t* positions, uint32_t stream, int64_t rows,
                    int64_t n);

}  // namespace personafast
