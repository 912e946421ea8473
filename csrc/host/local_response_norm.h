#pragma once

#include "images.h"

namespace alexnet_cuda {

template <class Backend>
LrnArguments lrn_arguments(const char* op, const Tensor& x, int64_t size, int64_t front, double alpha, double beta,
                           double k, int64_t groups, bool spatial) {
  LrnArguments args;
  args.lrn = checked_lrn(op, x.size(1), size, front, alpha, beta, k, groups);
  args.spatial = spatial;
  args.images = images_of<Backend>(op, "x", x, size_of(x), format_of(x));
  return args;
}

template <class Backend>
Tensor local_response_norm(const Tensor& x, int64_t size, int64_t front, double alpha, double beta, double k,
                           int64_t groups, bool spatial) {
  const char* op = "local_response_norm";
  check_4d(op, "x", x);
  const LrnArguments args = lrn_arguments<Backend>(op, x, size, front, alpha, beta, k, groups, spatial);
  return run<Backend>(op, &Backend::local_response_norm, args, x, std::nullopt, size_of(x), format_of(x));
}

template <class Backend>
Tensor local_response_norm_backward(const Tensor& grad, const Tensor& x, int64_t size, int64_t front, double alpha,
                                    double beta, double k, int64_t groups, bool spatial) {
  const char* op = "_local_response_norm_backward";
  check_4d(op, "x", x);
  check_same(op, "grad", grad, x);
  check_sizes(op, "grad", grad, size_of(x));
  const LrnArguments args = lrn_arguments<Backend>(op, x, size, front, alpha, beta, k, groups, spatial);
  return run<Backend>(op, &Backend::local_response_norm_backward, args, x, grad, size_of(x), format_of(x));
}

}  // namespace alexnet_cuda
