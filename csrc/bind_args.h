#pragma once

// Addresses and sizes as Python hands them over, made into the arguments of kernels that run on a CPU and on a GPU.

#include <stdint.h>

#include "personafast/add_inject_rms_norm.h"
#include "personafast/chunk_scores.h"
#include "personafast/inject.h"
#include "personafast/lora_delta.h"
#include "personafast/masked_linear.h"
#include "personafast/sparse_linear.h"
#include "personafast/steer.h"

namespace personafast {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline AddInjectRmsNormArgs add_inject_rms_norm_args(uintptr_t normed, uintptr_t residual_out, uintptr_t update,
                                                     int64_t update_stride, uintptr_t residual, int64_t residual_stride,
                                                     int dtype, uintptr_t bank, int64_t bank_stride, int bank_dtype,
                                                     uintptr_t slots, uintptr_t scale, uintptr_t weight,
                                                     int weight_dtype, float eps, int64_t rows, int64_t width,
                                                     int64_t bank_rows) {
  return {at<void>(normed),
          at<void>(residual_out),
          at<const void>(update),
          update_stride,
          at<const void>(residual),
          residual_stride,
          static_cast<Dtype>(dtype),
          at<const void>(bank),
          bank_stride,
          static_cast<Dtype>(bank_dtype),
          at<const int32_t>(slots),
          at<const float>(scale),
          at<const void>(weight),
          static_cast<Dtype>(weight_dtype),
          eps,
          rows,
          width,
          bank_rows};
}

inline ChunkAcceptArgs chunk_accept_args(uintptr_t out, uintptr_t scores, uintptr_t log_bound, uintptr_t log_u,
                                         uintptr_t lengths, int64_t rows, int64_t chunk) {
  return {at<int32_t>(out),
          at<const float>(scores),
          at<const float>(log_bound),
          at<const float>(log_u),
          at<const int32_t>(lengths),
          rows,
          chunk};
}

inline ChunkScoresArgs chunk_scores_args(uintptr_t out, uintptr_t ref, uintptr_t policies, uintptr_t weights,
                                         uintptr_t carried, uintptr_t aggregator, uintptr_t p, int64_t rows,
                                         int64_t members, int64_t chunk) {
  return {at<float>(out),
          at<const float>(ref),
          at<const float>(policies),
          at<const float>(weights),
          at<const float>(carried),
          at<const int32_t>(aggregator),
          at<const float>(p),
          rows,
          members,
          chunk};
}

inline ChunkScoresAcceptArgs chunk_scores_accept_args(uintptr_t scores, uintptr_t accepted, uintptr_t ref,
                                                      uintptr_t policies, uintptr_t weights, uintptr_t carried,
                                                      uintptr_t aggregator, uintptr_t p, uintptr_t log_bound,
                                                      uintptr_t log_u, uintptr_t lengths, int64_t rows, int64_t members,
                                                      int64_t chunk) {
  return {chunk_scores_args(scores, ref, policies, weights, carried, aggregator, p, rows, members, chunk),
          chunk_accept_args(accepted, scores, log_bound, log_u, lengths, rows, chunk)};
}

inline InjectArgs inject_args(uintptr_t hidden, int64_t hidden_stride, int hidden_dtype, uintptr_t bank,
                              int64_t bank_stride, int bank_dtype, uintptr_t slots, uintptr_t scale, int64_t rows,
                              int64_t width, int64_t bank_rows) {
  return {at<void>(hidden),
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
}

inline LoraDeltaArgs lora_delta_args(uintptr_t out, int64_t out_stride, uintptr_t x, int64_t x_stride, uintptr_t a,
                                     int64_t a_stride_m, int64_t a_stride_r, uintptr_t b, int64_t b_stride_m,
                                     int64_t b_stride_o, int64_t b_stride_r, uintptr_t slots, uintptr_t scale,
                                     uintptr_t ranks, int64_t rows, int64_t outputs, int64_t features, int64_t adapters,
                                     int64_t rank, int dtype) {
  return {at<void>(out),
          out_stride,
          at<const void>(x),
          x_stride,
          at<const void>(a),
          a_stride_m,
          a_stride_r,
          at<const void>(b),
          b_stride_m,
          b_stride_o,
          b_stride_r,
          at<const int32_t>(slots),
          at<const float>(scale),
          at<const int32_t>(ranks),
          rows,
          outputs,
          features,
          adapters,
          rank,
          static_cast<Dtype>(dtype)};
}

inline LoraDeltaCudaArgs lora_delta_cuda_args(uintptr_t out, int64_t out_stride, uintptr_t x, int64_t x_stride,
                                              uintptr_t a, int64_t a_stride_m, int64_t a_stride_r, uintptr_t b,
                                              int64_t b_stride_m, int64_t b_stride_o, int64_t b_stride_r,
                                              uintptr_t slots, uintptr_t scale, uintptr_t ranks, int64_t rows,
                                              int64_t outputs, int64_t features, int64_t adapters, int64_t rank,
                                              int dtype, uintptr_t inner) {
  return {lora_delta_args(out, out_stride, x, x_stride, a, a_stride_m, a_stride_r, b, b_stride_m, b_stride_o,
                          b_stride_r, slots, scale, ranks, rows, outputs, features, adapters, rank, dtype),
          at<float>(inner)};
}

inline MaskedLinearArgs masked_linear_args(uintptr_t out, uintptr_t x, int64_t x_stride, uintptr_t weight,
                                           int64_t weight_stride, uintptr_t masks, uintptr_t slots, uintptr_t gamma,
                                           uintptr_t bias, int64_t rows, int64_t outputs, int64_t features,
                                           int64_t personas, int dtype) {
  return {at<void>(out),
          at<const void>(x),
          x_stride,
          at<const void>(weight),
          weight_stride,
          at<const int32_t>(masks),
          at<const int32_t>(slots),
          at<const float>(gamma),
          at<const void>(bias),
          rows,
          outputs,
          features,
          personas,
          static_cast<Dtype>(dtype)};
}

inline SparseLinearArgs sparse_linear_args(uintptr_t out, uintptr_t x, int64_t x_stride, uintptr_t values,
                                           uintptr_t bitmap, uintptr_t row_offsets, uintptr_t bias, int64_t value_count,
                                           int64_t rows, int64_t outputs, int64_t features, int dtype) {
  return {at<void>(out),
          at<const void>(x),
          x_stride,
          at<const void>(values),
          at<const int32_t>(bitmap),
          at<const int64_t>(row_offsets),
          at<const void>(bias),
          value_count,
          rows,
          outputs,
          features,
          static_cast<Dtype>(dtype)};
}

inline SteerArgs steer_args(uintptr_t hidden, int64_t hidden_stride, int hidden_dtype, uintptr_t directions,
                            int64_t directions_stride, int directions_dtype, uintptr_t slots, uintptr_t mode,
                            uintptr_t params, uintptr_t scale, int64_t rows, int64_t width, int64_t directions_rows) {
  return {at<void>(hidden),
          hidden_stride,
          static_cast<Dtype>(hidden_dtype),
          at<const void>(directions),
          directions_stride,
          static_cast<Dtype>(directions_dtype),
          at<const int32_t>(slots),
          at<const int8_t>(mode),
          at<const float>(params),
          at<const float>(scale),
          rows,
          width,
          directions_rows};
}

}  // namespace personafast
