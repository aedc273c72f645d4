// The launchers of csrc/cuda as functions of personafast._C: addresses, sizes and the stream in, nothing out, or a
// KernelError.

#include <pybind11/pybind11.h>

#include <string>

#include "personafast/cuda.h"
#include "personafast/inject.h"

namespace py = pybind11;
using namespace personafast;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Runs the launcher without the lock of the interpreter, since a launch waits where the device's queue is full.
template <class Args>
void launch(const char* kernel, int (*launcher)(const Args&, void*), const Args& args, uintptr_t stream) {
  int error = 0;
  {
    py::gil_scoped_release released;
    error = launcher(args, at<void>(stream));
  }
  if (error == 0) return;
  const std::string message = std::string(kernel) + ": launch failed on cuda:" + std::to_string(cuda_current_device()) +
                              ": " + cuda_error_text(error);
  py::set_error(py::module_::import("personafast.errors").attr("KernelError"), message.c_str());
  throw py::error_already_set();
}

void inject(uintptr_t hidden, int64_t hidden_stride, int hidden_dtype, uintptr_t bank, int64_t bank_stride,
            int bank_dtype, uintptr_t slots, uintptr_t scale, int64_t rows, int64_t width, int64_t bank_rows,
            uintptr_t stream) {
  const InjectArgs args = {at<void>(hidden),
                           hidden_stride,
                           static_cast<Dtype>(hidden_dtype),
                           at<const void>(bank),
                           bank_stride,
                           static_cast<Dtype>(bank_dtype),
                           at<const int32_t>(slots),
                           at<const float>(scale),
                           rows,
                           width,
                           bank_rows};
  launch("inject_kernel", inject_cuda, args, stream);
}

std::string trouble() {
  const int error = cuda_trouble();
  return error == 0 ? std::string() : cuda_error_text(error);
}

}  // namespace

void bind_cuda(py::module_& module) {
  module.def("cuda_trouble", &trouble, "Why no CUDA kernel runs on the current device; empty where they do.");
  module.def("inject_cuda", &inject, "personafast/inject.h");
}
