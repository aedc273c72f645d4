#pragma once

#include "elements.cuh"

// Rows that a block takes whole: where its threads are in them, and sums over them.
namespace personafast::cuda {

// Threads of a multiprocessor that runs the fewest. Up to as many in all, every block runs at once, and it pays to read
// what may turn out not to be needed: nobody else's loads would fill the wait.
constexpr int64_t kResident = 1536;

inline bool in_one_wave(int64_t threads) { return threads <= multiprocessors() * kResident; }

// A row of up to kRowChunks chunks a thread stays in registers, and a thread's loads are all in flight at once. With
// more threads and fewer chunks, what every thread does for its row as a whole would be most of its work.
constexpr int kRowChunks = 4;
constexpr int kRowThreads = 512;

// Threads for a row of that many chunks.
inline int64_t row_threads(int64_t chunks) {
  const int64_t wanted = (chunks + kRowChunks - 1) / kRowChunks;
  return wanted < kRowThreads ? (wanted + kWarp - 1) / kWarp * kWarp : kRowThreads;
}

// Replaces each of the values by its sum over the block, in an order that follows from the number of threads alone, the
// same bits in every thread. Once a kernel: the shared memory is not free again afterwards.
template <int Count>
__device__ __forceinline__ void block_sums(float (&values)[Count]) {
  PERSONAFAST_SHARED(float, sums, Count* kWarp);
  const unsigned lane = threadIdx.x % kWarp;
  const unsigned warps = blockDim.x / kWarp;
#pragma unroll
  for (int i = 0; i < Count; ++i) {
#pragma unroll
    for (int bit = kWarp / 2; bit > 0; bit /= 2) values[i] += __shfl_xor_sync(kAllLanes, values[i], bit);
  }
  if (warps == 1) return;
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    if (lane == 0) sums[i * kWarp + threadIdx.x / kWarp] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    values[i] = lane < warps ? sums[i * kWarp + lane] : 0.0f;
#pragma unroll
    for (int bit = kWarp / 2; bit > 0; bit /= 2) values[i] += __shfl_xor_sync(kAllLanes, values[i], bit);
  }
}

}  // namespace personafast::cuda
