// personafast._C: marshals addresses and sizes from Python to the kernels. It knows nothing of torch; the caller has
// checked every shape.

#include <pybind11/pybind11.h>

#include "bind_args.h"
#include "personafast/aggregate_logits.h"
#include "personafast/attend.h"
#include "personafast/elementary.h"
#include "personafast/isa.h"
#include "personafast/mask_bits.h"
#include "personafast/masked_linear.h"
#include "personafast/philox.h"
#include "personafast/rms_norm.h"
#include "personafast/silu_mul.h"
#include "personafast/sparse_linear.h"
#include "personafast/token_logprobs.h"
#include "personafast/verify_draft.h"

namespace py = pybind11;

#ifdef PERSONAFAST_CUDA_ARCHS
void bind_cuda(py::module_& module);
#endif

using namespace personafast;

namespace {

// The kernel as a function of what `make` takes and the number of threads.
template <class Args, class... P>
auto on_cpu(Args (*make)(P...), int64_t (*kernel)(const Args&, int)) {
  return [=](P... parameters, int threads) {
    const Args args = make(parameters...);
    py::gil_scoped_release released;
    return kernel(args, threads);
  };
}

int64_t aggregate_logits(uintptr_t out, uintptr_t ref, int64_t ref_stride, uintptr_t policies, int64_t policy_stride_n,
                         int64_t policy_stride_b, uintptr_t weights, uintptr_t carried, uintptr_t aggregator,
                         uintptr_t p, uintptr_t min_p, int64_t rows, int64_t members, int64_t vocabulary, int dtype,
                         int threads) {
  const AggregateLogitsArgs args = {at<float>(out),
                                    at<const void>(ref),
                                    ref_stride,
                                    at<const void>(policies),
                                    policy_stride_n,
                                    policy_stride_b,
                                    at<const float>(weights),
                                    at<const float>(carried),
                                    at<const int32_t>(aggregator),
                                    at<const float>(p),
                                    at<const float>(min_p),
                                    rows,
                                    members,
                                    vocabulary,
                                    static_cast<Dtype>(dtype)};
  py::gil_scoped_release released;
  return aggregate_logits_cpu(args, threads);
}

void attend(uintptr_t out, int64_t out_stride_b, int64_t out_stride_h, int64_t out_stride_q, uintptr_t query,
            int64_t query_stride_b, int64_t query_stride_h, int64_t query_stride_q, uintptr_t key, int64_t key_stride_b,
            int64_t key_stride_h, int64_t key_stride_n, uintptr_t value, int64_t value_stride_b, int64_t value_stride_h,
            int64_t value_stride_n, uintptr_t mask, int64_t mask_stride_b, int64_t mask_stride_q, bool mask_adds,
            float scale, int64_t batch, int64_t key_heads, int64_t groups, int64_t queries, int64_t keys, int64_t width,
            int dtype, int threads) {
  const AttendArgs args = {at<void>(out),
                           out_stride_b,
                           out_stride_h,
                           out_stride_q,
                           at<const void>(query),
                           query_stride_b,
                           query_stride_h,
                           query_stride_q,
                           at<const void>(key),
                           key_stride_b,
                           key_stride_h,
                           key_stride_n,
                           at<const void>(value),
                           value_stride_b,
                           value_stride_h,
                           value_stride_n,
                           at<const void>(mask),
                           mask_stride_b,
                           mask_stride_q,
                           mask_adds,
                           scale,
                           batch,
                           key_heads,
                           groups,
                           queries,
                           keys,
                           width,
                           static_cast<Dtype>(dtype)};
  py::gil_scoped_release released;
  attend_cpu(args, threads);
}

// A few hundred numbers: not worth releasing the lock of the interpreter for.
template <class Result, class Args, class... P>
auto on_this_thread(Args (*make)(P...), Result (*kernel)(const Args&)) {
  return [=](P... parameters) { return kernel(make(parameters...)); };
}

void exp_each(uintptr_t x, uintptr_t out, int64_t count) { exp_cpu(at<const float>(x), at<float>(out), count); }

void expm1_each(uintptr_t x, uintptr_t out, int64_t count) { expm1_cpu(at<const float>(x), at<float>(out), count); }

void log1p_each(uintptr_t x, uintptr_t out, int64_t count) { log1p_cpu(at<const float>(x), at<float>(out), count); }

void log_each(uintptr_t x, uintptr_t out, int64_t count) { log_cpu(at<const float>(x), at<float>(out), count); }

void linear(uintptr_t out, uintptr_t x, uintptr_t weight, int64_t weight_stride, uintptr_t bias, int64_t rows,
            int64_t outputs, int64_t features, int dtype, int threads) {
  const MaskedLinearArgs args = {at<void>(out), at<const void>(x), features, at<const void>(weight),   weight_stride,
                                 nullptr,       nullptr,           nullptr,  at<const void>(bias),     rows,
                                 outputs,       features,          0,        static_cast<Dtype>(dtype)};
  py::gil_scoped_release released;
  masked_linear_cpu(args, threads);
}

void rms_norm(uintptr_t out, uintptr_t x, uintptr_t weight, float eps, int64_t rows, int64_t width, int dtype) {
  py::gil_scoped_release released;
  rms_norm_cpu({at<void>(out), at<const void>(x), at<const void>(weight), eps, rows, width, static_cast<Dtype>(dtype)});
}

void silu_mul(uintptr_t out, uintptr_t gate, uintptr_t up, int64_t count, int dtype, int threads) {
  py::gil_scoped_release released;
  silu_mul_cpu({at<void>(out), at<const void>(gate), at<const void>(up), count, static_cast<Dtype>(dtype)}, threads);
}

void compress(uintptr_t weight, int64_t weight_stride, uintptr_t bitmap, uintptr_t row_offsets, uintptr_t values,
              int64_t outputs, int64_t features, int dtype, bool fill) {
  const CompressArgs args = {at<const void>(weight),
                             weight_stride,
                             at<const int32_t>(bitmap),
                             at<int64_t>(row_offsets),
                             at<void>(values),
                             outputs,
                             features,
                             static_cast<Dtype>(dtype)};
  py::gil_scoped_release released;
  compress_cpu(args, fill);
}

int64_t token_logprobs(uintptr_t out, uintptr_t hidden, int64_t hidden_stride, uintptr_t head, int64_t head_stride,
                       uintptr_t tokens, uintptr_t temperature, uintptr_t bias, float logit_scale, float softcap,
                       int64_t rows, int64_t vocabulary, int64_t features, int dtype, int threads) {
  const TokenLogprobsArgs args = {at<float>(out),
                                  at<const void>(hidden),
                                  hidden_stride,
                                  at<const void>(head),
                                  head_stride,
                                  at<const int64_t>(tokens),
                                  at<const float>(temperature),
                                  at<const void>(bias),
                                  logit_scale,
                                  softcap,
                                  rows,
                                  vocabulary,
                                  features,
                                  static_cast<Dtype>(dtype)};
  py::gil_scoped_release released;
  return token_logprobs_cpu(args, threads);
}

void pack_mask(uintptr_t from, int64_t from_stride, uintptr_t to, int64_t rows, int64_t columns, int threads) {
  py::gil_scoped_release released;
  pack_mask_cpu({at<const void>(from), from_stride, at<void>(to), rows, columns}, threads);
}

void unpack_mask(uintptr_t from, int64_t from_stride, uintptr_t to, int64_t rows, int64_t columns, int threads) {
  py::gil_scoped_release released;
  unpack_mask_cpu({at<const void>(from), from_stride, at<void>(to), rows, columns}, threads);
}

void uniform(uintptr_t out, uintptr_t seeds, uintptr_t positions, uint32_t stream, int64_t rows, int64_t n) {
  philox_uniform(at<double>(out), at<const int64_t>(seeds), at<const int64_t>(positions), stream, rows, n);
}

int64_t verify_draft(uintptr_t out, uintptr_t accepted, uintptr_t target, int64_t target_stride_b,
                     int64_t target_stride_j, uintptr_t draft, int64_t draft_stride_b, int64_t draft_stride_j,
                     uintptr_t tokens, uintptr_t lengths, uintptr_t seeds, uintptr_t positions, uint32_t accept_stream,
                     uint32_t sample_stream, int64_t rows, int64_t chunk, int64_t vocabulary, bool block, int dtype,
                     int threads) {
  const VerifyDraftArgs args = {at<int64_t>(out),
                                at<int32_t>(accepted),
                                at<const void>(target),
                                target_stride_b,
                                target_stride_j,
                                at<const void>(draft),
                                draft_stride_b,
                                draft_stride_j,
                                at<const int64_t>(tokens),
                                at<const int32_t>(lengths),
                                at<const int64_t>(seeds),
                                at<const int64_t>(positions),
                                accept_stream,
                                sample_stream,
                                rows,
                                chunk,
                                vocabulary,
                                block,
                                static_cast<Dtype>(dtype)};
  py::gil_scoped_release released;
  return verify_draft_cpu(args, threads);
}

py::dict build_info() {
  py::list compiled;
  py::list supported;
  for (int i = 0; i < kIsas; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (isa_compiled(isa)) compiled.append(isa_name(isa));
    if (isa_compiled(isa) && isa_supported(isa)) supported.append(isa_name(isa));
  }
  py::dict info;
  info["version"] = PERSONAFAST_VERSION;
  info["compiler"] = PERSONAFAST_COMPILER;
  info["isas_compiled"] = compiled;
  info["isas_supported"] = supported;
  info["isa"] = isa_name(isa_chosen());
#ifdef PERSONAFAST_CUDA_ARCHS
  info["cuda"] = py::str(PERSONAFAST_CUDA_ARCHS).attr("split")(",");
#else
  info["cuda"] = false;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "personafast's C++ kernels, by address: use personafast.ops";
  module.def("build_info", &build_info,
             "Version, compiler, instruction sets compiled, supported here and chosen, and the GPUs compiled for.");
  module.def("add_inject_rms_norm", on_cpu(add_inject_rms_norm_args, add_inject_rms_norm_cpu),
             "personafast/add_inject_rms_norm.h");
  module.def("compress", &compress, "personafast/sparse_linear.h");
  module.def("aggregate_logits", &aggregate_logits, "personafast/aggregate_logits.h");
  module.def("attend", &attend, "personafast/attend.h");
  module.def("chunk_accept", on_this_thread(chunk_accept_args, chunk_accept_cpu), "personafast/chunk_scores.h");
  module.def("chunk_scores", on_this_thread(chunk_scores_args, chunk_scores_cpu), "personafast/chunk_scores.h");
  module.def("exp", &exp_each, "personafast/elementary.h");
  module.def("expm1", &expm1_each, "personafast/elementary.h");
  module.def("inject_", on_cpu(inject_args, inject_cpu), "personafast/inject.h");
  module.def("linear", &linear, "personafast/masked_linear.h, without masks");
  module.def("log", &log_each, "personafast/elementary.h");
  module.def("log1p", &log1p_each, "personafast/elementary.h");
  module.def("lora_delta_", on_cpu(lora_delta_args, lora_delta_cpu), "personafast/lora_delta.h");
  module.def("masked_linear", on_cpu(masked_linear_args, masked_linear_cpu), "personafast/masked_linear.h");
  module.def("pack_mask", &pack_mask, "personafast/mask_bits.h");
  module.def("philox_uniform", &uniform, "personafast/philox.h");
  module.def("rms_norm", &rms_norm, "personafast/rms_norm.h");
  module.def("silu_mul", &silu_mul, "personafast/silu_mul.h");
  module.def("sparse_linear", on_cpu(sparse_linear_args, sparse_linear_cpu), "personafast/sparse_linear.h");
  module.def("token_logprobs", &token_logprobs, "personafast/token_logprobs.h");
  module.def("steer_", on_cpu(steer_args, steer_cpu), "personafast/steer.h");
  module.def("unpack_mask", &unpack_mask, "personafast/mask_bits.h");
  module.def("verify_draft", &verify_draft, "personafast/verify_draft.h");
#ifdef PERSONAFAST_CUDA_ARCHS
  bind_cuda(module);
#endif
}
