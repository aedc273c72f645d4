#include "personafast/philox.h"

#include "check.h"

using namespace check;

// Philox4x32-10 as section 3.3 of Salmon et al. (SC 2011) writes it: word j of the counter, the words of the key.
static void philox(uint32_t word[4], uint64_t key) {
  uint32_t k[2] = {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t left = uint64_t{0xD2511F53} * word[0];
    const uint64_t right = uint64_t{0xCD9E8D57} * word[2];
    const uint32_t next[4] = {static_cast<uint32_t>(right >> 32) ^ word[1] ^ k[0], static_cast<uint32_t>(right),
                              static_cast<uint32_t>(left >> 32) ^ word[3] ^ k[1], static_cast<uint32_t>(left)};
    memcpy(word, next, sizeof next);
    k[0] += 0x9E3779B9u;
    k[1] += 0xBB67AE85u;
  }
}

static void one(Random& random) {
  const int64_t rows = random.between(0, 6);
  const int64_t n = random.between(0, 33);
  const uint32_t stream = static_cast<uint32_t>(random.bits());
  Buffer<int64_t> seeds(random, rows, 0);
  Buffer<int64_t> positions(random, rows, 0);
  Buffer<double> out(random, rows * n, static_cast<double>(NAN));
  for (int64_t b = 0; b < rows; ++b) {
    seeds[b] = static_cast<int64_t>(random.bits());
    positions[b] = random.chance(20) ? random.pick({INT64_MIN, int64_t{-1}, INT64_MAX}) : random.between(0, 1 << 20);
  }
  personafast::philox_uniform(out.data(), seeds.data(), positions.data(), stream, rows, n);
  for (int64_t b = 0; b < rows; ++b) {
    for (int64_t i = 0; i < n; ++i) {
      const uint64_t position = static_cast<uint64_t>(positions[b]);
      uint32_t word[4] = {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), stream,
                          static_cast<uint32_t>(i / 2)};
      philox(word, static_cast<uint64_t>(seeds[b]));
      const uint64_t bits = uint64_t{word[i % 2 * 2] >> 6} << 26 | word[i % 2 * 2 + 1] >> 6;
      const double expected = (static_cast<double>(bits) + 0.5) * 0x1p-52;
      const double got = out[b * n + i];
      require(got == expected && got > 0 && got < 1, "out[%lld, %lld] is %.17g, expected %.17g",
              static_cast<long long>(b), static_cast<long long>(i), got, expected);
    }
  }
}

int main(int argc, char** argv) {
  // The known answer for a counter and a key of zeros, from the authors' Random123.
  uint32_t zeros[4] = {};
  philox(zeros, 0);
  require(zeros[0] == 0x6627e8d5u && zeros[1] == 0xe169c58du && zeros[2] == 0xbc57ac4cu && zeros[3] == 0x9b00dbd8u,
          "philox of zeros is not the known answer");
  return run(argc, argv, 300, one);
}
