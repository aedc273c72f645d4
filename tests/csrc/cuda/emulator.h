#pragma once

// CUDA in plain C++, so that the kernels of csrc/cuda run where there is no GPU, under the sanitizers too. Every thread
// of a block is a fiber of the one thread of the process. A fiber runs until it waits, for its block (__syncthreads) or
// for lanes of its warp (__shfl_*_sync, ...); then the next one runs, in an order that `schedule` chooses and that no
// kernel may depend on. Blocks run one after the other, those of a cluster by turns. Shared memory lies on the heap,
// all bits set in each new block, which makes NaN of it as fp32, bf16 and fp16.
//
// What CUDA leaves undefined ends the process, with a line that says why: a barrier of the warp that named lanes never
// come to, a shuffle from a lane outside its mask, an access of 16 bytes at another address, a copy that was never
// waited for, a number sent to a block that may not have begun, has ended, or expects no more.

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct uint2 {
  uint32_t x, y;
};
struct uint3 {
  uint32_t x, y, z;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  uint32_t x, y, z;
  constexpr dim3(uint32_t x = 1, uint32_t y = 1, uint32_t z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

// The order of threads and of blocks: 0 as they are numbered, 1 the other way round, and any other seeds a random one.
extern uint64_t schedule;
// Called before the process ends because of an error.
extern void (*on_error)();

// The most a lane can hand to others at once.
constexpr size_t kMostBytes = 64;
struct Sent {
  unsigned char bytes[kMostBytes];
};

// How many multiprocessors cuda::multiprocessors() tells of.
extern int multiprocessors;

[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);

// Runs body(context) once in every thread; returns 0, or CUDA's code for a launch that is too large. Clusters are of
// `cluster` blocks that are neighbours in x.
int run(dim3 grid, dim3 block, unsigned cluster, size_t shared_bytes, void (*body)(const void*), const void* context);

// Waits for all lanes of `mask` that have not ended; what each of them has sent.
const Sent* exchange(unsigned mask, const char* what, const void* sent, size_t bytes);
void barrier();
void cluster_arrive();
void cluster_wait();
unsigned lane();
// The lanes of `mask` that took part in this thread's last exchange.
unsigned partners();

// The block's array that `key` stands for.
void* shared(const void* key, size_t bytes);
void* dynamic_shared();
// What `at`, in this block's dynamic shared memory, is in that of the cluster's block `rank`.
void* remote(void* at, size_t bytes, unsigned rank);
// A mailbox: the bytes it was opened for, and from bit 32 on those that have come.
void count_mail(uint64_t* box, size_t bytes);
void wait_for_mail(const uint64_t* box);

void copy_async(void* to, const void* from, size_t bytes);
void copies_commit();
void copies_wait(size_t pending);

template <class T>
T shuffled(unsigned mask, const char* what, T value, int from) {
  static_assert(sizeof(T) <= kMostBytes);
  const Sent* sent = exchange(mask, what, &value, sizeof(T));
  if (from < 0 || from >= 32 || (partners() >> from & 1u) == 0)
    fail("%s: reads lane %d, which is not there", what, from);
  memcpy(&value, sent[from].bytes, sizeof(T));
  return value;
}

}  // namespace emulator

extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

inline void __syncthreads() { emulator::barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::exchange(mask, "__syncwarp", nullptr, 0); }
inline void __threadfence() {}

template <class T>
T __shfl_sync(unsigned mask, T value, int from) {
  return emulator::shuffled(mask, "__shfl_sync", value, from & 31);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return emulator::shuffled(mask, "__shfl_xor_sync", value, static_cast<int>(emulator::lane()) ^ bits);
}

// Lanes that would read beyond the warp keep what they have.
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by) {
  const int lane = static_cast<int>(emulator::lane());
  const int from = lane - static_cast<int>(by);
  return emulator::shuffled(mask, "__shfl_up_sync", value, from < 0 ? lane : from);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by) {
  const int lane = static_cast<int>(emulator::lane());
  const int from = lane + static_cast<int>(by);
  return emulator::shuffled(mask, "__shfl_down_sync", value, from > 31 ? lane : from);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const emulator::Sent* sent = emulator::exchange(mask, "__ballot_sync", &predicate, sizeof(int));
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) {
    int theirs = 0;
    if (emulator::partners() >> lane & 1u) memcpy(&theirs, sent[lane].bytes, sizeof(int));
    bits |= (theirs != 0 ? 1u : 0u) << lane;
  }
  return bits;
}

inline unsigned __match_any_sync(unsigned mask, uint32_t value) {
  const emulator::Sent* sent = emulator::exchange(mask, "__match_any_sync", &value, sizeof(value));
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (emulator::partners() >> lane & 1u) bits |= (memcmp(sent[lane].bytes, &value, 4) == 0 ? 1u : 0u) << lane;
  }
  return bits;
}

inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }

template <class T>
T atomicAdd(T* at, T value) {
  const T old = *at;
  *at += value;
  return old;
}

template <class T>
T __ldg(const T* at) {
  return *at;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (by & 31u));
}

inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned choice = selector >> (4 * i) & 15u;
    unsigned byte = static_cast<unsigned>(bytes >> (8 * (choice & 7u))) & 255u;
    if (choice & 8u) byte = byte & 128u ? 255u : 0u;  // the sign bit, eight times
    result |= byte << (8 * i);
  }
  return result;
}

inline float rsqrtf(float value) { return 1.0f / sqrtf(value); }
using std::max;
using std::min;

// A static of the place of declaration is the key, one for each instance of a template, as CUDA has it.
#define PERSONAFAST_SHARED(type, name, count) \
  static const char name##_key = 0;           \
  type* const name = static_cast<type*>(emulator::shared(&name##_key, (count) * sizeof(type)))
#define PERSONAFAST_DYNAMIC_SHARED(name) \
  unsigned char* const name = static_cast<unsigned char*>(emulator::dynamic_shared())

namespace personafast::cuda {

inline const void* wide(const void* at) {
  if (reinterpret_cast<uintptr_t>(at) % 16 != 0) emulator::fail("16 bytes at %p, which is no multiple of 16", at);
  return at;
}

inline uint4 load16(const void* at) {
  uint4 words;
  memcpy(&words, wide(at), 16);
  return words;
}
inline uint4 load16_read_only(const void* at) { return load16(at); }
inline uint2 load8_read_only(const void* at) {
  if (reinterpret_cast<uintptr_t>(at) % 8 != 0) emulator::fail("8 bytes at %p, which is no multiple of 8", at);
  uint2 words;
  memcpy(&words, at, 8);
  return words;
}
inline uint4 load16_read_once(const void* at) { return load16(at); }
inline void store16(void* at, uint4 words) { memcpy(const_cast<void*>(wide(at)), &words, 16); }

inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t opaque(uint32_t bits) { return bits; }
inline uintptr_t opaque_address(uintptr_t bits) { return bits; }

// As on a GPU they do not begin with 0.
constexpr uint32_t kSharedBegin = 1024;
inline uint32_t shared_address(const void* at) {
  return kSharedBegin + static_cast<uint32_t>(static_cast<const unsigned char*>(at) -
                                              static_cast<unsigned char*>(emulator::dynamic_shared()));
}
inline unsigned char* shared_at(uint32_t address) {
  return static_cast<unsigned char*>(emulator::dynamic_shared()) + (int64_t{address} - kSharedBegin);
}
inline uint32_t shared_word(uint32_t address) {
  if (address % 4 != 0) emulator::fail("4 bytes at %u of shared memory, which is no multiple of 4", address);
  uint32_t word;
  memcpy(&word, shared_at(address), 4);
  return word;
}

inline float bf16_to_float(uint32_t low_bits) { return float_of(low_bits << 16); }
float f16_to_float(uint32_t low_bits);
uint32_t floats_to_bf16x2(float low, float high);
uint32_t floats_to_f16x2(float low, float high);
uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c);
uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c);

inline void copy16_async(void* shared, const void* global) {
  emulator::copy_async(const_cast<void*>(wide(shared)), wide(global), 16);
}
inline void store16_shared(uint32_t address, uint4 words) { store16(shared_at(address), words); }
inline void copy16_async_if(bool condition, uint32_t shared, const void* global) {
  if (condition) copy16_async(shared_at(shared), global);
}
inline void copy4_async(void* shared, const void* global) {
  if (reinterpret_cast<uintptr_t>(shared) % 4 != 0 || reinterpret_cast<uintptr_t>(global) % 4 != 0) {
    emulator::fail("4 bytes from %p to %p, which are not both multiples of 4", global, shared);
  }
  emulator::copy_async(shared, global, 4);
}
inline void copies_commit() { emulator::copies_commit(); }
template <int Pending>
void copies_wait() {
  emulator::copies_wait(Pending);
}

void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

inline void cluster_arrive() { emulator::cluster_arrive(); }
inline void cluster_wait() { emulator::cluster_wait(); }
inline void mailbox_open(uint64_t* box, uint32_t bytes) { *box = bytes; }
inline void mailbox_send(float* at, uint64_t* box, unsigned rank, float value) {
  memcpy(emulator::remote(at, sizeof(value), rank), &value, sizeof(value));
  emulator::count_mail(static_cast<uint64_t*>(emulator::remote(box, sizeof(*box), rank)), sizeof(value));
}
inline void mailbox_wait(uint64_t* box) { emulator::wait_for_mail(box); }

template <class Args>
int launch_clusters(void (*kernel)(Args), dim3 grid, unsigned cluster, dim3 block, size_t shared_bytes, void*,
                    const Args& args) {
  struct Call {
    void (*kernel)(Args);
    const Args& args;
  } call = {kernel, args};
  return emulator::run(
      grid, block, cluster, shared_bytes,
      [](const void* context) {
        const Call& c = *static_cast<const Call*>(context);
        c.kernel(c.args);
      },
      &call);
}

template <class Args>
int launch(void (*kernel)(Args), dim3 grid, dim3 block, size_t shared_bytes, void* stream, const Args& args) {
  return launch_clusters(kernel, grid, 1, block, shared_bytes, stream, args);
}

}  // namespace personafast::cuda
