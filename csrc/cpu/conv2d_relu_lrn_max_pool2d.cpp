#include <tuple>

#include "conv2d.h"

namespace alexnet_cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> conv2d_relu_lrn_max_pool2d(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t conv_stride, int64_t conv_padding,
    bool conv_ceil_mode, int64_t order, int64_t size, int64_t front, double alpha, double beta, double k,
    int64_t groups, int64_t kernel_size, int64_t stride, int64_t padding, bool ceil_mode, bool save, bool) {
  const char* op = "conv2d_relu_lrn_max_pool2d";
  PackedConv packed = pack_conv(op, x, weight, bias, conv_stride, conv_padding, conv_ceil_mode);
  const MemoryFormat format = format_of(x);
  const Conv& c = packed.args.conv;
  const Order which = checked_order(op, order);
  const Lrn lrn = checked_lrn(op, weight.size(0), size, front, alpha, beta, k, groups);
  const Pool pool = checked_pool(op, c.out_height, c.out_width, kernel_size, stride, padding, ceil_mode);

  const std::vector<int64_t> out_size = {x.size(0), c.filters, pool.out_height, pool.out_width};
  Tensor y = result(x, out_size, format);
  Tensor a =
      save ? result(x, {x.size(0), c.filters, c.out_height, c.out_width}, format) : no_elements(x, x.scalar_type());
  Tensor code = save ? result(x, out_size, format, ScalarType::Byte) : no_elements(x, ScalarType::Byte);
  if (y.numel() == 0) return {y, a, code};
  packed.args.out = save ? a.mutable_data_ptr() : nullptr;
  Images images = packed.args.images;
  images.channels = c.filters;
  images.height = c.out_height;
  images.width = c.out_width;
  const TailArgs tail = {nullptr,
                         nullptr,
                         save ? static_cast<uint8_t*>(code.mutable_data_ptr()) : nullptr,
                         y.mutable_data_ptr(),
                         images,
                         which,
                         lrn,
                         pool};
  run(block_forward_kernel(), BlockArgs{packed.args, tail}, images.count * pool.out_height,
      pool.stride * pool.width * images.channels * c.kernel_size * c.kernel_size);
  return {y, a, code};
}

}  // namespace
}  // namespace alexnet_cuda

STABLE_TORCH_LIBRARY_IMPL(alexnet_cuda, CPU, m) {
  m.impl("conv2d_relu_lrn_max_pool2d", TORCH_BOX(&alexnet_cuda::conv2d_relu_lrn_max_pool2d));
}
