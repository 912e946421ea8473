#pragma once

#include "images.h"

namespace alexnet_cuda {

template <class Backend>
Tensor local_response_norm(const Tensor& x, int64_t size, int64_t front, double alpha, double beta, double k,
                           int64_t groups, bool spatial) {
  const char* op = "local_response_norm";
  check_4d(op, "x", x);
  LrnArguments args;
  args.lrn = checked_lrn(op, x.size(1), size, front, alpha, beta, k, groups);
  args.spatial = spatial;
  const MemoryFormat format = format_of(x);
  args.images = images_of<Backend>(op, "x", x, format);
  const typename Backend::Guard guard(x);
  Tensor y = Backend::allocate(x, size_of(x), format);
  if (y.numel() == 0) return y;
  const Tensor input = Backend::dense(x, format);
  args.x = input.const_data_ptr();
  args.out = y.mutable_data_ptr();
  Backend::local_response_norm(op, args, x);
  return y;
}

template <class Backend>
Tensor local_response_norm_backward(const Tensor& grad, const Tensor& x, int64_t size, int64_t front, double alpha,
                                    double beta, double k, int64_t groups, bool spatial) {
  const char* op = "_local_response_norm_backward";
  check_4d(op, "x", x);
  check_same(op, "grad", grad, x);
  check_sizes(op, "grad", grad, size_of(x));
  LrnArguments args;
  args.lrn = checked_lrn(op, x.size(1), size, front, alpha, beta, k, groups);
  args.spatial = spatial;
  const MemoryFormat format = format_of(x);
  args.images = images_of<Backend>(op, "x", x, format);
  const typename Backend::Guard guard(x);
  Tensor dx = Backend::allocate(x, size_of(x), format);
  if (dx.numel() == 0) return dx;
  const Tensor input = Backend::dense(x, format), gradient = Backend::dense(grad, format);
  args.x = input.const_data_ptr();
  args.grad = gradient.const_data_ptr();
  args.out = dx.mutable_data_ptr();
  Backend::local_response_norm_backward(op, args, x);
  return dx;
}

}  // namespace alexnet_cuda
