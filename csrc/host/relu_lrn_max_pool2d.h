#pragma once

#include "max_pool2d.h"

namespace alexnet_cuda {

template <class Backend>
std::tuple<Tensor, Tensor> relu_lrn_max_pool2d(const Tensor& x, int64_t order, int64_t size, int64_t front,
                                               double alpha, double beta, double k, int64_t groups, int64_t kernel_size,
                                               int64_t stride, int64_t padding, bool ceil_mode, bool save_code) {
  const char* op = "relu_lrn_max_pool2d";
  check_4d(op, "x", x);
  TailArguments args;
  args.order = checked_order(op, order);
  args.lrn = checked_lrn(op, x.size(1), size, front, alpha, beta, k, groups);
  args.pool = checked_pool(op, x.size(2), x.size(3), kernel_size, stride, padding, ceil_mode);
  return run_pooling<Backend>(op, &Backend::relu_lrn_max_pool2d, args, x, save_code);
}

template <class Backend>
Tensor relu_lrn_max_pool2d_backward(const Tensor& grad, const Tensor& x, const Tensor& code, int64_t order,
                                    int64_t size, int64_t front, double alpha, double beta, double k, int64_t groups,
                                    int64_t kernel_size, int64_t stride, int64_t padding) {
  const char* op = "_relu_lrn_max_pool2d_backward";
  check_4d(op, "x", x);
  TailArguments args;
  args.order = checked_order(op, order);
  args.lrn = checked_lrn(op, x.size(1), size, front, alpha, beta, k, groups);
  args.pool = checked_pool_backward(op, code, x.size(2), x.size(3), kernel_size, stride, padding);
  check_same(op, "grad", grad, x);
  check_device(op, "code", code, x);
  const std::vector<int64_t> out_size = {x.size(0), x.size(1), args.pool.out_height, args.pool.out_width};
  check_sizes(op, "code", code, out_size);
  check_sizes(op, "grad", grad, out_size);
  Backend::check_size(op, "code", out_size[1] * out_size[2] * out_size[3]);
  const MemoryFormat format = format_of(x);
  args.images = images_of<Backend>(op, "x", x, size_of(x), format);
  const Tensor codes = Backend::dense(code, format);
  args.code = code_data(codes);
  return run<Backend>(op, &Backend::relu_lrn_max_pool2d_backward, args, x, grad, size_of(x), format);
}

}  // namespace alexnet_cuda
