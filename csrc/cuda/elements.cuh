#pragma once

#include "device.cuh"
#include "personafast/dtype.h"

// Rows of fp32, bf16 or fp16 numbers, taken N at a time: the N that make 16 bytes of the narrowest type at hand, or one
// where a row does not begin at a multiple of 16 bytes or does not end at one.
namespace personafast::cuda {

template <Dtype D>
constexpr int kBytes = D == Dtype::f32 ? 4 : 2;

template <Dtype D>
constexpr int kWide = 16 / kBytes<D>;

// N numbers as they are in memory. Every index must be known to the compiler, so that they stay in registers.
template <Dtype D, int N>
struct Elements {
  static constexpr int kWords = (N * kBytes<D> + 3) / 4;
  uint32_t words[kWords];

  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (D == Dtype::f32) return float_of(words[i]);
    const uint32_t bits = i % 2 ? words[i / 2] >> 16 : words[i / 2] & 0xffffu;
    return D == Dtype::bf16 ? bf16_to_float(bits) : f16_to_float(bits);
  }

  // Each rounded once, to the nearest.
  __device__ __forceinline__ void set(const float (&values)[N]) {
    if constexpr (D == Dtype::f32) {
#pragma unroll
      for (int i = 0; i < N; ++i) words[i] = bits_of(values[i]);
    } else {
#pragma unroll
      for (int i = 0; i < N; i += 2) {
        const float high = i + 1 < N ? values[(i + 1) % N] : 0.0f;
        words[i / 2] = D == Dtype::bf16 ? floats_to_bf16x2(values[i], high) : floats_to_f16x2(values[i], high);
      }
    }
  }
};

enum class Memory { written, read_only };

// The N elements from base[first] on.
template <Dtype D, int N, Memory M = Memory::read_only>
__device__ __forceinline__ Elements<D, N> load(const void* base, int64_t first) {
  Elements<D, N> elements;
  const char* at = static_cast<const char*>(base) + first * kBytes<D>;
  if constexpr (N > 1) {
    static_assert(N * kBytes<D> % 16 == 0, "whole accesses of 16 bytes");
#pragma unroll
    for (int i = 0; i < elements.kWords; i += 4) {
      const uint4 words = M == Memory::written ? load16(at + 4 * i) : load16_read_only(at + 4 * i);
      elements.words[i] = words.x;
      elements.words[i + 1] = words.y;
      elements.words[i + 2] = words.z;
      elements.words[i + 3] = words.w;
    }
  } else if constexpr (D == Dtype::f32) {
    elements.words[0] = *reinterpret_cast<const uint32_t*>(at);
  } else {
    elements.words[0] = *reinterpret_cast<const uint16_t*>(at);
  }
  return elements;
}

// Zeros if not.
template <Dtype D, int N, Memory M = Memory::read_only>
__device__ __forceinline__ Elements<D, N> load_if(bool condition, const void* base, int64_t first) {
  Elements<D, N> elements = {};
  if (condition) elements = load<D, N, M>(base, first);
  return elements;
}

template <Dtype D, int N>
__device__ __forceinline__ void store(void* base, int64_t first, const Elements<D, N>& elements) {
  char* at = static_cast<char*>(base) + first * kBytes<D>;
  if constexpr (N > 1) {
#pragma unroll
    for (int i = 0; i < elements.kWords; i += 4) {
      store16(at + 4 * i, {elements.words[i], elements.words[i + 1], elements.words[i + 2], elements.words[i + 3]});
    }
  } else if constexpr (D == Dtype::f32) {
    *reinterpret_cast<uint32_t*>(at) = elements.words[0];
  } else {
    *reinterpret_cast<uint16_t*>(at) = static_cast<uint16_t>(elements.words[0]);
  }
}

// Whether every row of [rows, width] begins and ends at a multiple of 16 bytes.
inline bool rows_are_wide(const void* base, int64_t stride, int64_t width, Dtype dtype) {
  const int64_t bytes = dtype == Dtype::f32 ? 4 : 2;
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride * bytes % 16 == 0 && width * bytes % 16 == 0;
}

}  // namespace personafast::cuda
