#pragma once

// What the C++ tests of the kernels share. A test is a function that draws one small random case, runs the kernel on it
// and compares with plain double arithmetic; `run` calls it for many seeds and leaves with 1 at the first that fails.

#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <initializer_list>
#include <vector>

#include "personafast/dtype.h"
#include "personafast/isa.h"

namespace check {

using personafast::Dtype;

constexpr Dtype kDtypes[] = {Dtype::f32, Dtype::bf16, Dtype::f16};

inline const char* dtype_name(Dtype dtype) {
  static const char* const names[] = {"float32", "bfloat16", "float16"};
  return names[static_cast<int>(dtype)];
}

// The case in hand, for messages.
inline long long current_case = -1;

inline void print_case() {
  fprintf(stderr, "\nin case %lld under %s\n", current_case, personafast::isa_name(personafast::isa_chosen()));
}

// Prints the message and ends the process, unless `condition` holds.
__attribute__((format(printf, 2, 3))) inline void require(bool condition, const char* format, ...) {
  if (condition) return;
  print_case();
  va_list arguments;
  va_start(arguments, format);
  vfprintf(stderr, format, arguments);
  va_end(arguments);
  fputc('\n', stderr);
  fflush(stderr);
  _Exit(1);
}

// SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): the same cases with every standard library.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t bits() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }

  // Both ends included.
  int64_t between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(bits() % static_cast<uint64_t>(high - low + 1));
  }

  bool chance(int percent) { return between(1, 100) <= percent; }

  template <class T>
  T pick(std::initializer_list<T> choices) {
    return choices.begin()[between(0, static_cast<int64_t>(choices.size()) - 1)];
  }

  Dtype dtype() { return pick({Dtype::f32, Dtype::bf16, Dtype::f16}); }

  // From 0 to `most`, every other time next to a multiple of 16: there the vectors of all instruction sets end.
  int64_t size(int64_t most) {
    if (chance(50)) return between(0, most);
    const int64_t near = 16 * between(0, most / 16) + between(-1, 1);
    return near < 0 ? 0 : near > most ? most : near;
  }

  double uniform(double low, double high) { return low + (high - low) * static_cast<double>(bits() >> 11) * 0x1p-53; }

 private:
  uint64_t state_;
};

// A block of exactly `bytes` bytes at an address that is a multiple of `element` and often of nothing more. It lies on
// the heap, where AddressSanitizer guards both ends, or ends where a page begins that cannot be read, or begins where
// such a page ends: the compiler instruments no masked load or store of AVX-512, so there only the processor objects.
// No bytes are the null pointer, as with an empty tensor.
class Memory {
 public:
  Memory(Random& random, size_t bytes, size_t element) : bytes_(bytes) {
    if (bytes == 0) return;
    const int64_t place = random.between(0, 2);
    if (place == 0) {
      const size_t before = element * static_cast<size_t>(random.between(0, 7));
      heap_ = new unsigned char[before + bytes];
      data_ = heap_ + before;
      return;
    }
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t inside = (bytes + page - 1) / page * page;
    mapped_ = inside + 2 * page;
    map_ = static_cast<unsigned char*>(mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    require(map_ != MAP_FAILED && mprotect(map_ + page, inside, PROT_READ | PROT_WRITE) == 0, "no memory to map");
    data_ = map_ + page + (place == 1 ? inside - bytes : 0);
  }

  ~Memory() {
    delete[] heap_;
    if (map_ != nullptr) munmap(map_, mapped_);
  }

  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  unsigned char* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_;
  unsigned char* data_ = nullptr;
  unsigned char* heap_ = nullptr;
  unsigned char* map_ = nullptr;
  size_t mapped_ = 0;
};

// Elements of a type of C++, all `fill` at first.
template <class T>
class Buffer {
 public:
  Buffer(Random& random, int64_t count, T fill)
      : memory_(random, static_cast<size_t>(count) * sizeof(T), sizeof(T)), count_(count) {
    for (int64_t i = 0; i < count; ++i) data()[i] = fill;
  }

  T* data() { return reinterpret_cast<T*>(memory_.data()); }
  int64_t size() const { return count_; }
  T& operator[](int64_t i) { return data()[i]; }

 private:
  Memory memory_;
  int64_t count_;
};

// To the nearest, ties to even.
inline uint16_t to_bf16(double value) {
  const float narrow = static_cast<float>(value);
  uint32_t bits;
  memcpy(&bits, &narrow, 4);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline uint16_t to_f16(double value) {
  int exponent = 0;
  if (isinf(value)) return signbit(value) ? 0xfc00 : 0x7c00;
  frexp(value, &exponent);
  const int last = exponent - 11 > -24 ? exponent - 11 : -24;  // the place of the last bit
  const double units = nearbyint(ldexp(fabs(value), -last));
  const double bits = value == 0 ? 0 : (last + 24) * 1024 + units;
  return static_cast<uint16_t>((signbit(value) ? 0x8000 : 0) + static_cast<int>(bits < 0x7c00 ? bits : 0x7c00));
}

inline double from_bf16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline double from_f16(uint16_t half) {
  const int exponent = half >> 10 & 31;
  const int fraction = half & 1023;
  double size = exponent == 0 ? ldexp(fraction, -24) : ldexp(1024 + fraction, exponent - 25);
  if (exponent == 31) size = fraction ? static_cast<double>(NAN) : HUGE_VAL;
  return half & 0x8000 ? -size : size;
}

// A tensor of one of the kernels' element types. What has not been set, gaps between rows included, is one NaN of a
// pattern that no kernel makes.
class Tensor {
 public:
  Tensor(Random& random, Dtype dtype, std::vector<int64_t> sizes, std::vector<int64_t> strides)
      : dtype_(dtype),
        sizes_(static_cast<std::vector<int64_t>&&>(sizes)),
        strides_(static_cast<std::vector<int64_t>&&>(strides)),
        count_(extent()),
        memory_(random, static_cast<size_t>(count_) * element(), element()) {
    for (int64_t i = 0; i < count_; ++i) set_bits(i, poison());
  }

  // Rows one after the other.
  static std::vector<int64_t> dense(const std::vector<int64_t>& sizes) {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t d = sizes.size() - 1; d > 0; --d) strides[d - 1] = strides[d] * (sizes[d] > 0 ? sizes[d] : 1);
    return strides;
  }

  // Likewise, but at times with a gap after what each index but the last stands for.
  static std::vector<int64_t> gapped(Random& random, const std::vector<int64_t>& sizes) {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t d = sizes.size() - 1; d > 0; --d) {
      strides[d - 1] = strides[d] * (sizes[d] > 0 ? sizes[d] : 1) + random.pick<int64_t>({0, 0, 1, 2, 3, 13, 32});
    }
    return strides;
  }

  void* data() const { return memory_.data(); }

  // The address of an element; of a tensor without any, the null pointer.
  template <class... Index>
  void* at(Index... index) const {
    return memory_.data() == nullptr ? nullptr : memory_.data() + static_cast<size_t>(offset(index...)) * element();
  }

  Dtype dtype() const { return dtype_; }
  int64_t size(size_t d) const { return sizes_[d]; }
  int64_t stride(size_t d) const { return strides_[d]; }

  template <class... Index>
  double get(Index... index) const {
    const int64_t i = offset(index...);
    if (dtype_ == Dtype::bf16) return from_bf16(static_cast<uint16_t>(bits(i)));
    if (dtype_ == Dtype::f16) return from_f16(static_cast<uint16_t>(bits(i)));
    float value;
    memcpy(&value, memory_.data() + 4 * i, 4);
    return value;
  }

  // Rounds to the nearest value of the type.
  template <class... Index>
  void set(double value, Index... index) {
    set_bits(offset(index...), rounded(value));
  }

  // The bit pattern of an element, and the one that `value` is rounded to.
  template <class... Index>
  uint32_t pattern(Index... index) const {
    return bits(offset(index...));
  }

  uint32_t rounded(double value) const {
    if (dtype_ == Dtype::bf16) return to_bf16(value);
    if (dtype_ == Dtype::f16) return to_f16(value);
    const float narrow = static_cast<float>(value);
    uint32_t bits;
    memcpy(&bits, &narrow, 4);
    return bits;
  }

  void fill(Random& random, double low = -2, double high = 2) {
    for_each([&](int64_t i) { set_bits(i, rounded(random.uniform(low, high))); });
  }

  // The poison again, everywhere.
  void clear() {
    for (int64_t i = 0; i < count_; ++i) set_bits(i, poison());
  }

  // All bytes, gaps included.
  std::vector<unsigned char> bytes() const {
    return std::vector<unsigned char>(memory_.data(), memory_.data() + memory_.bytes());
  }

  void restore(const std::vector<unsigned char>& bytes) {
    if (!bytes.empty()) memcpy(memory_.data(), bytes.data(), bytes.size());
  }

  void require_untouched_gaps(const char* name) const {
    std::vector<bool> inside(static_cast<size_t>(count_));
    for_each([&](int64_t i) { inside[static_cast<size_t>(i)] = true; });
    for (int64_t i = 0; i < count_; ++i) {
      require(inside[static_cast<size_t>(i)] || bits(i) == poison(), "%s: the gap at element %lld was written", name,
              static_cast<long long>(i));
    }
  }

 private:
  size_t element() const { return dtype_ == Dtype::f32 ? 4 : 2; }

  uint32_t poison() const { return dtype_ == Dtype::f32 ? 0xffc0a5a5u : dtype_ == Dtype::bf16 ? 0xffdau : 0xfea5u; }

  uint32_t bits(int64_t i) const {
    uint32_t wide;
    uint16_t narrow;
    if (dtype_ == Dtype::f32) {
      memcpy(&wide, memory_.data() + 4 * i, 4);
      return wide;
    }
    memcpy(&narrow, memory_.data() + 2 * i, 2);
    return narrow;
  }

  void set_bits(int64_t i, uint32_t bits) {
    const uint16_t narrow = static_cast<uint16_t>(bits);
    if (dtype_ == Dtype::f32) {
      memcpy(memory_.data() + 4 * i, &bits, 4);
    } else {
      memcpy(memory_.data() + 2 * i, &narrow, 2);
    }
  }

  // Up to the last element and no further.
  int64_t extent() const {
    int64_t last = 0;
    for (size_t d = 0; d < sizes_.size(); ++d) {
      if (sizes_[d] == 0) return 0;
      last += (sizes_[d] - 1) * strides_[d];
    }
    return last + 1;
  }

  template <class... Index>
  int64_t offset(Index... index) const {
    int64_t sum = 0;
    size_t d = 0;
    ((sum += strides_[d++] * static_cast<int64_t>(index)), ...);
    require(d == sizes_.size(), "%zu indices for %zu dimensions", d, sizes_.size());
    return sum;
  }

  template <class Visit>
  void for_each(Visit visit, size_t d = 0, int64_t base = 0) const {
    if (d == sizes_.size()) return visit(base);
    for (int64_t i = 0; i < sizes_[d]; ++i) for_each(visit, d + 1, base + i * strides_[d]);
  }

  Dtype dtype_;
  std::vector<int64_t> sizes_;
  std::vector<int64_t> strides_;
  int64_t count_;
  Memory memory_;
};

// The most that rounding once to `dtype` is off: half a unit in the last place, or half the smallest denormal.
inline double rounding(Dtype dtype, double value) {
  const double half_ulp = dtype == Dtype::f32 ? 0x1p-24 : dtype == Dtype::bf16 ? 0x1p-8 : 0x1p-11;
  return half_ulp * fabs(value) + (dtype == Dtype::f16 ? 0x1p-25 : 0x1p-126);
}

// The most that a sum of `terms` products in fp32 is off, in whatever order; `magnitude` is that of their sizes.
inline double summing(int64_t terms, double magnitude) {
  return 0x1p-24 * static_cast<double>(terms + 8) * magnitude + 0x1p-120;
}

// A NaN is never close.
inline void require_close(double value, double expected, double allowed, const char* name, int64_t row,
                          int64_t column) {
  require(fabs(value - expected) <= allowed, "%s[%lld, %lld] is %.9g, expected %.9g +- %.3g", name,
          static_cast<long long>(row), static_cast<long long>(column), value, expected, allowed);
}

// Slots of [-1, count), repeated ones too.
inline void fill_slots(Random& random, Buffer<int32_t>& slots, int64_t count) {
  for (int64_t t = 0; t < slots.size(); ++t) slots[t] = static_cast<int32_t>(random.between(-1, count - 1));
}

// At times puts one or two slots out of range. Returns the first such row, or -1.
inline int64_t spoil_slots(Random& random, Buffer<int32_t>& slots, int64_t count) {
  if (slots.size() == 0 || !random.chance(10)) return -1;
  const int32_t above = static_cast<int32_t>(count);
  const int64_t first = random.between(0, slots.size() - 1);
  slots[first] = random.pick({-2, INT32_MIN, above, above + 1, INT32_MAX});
  slots[random.between(first, slots.size() - 1)] = above;
  return first;
}

// Calls `one` for the cases 0 to cases - 1, or for the one that the first argument names. PERSONAFAST_CPU_ISA chooses
// the kernels; 77 says that this machine has none of that name.
inline int run(int argc, char** argv, long long cases, void (*one)(Random&)) {
  const char* forced = getenv("PERSONAFAST_CPU_ISA");
  for (int i = 0; forced != nullptr && i < personafast::kIsas; ++i) {
    const personafast::Isa isa = static_cast<personafast::Isa>(i);
    if (strcmp(forced, personafast::isa_name(isa)) != 0) continue;
    if (personafast::isa_compiled(isa) && personafast::isa_supported(isa)) continue;
    printf("this machine cannot run %s\n", forced);
    return 77;
  }
  const long long first = argc > 1 ? atoll(argv[1]) : 0;
  const long long last = argc > 1 ? first : cases - 1;
  for (current_case = first; current_case <= last; ++current_case) {
    Random random(static_cast<uint64_t>(current_case));
    one(random);
  }
  printf("%lld cases under %s\n", last - first + 1, personafast::isa_name(personafast::isa_chosen()));
  return 0;
}

}  // namespace check

// The sanitizers' runtimes call these, so that their reports name the case.
extern "C" {
__attribute__((used, visibility("default"))) inline void __asan_on_error() { check::print_case(); }
__attribute__((used, visibility("default"))) inline void __ubsan_on_report() { check::print_case(); }
}
