#pragma once

namespace personafast {

// The launchers <op>_cuda put their kernels into `stream`, a cudaStream_t of the current device where every address of
// their arguments is, and return before these have run: 0, or the cudaError_t that the launch gave, after which the
// next one starts afresh. They never wait for the device. A row whose slot is out of range is left alone there.

// An error that a launcher returned, in CUDA's words.
const char* cuda_error_text(int error);

// The current device, or -1 where there is none.
int cuda_current_device();

// 0 if the kernels of this build run on the current device, or else the cudaError_t that says why they do not: there is
// no device, its driver is too old, or they were built for others.
int cuda_trouble();

}  // namespace personafast
