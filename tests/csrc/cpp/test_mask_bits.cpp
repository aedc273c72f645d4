#include "personafast/mask_bits.h"

#include "check.h"

using namespace check;

static int64_t stored(int64_t rows, int64_t width, int64_t stride) {
  return rows == 0 || width == 0 ? 0 : (rows - 1) * stride + width;
}

static void one(Random& random) {
  const bool large = random.chance(1);  // enough to wake threads
  const int64_t rows = large ? random.between(9000, 10000) : random.between(0, 9);
  const int64_t columns = large ? random.between(250, 300) : random.size(300);
  const int64_t words = (columns + 31) / 32;
  const int threads = static_cast<int>(random.between(1, 4));

  const int64_t stride = columns + random.pick<int64_t>({0, 0, 1, 5});
  Buffer<uint8_t> bytes(random, stored(rows, columns, stride), 0xff);
  for (int64_t o = 0; o < rows; ++o) {
    for (int64_t i = 0; i < columns; ++i) bytes[o * stride + i] = random.pick<uint8_t>({0, 0, 1, 1, 1, 2, 0x80, 0xff});
  }
  Buffer<uint32_t> packed(random, rows * words, 0x5a5a5a5au);
  personafast::pack_mask_cpu({bytes.data(), stride, packed.data(), rows, columns}, threads);
  for (int64_t o = 0; o < rows; ++o) {
    for (int64_t w = 0; w < words; ++w) {
      uint32_t word = 0;
      for (int64_t i = 32 * w; i < columns && i < 32 * w + 32; ++i)
        word |= uint32_t{bytes[o * stride + i] != 0} << i % 32;
      require(packed[o * words + w] == word, "packed[%lld, %lld] is %08x, expected %08x", static_cast<long long>(o),
              static_cast<long long>(w), packed[o * words + w], word);
    }
  }

  const int64_t word_stride = words + random.pick<int64_t>({0, 0, 1, 5});
  Buffer<uint32_t> bits(random, stored(rows, words, word_stride), 0);
  for (int64_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<uint32_t>(random.bits());
  Buffer<uint8_t> unpacked(random, rows * columns, 0x5a);
  personafast::unpack_mask_cpu({bits.data(), word_stride, unpacked.data(), rows, columns}, threads);
  for (int64_t o = 0; o < rows; ++o) {
    for (int64_t i = 0; i < columns; ++i) {
      const uint32_t bit = bits[o * word_stride + i / 32] >> i % 32 & 1u;
      require(unpacked[o * columns + i] == bit, "unpacked[%lld, %lld] is %d, expected %u", static_cast<long long>(o),
              static_cast<long long>(i), unpacked[o * columns + i], bit);
    }
  }
}

int main(int argc, char** argv) { return run(argc, argv, 400, one); }
