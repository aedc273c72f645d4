#include "personafast/sparse_linear.h"

#include "check.h"

using namespace check;

// Random words, now and then all bits or none; those beyond the features are rubbish.
static void fill_bitmap(Random& random, Buffer<int32_t>& bitmap, int64_t words) {
  uint32_t row = 0;
  for (int64_t i = 0; i < bitmap.size(); ++i) {
    if (i % words == 0) row = random.pick({0u, 0xffffffffu, 1u, 1u});
    const uint32_t word = random.pick({0u, 0xffffffffu, static_cast<uint32_t>(random.bits())});
    bitmap[i] = static_cast<int32_t>(row == 1u ? word : row);
  }
}

static bool kept(Buffer<int32_t>& bitmap, int64_t words, int64_t o, int64_t i) {
  return (static_cast<uint32_t>(bitmap[o * words + i / 32]) >> (i % 32) & 1u) != 0;
}

// Makes the offsets of one row wrong. Returns the first row that they are wrong for.
static int64_t spoil_offsets(Random& random, Buffer<int64_t>& offsets, int64_t value_count) {
  const int64_t k = random.between(0, offsets.size() - 1);
  offsets[k] = random.pick({int64_t{-1}, INT64_MIN, value_count + 1, INT64_MAX});
  for (int64_t o = 0; o + 1 < offsets.size(); ++o) {
    if (offsets[o] < 0 || offsets[o + 1] < offsets[o] || offsets[o + 1] > value_count) return o;
  }
  return -1;
}

static void one(Random& random) {
  const bool large = random.chance(1);  // enough to wake threads
  const bool wide = random.chance(5);   // more features than a kernel takes at a time
  const int64_t rows = large ? random.between(8, 80) : random.between(0, random.pick({3, 9, 9, 40}));
  const int64_t outputs = large ? random.between(60, 90) : random.between(0, 12);
  const int64_t features = wide ? random.between(1000, 4500) : large ? random.between(200, 400) : random.size(200);
  const int64_t words = (features + 31) / 32;
  const Dtype dtype = random.dtype();

  Tensor weight(random, dtype, {outputs, features}, Tensor::gapped(random, {outputs, features}));
  Buffer<int32_t> bitmap(random, outputs * words, 0);
  Buffer<int64_t> offsets(random, outputs + 1, -1);
  weight.fill(random);
  fill_bitmap(random, bitmap, words);
  personafast::CompressArgs compress = {weight.data(), weight.stride(0), bitmap.data(), offsets.data(),
                                        nullptr,       outputs,          features,      dtype};
  personafast::compress_cpu(compress, false);
  int64_t value_count = 0;
  for (int64_t o = 0; o < outputs; ++o) {
    require(offsets[o] == value_count, "row_offsets[%lld] is %lld, expected %lld", static_cast<long long>(o),
            static_cast<long long>(offsets[o]), static_cast<long long>(value_count));
    for (int64_t i = 0; i < features; ++i) value_count += kept(bitmap, words, o, i);
  }
  require(offsets[outputs] == value_count, "row_offsets[%lld] is %lld, expected %lld", static_cast<long long>(outputs),
          static_cast<long long>(offsets[outputs]), static_cast<long long>(value_count));
  Tensor values(random, dtype, {value_count}, {1});
  compress.values = values.data();
  personafast::compress_cpu(compress, true);
  int64_t next = 0;
  for (int64_t o = 0; o < outputs; ++o) {
    for (int64_t i = 0; i < features; ++i) {
      if (!kept(bitmap, words, o, i)) continue;
      require(values.pattern(next) == weight.pattern(o, i), "values[%lld] is not weight[%lld, %lld]",
              static_cast<long long>(next), static_cast<long long>(o), static_cast<long long>(i));
      ++next;
    }
  }

  std::vector<int64_t> x_strides = Tensor::gapped(random, {rows, features});
  if (random.chance(10)) x_strides[0] = 0;  // one row expanded
  Tensor x(random, dtype, {rows, features}, x_strides);
  Tensor bias(random, dtype, {outputs}, {1});
  Tensor out(random, dtype, {rows, outputs}, Tensor::dense({rows, outputs}));
  const bool biased = random.chance(50);
  x.fill(random);
  bias.fill(random);
  // A bitmap that is not the one the values were stored with: what there is of them is read, and no more.
  if (random.chance(20)) fill_bitmap(random, bitmap, words);
  const bool piled = random.chance(5);  // all rows begin at the first value
  for (int64_t o = 0; piled && o < outputs; ++o) offsets[o] = 0;
  const int64_t wrong = random.chance(10) ? spoil_offsets(random, offsets, value_count) : -1;

  const personafast::SparseLinearArgs args = {
      out.data(),  x.data(), x.stride(0), values.data(), bitmap.data(), offsets.data(), biased ? bias.data() : nullptr,
      value_count, rows,     outputs,     features,      dtype};
  const std::vector<unsigned char> poison = out.bytes();
  const int64_t got = personafast::sparse_linear_cpu(args, static_cast<int>(random.between(1, 4)));
  require(got == wrong, "sparse_linear returned %lld, expected %lld", static_cast<long long>(got),
          static_cast<long long>(wrong));
  if (wrong >= 0) {
    require(out.bytes() == poison, "out was written although row_offsets are wrong");
    return;
  }
  for (int64_t o = 0; o < outputs; ++o) {
    std::vector<double> row(static_cast<size_t>(features));
    next = offsets[o];
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
      require_close(out.get(t, o), sum, rounding(dtype, sum) + summing(features, magnitude), "out", t, o);
    }
  }

  const std::vector<unsigned char> before = out.bytes();
  out.clear();
  personafast::sparse_linear_cpu(args, 1);
  require(out.bytes() == before, "out depends on the number of threads");

  if (rows == 0) return;
  const int64_t t = random.between(0, rows - 1);
  Tensor alone(random, dtype, {1, outputs}, {outputs, 1});
  personafast::SparseLinearArgs one_row = args;
  one_row.out = alone.data();
  one_row.x = x.at(t, 0);
  one_row.rows = 1;
  personafast::sparse_linear_cpu(one_row, 1);
  for (int64_t o = 0; o < outputs; ++o) {
    require(alone.pattern(0, o) == out.pattern(t, o), "out[%lld, %lld] depends on the other rows",
            static_cast<long long>(t), static_cast<long long>(o));
  }
}

int main(int argc, char** argv) { return run(argc, argv, 1000, one); }
