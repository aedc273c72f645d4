#pragma once

#include <stddef.h>
#include <stdint.h>

// What kernels use of a GPU beyond CUDA's own names: one place for inline assembly and cache hints. The same sources
// are compiled as plain C++ where CUDA is emulated (tests/csrc/cuda), which gives these functions another body.
//
// Contraction is off: only fmaf() fuses a product and a sum. No header of CUDA's number types is used: they cost every
// unit and every target seconds, and 16-bit numbers are bit patterns here.

#ifdef __CUDACC__

// Arrays in shared memory: of a size known now, or of the size that the launch gives.
#define PERSONAFAST_SHARED(type, name, count) __shared__ type name[count]
#define PERSONAFAST_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

namespace personafast::cuda {

// Memory that the kernel may write.
__device__ __forceinline__ uint4 load16(const void* at) { return *static_cast<const uint4*>(at); }

// Memory that nobody writes while the kernel runs.
__device__ __forceinline__ uint4 load16_read_only(const void* at) { return __ldg(static_cast<const uint4*>(at)); }

__device__ __forceinline__ uint2 load8_read_only(const void* at) { return __ldg(static_cast<const uint2*>(at)); }

// 16 bytes read once a kernel: they take no place in L1.
__device__ __forceinline__ uint4 load16_read_once(const void* at) {
  uint4 words;
  asm("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
      : "l"(at));
  return words;
}

__device__ __forceinline__ void store16(void* at, uint4 words) { *static_cast<uint4*>(at) = words; }

__device__ __forceinline__ uint32_t bits_of(float value) { return __float_as_uint(value); }
__device__ __forceinline__ float float_of(uint32_t bits) { return __uint_as_float(bits); }

// The same bits, of which the compiler knows nothing any more.
__device__ __forceinline__ uint32_t opaque(uint32_t bits) {
  asm("" : "+r"(bits));
  return bits;
}

__device__ __forceinline__ uintptr_t opaque_address(uintptr_t bits) {
  asm("" : "+l"(bits));
  return bits;
}

// The address of shared memory as its instructions take it: 32 bits, and less than 4 KiB more than where the block's
// own begins. A word at such an address, and 16 bytes.
__device__ __forceinline__ uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}
__device__ __forceinline__ uint32_t shared_word(uint32_t address) {
  uint32_t word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address));
  return word;
}
__device__ __forceinline__ void store16_shared(uint32_t address, uint4 words) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(words.x), "r"(words.y), "r"(words.z),
               "r"(words.w)
               : "memory");
}

__device__ __forceinline__ float bf16_to_float(uint32_t low_bits) { return __uint_as_float(low_bits << 16); }

__device__ __forceinline__ float f16_to_float(uint32_t low_bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(low_bits)));
  return value;
}

// Two numbers to the nearest, ties to even; `low` becomes the lower half.
__device__ __forceinline__ uint32_t floats_to_bf16x2(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ uint32_t floats_to_f16x2(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// a b + c of two numbers each, rounded once. No number is flushed to zero.
__device__ __forceinline__ uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t pair;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(a), "r"(b), "r"(c));
  return pair;
}

__device__ __forceinline__ uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t pair;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(a), "r"(b), "r"(c));
  return pair;
}

// 16 bytes to shared memory that arrive behind the kernel's back; both addresses are multiples of 16.
__device__ __forceinline__ void copy16_async(void* shared, const void* global) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
      "l"(global)
      : "memory");
}

// The same to a shared_address(), and only under a condition, without a branch.
__device__ __forceinline__ void copy16_async_if(bool condition, uint32_t shared, const void* global) {
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; @p cp.async.cg.shared.global [%0], [%1], 16; }" ::"r"(shared),
               "l"(global), "r"(static_cast<uint32_t>(condition))
               : "memory");
}

// copy16_async of 4 bytes, at multiples of 4.
__device__ __forceinline__ void copy4_async(void* shared, const void* global) {
  asm volatile(
      "cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
      "l"(global)
      : "memory");
}

// Closes a group of copies; waits until all of this thread's groups but the last `Pending` have arrived.
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// The warp's d[16, 8] += a[16, 16] b[16, 8] of bf16 or f16 numbers, summed in fp32. With g = lane / 4 and c = lane % 4,
// a lane has of a the pairs from [g, 2c], [g + 8, 2c], [g, 2c + 8] and [g + 8, 2c + 8] on, of b the columns' pairs from
// [2c, g] and [2c + 8, g] on, and of d the numbers [g, 2c], [g, 2c + 1], [g + 8, 2c] and [g + 8, 2c + 1].
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The barrier of a cluster, in two halves, which says that all its blocks have begun, and orders mailbox_open before
// mailbox_send. Targets before sm_90 know no clusters, and no such launch succeeds there.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#else
  __trap();
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
  __trap();
#endif
}

// Numbers sent into the shared memory of other blocks of the cluster are counted by a mailbox (an mbarrier) beside
// them: no fence, and nobody waits but who reads them. One thread opens it for so many bytes, before it comes to the
// cluster's barrier.
__device__ __forceinline__ void mailbox_open(uint64_t* box, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(box));
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(at) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
#else
  __trap();
#endif
}

// To where `at` and `box` are in the shared memory of the cluster's block `rank`.
__device__ __forceinline__ void mailbox_send(float* at, uint64_t* box, unsigned rank, float value) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .u32 there, counted;\n"
      "mapa.shared::cluster.u32 there, %0, %2;\n"
      "mapa.shared::cluster.u32 counted, %1, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [there], %3, [counted];\n"
      "}" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(at))),
      "r"(static_cast<uint32_t>(__cvta_generic_to_shared(box))), "r"(rank), "f"(value)
      : "memory");
#else
  __trap();
#endif
}

// Waits until all that this block's box was opened for is there.
__device__ __forceinline__ void mailbox_wait(uint64_t* box) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
      "@!done bra again;\n"
      "}" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(box)))
      : "memory");
#else
  __trap();
#endif
}

// Puts kernel(args) into the stream, its blocks in clusters of `cluster` neighbours in x, which share a barrier and
// their shared memory. 0, or the cudaError_t, of which no later call hears.
template <class Args>
int launch_clusters(void (*kernel)(Args), dim3 grid, unsigned cluster, dim3 block, size_t shared_bytes, void* stream,
                    const Args& args) {
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 << 10) {
    error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  }
  void* parameters[] = {const_cast<Args*>(&args)};
  if (error == cudaSuccess && cluster == 1) {
    error = cudaLaunchKernel(function, grid, block, parameters, shared_bytes, static_cast<cudaStream_t>(stream));
  } else if (error == cudaSuccess) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = 1;
    error = cudaLaunchKernelExC(&config, function, parameters);
  }
  if (error != cudaSuccess) cudaGetLastError();
  return static_cast<int>(error);
}

// The same without clusters.
template <class Args>
int launch(void (*kernel)(Args), dim3 grid, dim3 block, size_t shared_bytes, void* stream, const Args& args) {
  return launch_clusters(kernel, grid, 1, block, shared_bytes, stream, args);
}

}  // namespace personafast::cuda

#else
#include "emulator.h"
#endif

namespace personafast::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;

// cudaErrorInvalidValue: what a launcher returns for a call that its kernel does not take.
constexpr int kInvalidValue = 1;

// Multiprocessors of the current device; where that cannot be asked, those of an H100.
int multiprocessors();

}  // namespace personafast::cuda
