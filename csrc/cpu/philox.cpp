// Philox4x32-10 (Salmon et al., SC 2011), the same bits as personafast/ops/philox.py.

#include "personafast/philox.h"

namespace personafast {
namespace {

void philox4x32(uint32_t counter[4], uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = static_cast<uint64_t>(0xD2511F53u) * counter[0];
    const uint64_t b = static_cast<uint64_t>(0xCD9E8D57u) * counter[2];
    counter[0] = static_cast<uint32_t>(b >> 32) ^ counter[1] ^ k0;
    counter[1] = static_cast<uint32_t>(b);
    counter[2] = static_cast<uint32_t>(a >> 32) ^ counter[3] ^ k1;
    counter[3] = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

double open_unit(uint32_t high, uint32_t low) {
  const uint64_t bits = static_cast<uint64_t>(high >> 6) << 26 | low >> 6;
  return static_cast<double>(2 * bits + 1) * 0x1p-53;
}

}  // namespace

void philox_uniform(double* out, const int64_t* seeds, const int64_t* positions, uint32_t stream, int64_t rows,
                    int64_t n) {
  for (int64_t b = 0; b < rows; ++b) {
    const uint64_t seed = static_cast<uint64_t>(seeds[b]);
    const uint64_t position = static_cast<uint64_t>(positions[b]);
    for (int64_t i = 0; i < n; i += 2) {
      uint32_t word[4] = {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), stream,
                          static_cast<uint32_t>(i / 2)};
      philox4x32(word, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
      out[b * n + i] = open_unit(word[0], word[1]);
      if (i + 1 < n) out[b * n + i + 1] = open_unit(word[2], word[3]);
    }
  }
}

}  // namespace personafast
