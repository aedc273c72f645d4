// The launchers of csrc/cuda as functions of personafast._C: addresses, sizes and the stream in, nothing out, or a
// KernelError.

#include <pybind11/pybind11.h>

#include <string>

#include "bind_args.h"
#include "personafast/cuda.h"

namespace py = pybind11;
using namespace personafast;

namespace {

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

// The launcher as a function of what `make` takes and the stream.
template <class Args, class... P>
auto on_gpu(const char* kernel, Args (*make)(P...), int (*launcher)(const Args&, void*)) {
  return [=](P... parameters, uintptr_t stream) { launch(kernel, launcher, make(parameters...), stream); };
}

std::string trouble() {
  const int error = cuda_trouble();
  return error == 0 ? std::string() : cuda_error_text(error);
}

}  // namespace

void bind_cuda(py::module_& module) {
  module.def("cuda_trouble", &trouble, "Why no CUDA kernel runs on the current device; empty where they do.");
  module.def("add_inject_rms_norm_cuda",
             on_gpu("add_inject_rms_norm_kernel", add_inject_rms_norm_args, add_inject_rms_norm_cuda),
             "personafast/add_inject_rms_norm.h");
  module.def("chunk_accept_cuda", on_gpu("chunk_accept_kernel", chunk_accept_args, chunk_accept_cuda),
             "personafast/chunk_scores.h");
  module.def("chunk_scores_accept_cuda",
             on_gpu("chunk_scores_kernel", chunk_scores_accept_args, chunk_scores_accept_cuda),
             "personafast/chunk_scores.h");
  module.def("chunk_scores_cuda", on_gpu("chunk_scores_kernel", chunk_scores_args, chunk_scores_cuda),
             "personafast/chunk_scores.h");
  module.def("inject_cuda", on_gpu("inject_kernel", inject_args, inject_cuda), "personafast/inject.h");
  module.def("lora_delta_cuda", on_gpu("lora_delta_kernel", lora_delta_cuda_args, lora_delta_cuda),
             "personafast/lora_delta.h");
  module.def("masked_linear_cuda", on_gpu("masked_linear_kernel", masked_linear_args, masked_linear_cuda),
             "personafast/masked_linear.h");
  module.def("sparse_linear_cuda", on_gpu("sparse_linear_kernel", sparse_linear_args, sparse_linear_cuda),
             "personafast/sparse_linear.h");
  module.def("steer_cuda", on_gpu("steer_kernel", steer_args, steer_cuda), "personafast/steer.h");
}
