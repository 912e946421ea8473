#include "host.h"

namespace alexnet_cuda {
namespace {

void run_lrn(LrnArgs args, bool spatial, bool backward) {
  const Images& images = args.images;
  if (spatial) {
    const int64_t work = images.pixels() * std::min(images.channels, kPlanes) * args.lrn.size;
    run(backward ? spatial_lrn_backward_kernel() : spatial_lrn_forward_kernel(), args, plane_blocks(images, kPlanes),
        work);
  } else {
    const int64_t pixels = images.channels_last ? images.count * images.pixels() : images.pixels();
    const int64_t strips = (pixels + kStrip - 1) / kStrip * (images.channels_last ? 1 : images.count);
    run(backward ? lrn_backward_kernel() : lrn_forward_kernel(), args, strips, kStrip * images.channels);
  }
}

Tensor local_response_norm(const Tensor& x, int64_t size, int64_t front, double alpha, double beta, double k,
                           int64_t groups, bool spatial) {
  const char* op = "local_response_norm";
  check_4d(op, "x", x);
  const Lrn lrn = checked_lrn(op, x.size(1), size, front, alpha, beta, k, groups);
  const MemoryFormat format = format_of(x);
  const Images images = images_of(op, x, format);
  const Tensor input = dense(x, format);
  Tensor y = result(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, format);
  if (y.numel() == 0) return y;
  run_lrn({input.const_data_ptr(), nullptr, y.mutable_data_ptr(), images, lrn}, spatial, false);
  return y;
}

Tensor local_response_norm_backward(const Tensor& grad, const Tensor& x, int64_t size, int64_t front, double alpha,
                                    double beta, double k, int64_t groups, bool spatial) {
  const char* op = "_local_response_norm_backward";
  check_4d(op, "x", x);
  const Lrn lrn = checked_lrn(op, x.size(1), size, front, alpha, beta, k, groups);
  check_same(op, "grad", grad, x);
  check_sizes(op, "grad", grad, {x.size(0), x.size(1), x.size(2), x.size(3)});
  const MemoryFormat format = format_of(x);
  const Images images = images_of(op, x, format);
  const Tensor input = dense(x, format), gradient = dense(grad, format);
  Tensor dx = result(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, format);
  if (dx.numel() == 0) return dx;
  run_lrn({input.const_data_ptr(), gradient.const_data_ptr(), dx.mutable_data_ptr(), images, lrn}, spatial, true);
  return dx;
}

}  // namespace
}  // namespace alexnet_cuda

STABLE_TORCH_LIBRARY_IMPL(alexnet_cuda, CPU, m) {
  m.impl("local_response_norm", TORCH_BOX(&alexnet_cuda::local_response_norm));
  m.impl("_local_response_norm_backward", TORCH_BOX(&alexnet_cuda::local_response_norm_backward));
}
