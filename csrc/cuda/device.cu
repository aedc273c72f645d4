#include "device.cuh"

#include <atomic>

#include "personafast/cuda.h"

namespace personafast {
namespace {

// What cuda_trouble asks for: it is compiled for the same devices as every kernel here.
__global__ void probe() {}

}  // namespace

const char* cuda_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int cuda_current_device() {
  int device = -1;
  if (cudaGetDevice(&device) == cudaSuccess) return device;
  cudaGetLastError();
  return -1;
}

int cuda_trouble() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe);
  if (error != cudaSuccess) cudaGetLastError();
  return static_cast<int>(error);
}

int cuda::multiprocessors() {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices] = {};
  const int device = cuda_current_device();
  if (device < 0 || device >= kDevices) return 132;
  if (known[device] == 0) {
    int count = 0;
    if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
      cudaGetLastError();
      return 132;
    }
    known[device] = count;
  }
  return known[device];
}

}  // namespace personafast
