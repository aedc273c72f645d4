#include "personafast/sparse_linear.h"

#include "check.h"
#include "emulated.h"

using namespace check;

// Random words, rows of all bits, of none, of mostly ones and of a few; those beyond the features are rubbish.
static void fill_bitmap(Random& random, Buffer<int32_t>& bitmap, int64_t words) {
  int64_t kind = 0;
  for (int64_t i = 0; i < bitmap.size(); ++i) {
    if (i % words == 0) kind = random.between(0, 7);
    uint32_t word = static_cast<uint32_t>(random.bits());
    if (kind == 0) word = 0;
    if (kind == 1) word = 0xffffffffu;
    if (kind == 2) word |= static_cast<uint32_t>(random.bits() | random.bits());
    if (kind == 3) word &= static_cast<uint32_t>(random.bits() & random.bits());
    if (kind == 4) word = random.pick({0u, 0xffffffffu, word});
    bitmap[i] = static_cast<int32_t>(word);
  }
}

static bool kept(Buffer<int32_t>& bitmap, int64_t words, int64_t o, int64_t i) {
  return (static_cast<uint32_t>(bitmap[o * words + i / 32]) >> (i % 32) & 1u) != 0;
}

static void one(Random& random) {
  const bool wide = random.chance(15);  // several stages, at times shared by several warps
  const int64_t rows = random.between(random.chance(5) ? 0 : 1, random.pick({1, 2, 4, wide ? 4 : 9, wide ? 9 : 17}));
  const int64_t outputs = random.between(random.chance(5) ? 0 : 1, random.pick({1, 5, wide ? 9 : 30}));
  int64_t features = random.size(random.pick<int64_t>({60, 300, 700}));
  if (wide) features = random.between(900, random.pick<int64_t>({1600, 3000, 5000}));
  if (random.chance(80)) features = features / 4 * 4;
  if (random.chance(20)) features = (features + 511) / 512 * 512;
  const int64_t words = (features + 31) / 32;
  const Dtype dtype = random.chance(20) ? Dtype::f32 : random.pick({Dtype::bf16, Dtype::f16});

  Buffer<int32_t> bitmap(random, outputs * words, 0);
  Buffer<int64_t> offsets(random, outputs + 1, 0);
  fill_bitmap(random, bitmap, words);
  int64_t value_count = 0;
  for (int64_t o = 0; o < outputs; ++o) {
    // Rows need not follow each other at once.
    offsets[o] = value_count += random.chance(10) ? random.between(1, 9) : 0;
    for (int64_t i = 0; i < features; ++i) value_count += kept(bitmap, words, o, i);
  }
  offsets[outputs] = value_count;
  Tensor values(random, dtype, {value_count}, {1});
  std::vector<int64_t> x_strides = row_strides(random, rows, features);
  if (random.chance(10)) x_strides[0] = 0;  // one row expanded
  Tensor x(random, dtype, {rows, features}, x_strides);
  Tensor bias(random, dtype, {outputs}, {1});
  Tensor out(random, dtype, {rows, outputs}, Tensor::dense({rows, outputs}));
  const bool biased = random.chance(50);
  values.fill(random);
  x.fill(random);
  bias.fill(random);
  // What a value that is not finite must not reach: outputs and columns beside its own.
  const bool strange = value_count > 0 && random.chance(20);
  if (strange) {
    values.set(random.pick({HUGE_VAL, -HUGE_VAL, static_cast<double>(NAN)}), random.between(0, value_count - 1));
  }
  // A bitmap, or offsets, that are not of these values: what there is of them is read, and no more.
  if (random.chance(15)) fill_bitmap(random, bitmap, words);
  for (int64_t k = random.chance(15) ? random.between(1, 3) : 0; k > 0; --k) {
    offsets[random.between(0, outputs)] =
        random.pick({int64_t{0}, int64_t{-1}, INT64_MIN, value_count, value_count + 1, INT64_MAX});
  }

  const personafast::SparseLinearArgs args = {
      out.data(),  x.data(), x.stride(0), values.data(), bitmap.data(), offsets.data(), biased ? bias.data() : nullptr,
      value_count, rows,     outputs,     features,      dtype};
  require_launched(personafast::sparse_linear_cuda(args, nullptr));
  for (int64_t o = 0; o < outputs; ++o) {
    std::vector<double> row(static_cast<size_t>(features));
    int64_t next = std::min(std::max(offsets[o], int64_t{0}), value_count);
    for (int64_t i = 0; i < features; ++i) {
      if (kept(bitmap, words, o, i) && next < value_count) row[static_cast<size_t>(i)] = values.get(next++);
    }
    for (int64_t t = 0; t < rows; ++t) {
      double sum = biased ? bias.get(o) : 0;
      double magnitude = fabs(sum);
      for (int64_t i = 0; i < features; ++i) {
        const double term = row[static_cast<size_t>(i)] * x.get(t, i);
        sum += term;
        magnitude += fabs(term);
      }
      const double got = out.get(t, o);
      if (isnan(sum) || isinf(sum)) {
        require(isnan(sum) ? isnan(got) : got == sum, "out[%lld, %lld] is %.9g, expected %.9g",
                static_cast<long long>(t), static_cast<long long>(o), got, sum);
      } else {
        require_close(got, sum, rounding(dtype, sum) + summing(features, magnitude), "out", t, o);
      }
    }
  }

  const std::vector<unsigned char> before = out.bytes();
  out.clear();
  emulator::schedule ^= 1;
  emulator::multiprocessors = 132 - emulator::multiprocessors;
  require_launched(personafast::sparse_linear_cuda(args, nullptr));
  require(out.bytes() == before, "out depends on the order of threads or on the device");

  if (rows == 0 || features == 0) return;
  const int64_t t = random.between(0, rows - 1);
  Tensor row(random, dtype, {1, outputs}, {outputs, 1});
  personafast::SparseLinearArgs alone = args;
  alone.out = row.data();
  alone.x = x.at(t, 0);
  alone.rows = 1;
  // With another alignment the plain kernel would take it, which sums in another order.
  if (reinterpret_cast<uintptr_t>(alone.x) % 8 != reinterpret_cast<uintptr_t>(args.x) % 8) return;
  if (rows > 1 && x.stride(0) % 4 != 0) return;
  require_launched(personafast::sparse_linear_cuda(alone, nullptr));
  for (int64_t o = 0; o < outputs; ++o) {
    require(row.pattern(0, o) == out.pattern(t, o), "out[%lld, %lld] depends on the other rows",
            static_cast<long long>(t), static_cast<long long>(o));
  }
}

int main(int argc, char** argv) { return run_emulated(argc, argv, 400, one); }
