#include <algorithm>
#include <tuple>

#include "conv2d.h"

namespace alexnet_cuda {
namespace {

void check_groups(const char* op, const char* what, int64_t n, int64_t groups) {
  STD_TORCH_CHECK(groups >= 1 && n > 0 && n % (16 * groups) == 0, op, ": expected groups to cut the ", n, " ", what,
                  " into multiples of 16, got ", groups);
}

// The convolution of x, what `padding` says being what the kernel pads.
Conv checked_winograd(const char* op, const Tensor& x, int64_t filters, int64_t kernel_size, int64_t padding,
                      int64_t groups) {
  check_4d(op, "x", x);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, op, ": expected x to be float32, got scalar type ",
                  static_cast<int>(x.scalar_type()));
  check_groups(op, "channels", x.size(1), groups);
  check_groups(op, "filters", filters, groups);
  STD_TORCH_CHECK(kernel_size == 3 || kernel_size == 5, op, ": expected kernel_size to be 3 or 5, got ", kernel_size);
  STD_TORCH_CHECK(padding >= 0 && padding < kernel_size, op, ": expected padding to be in [0, ", kernel_size, "), got ",
                  padding);
  return checked_conv(op, x.size(1), x.size(2), x.size(3), filters, kernel_size, 1, padding, false);
}

int64_t tiles_of(const Conv& c, int64_t images) {
  const int64_t outputs = 7 - c.kernel_size;
  return images * blocks_of(c.out_height, outputs) * blocks_of(c.out_width, outputs);
}

std::tuple<Tensor, bool> winograd_conv2d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                         int64_t padding, int64_t groups, bool transposed, bool relu) {
  const char* op = "_winograd_conv2d";
  check_4d(op, "weight", weight);
  check_same(op, "weight", weight, x);
  const int64_t kernel_size = weight.size(2), filters = transposed ? weight.size(1) * groups : weight.size(0);
  const Conv conv =
      checked_winograd(op, x, filters, kernel_size, transposed ? kernel_size - 1 - padding : padding, groups);
  const int64_t of_x = conv.channels, of_y = filters / groups;
  check_sizes(op, "weight", weight,
              {transposed ? of_x : filters, transposed ? of_y : of_x / groups, kernel_size, kernel_size});
  if (bias) {
    check_same(op, "bias", *bias, x);
    check_sizes(op, "bias", *bias, {filters});
  }
  const Tensor input = dense(x, MemoryFormat::ChannelsLast), kernels = dense(weight, MemoryFormat::Contiguous);
  const Tensor offset = dense(bias.value_or(no_elements(x, x.scalar_type())), MemoryFormat::Contiguous);
  Tensor y = result(x, {x.size(0), filters, conv.out_height, conv.out_width}, MemoryFormat::ChannelsLast);
  bool finite = true;
  if (y.numel() == 0) return {y, finite};

  const int64_t channels = conv.channels / groups, block = filter_block(DType::kFloat),
                blocks = groups * blocks_of(of_y, block);
  Tensor points = result(x, {blocks, kWinogradPoints, channels, block}, MemoryFormat::Contiguous);
  const WinogradConvArgs args = {static_cast<const float*>(input.const_data_ptr()),
                                 static_cast<const float*>(kernels.const_data_ptr()),
                                 bias ? static_cast<const float*>(offset.const_data_ptr()) : nullptr,
                                 static_cast<float*>(points.mutable_data_ptr()),
                                 static_cast<float*>(y.mutable_data_ptr()),
                                 &finite,
                                 conv,
                                 x.size(0),
                                 static_cast<int>(groups),
                                 transposed,
                                 relu};
  run(winograd_conv2d_weights_kernel(), args, blocks, kWinogradPoints * channels * block);
  run(winograd_conv2d_kernel(), args, blocks_of(tiles_of(conv, x.size(0)), kWinogradTask),
      kWinogradPoints * channels * filters);
  return {format_of(x) == MemoryFormat::ChannelsLast ? y : torch::stable::contiguous(y), finite};
}

std::tuple<Tensor, bool> winograd_conv2d_weight_grad(const Tensor& grad, const Tensor& x, int64_t kernel_size,
                                                     int64_t padding, int64_t groups) {
  const char* op = "_winograd_conv2d_weight_grad";
  check_4d(op, "grad", grad);
  check_same(op, "grad", grad, x);
  const Conv conv = checked_winograd(op, x, grad.size(1), kernel_size, padding, groups);
  check_sizes(op, "grad", grad, {x.size(0), conv.filters, conv.out_height, conv.out_width});
  const Tensor input = dense(x, MemoryFormat::ChannelsLast), gradient = dense(grad, MemoryFormat::ChannelsLast);
  const int64_t channels = conv.channels / groups, filters = conv.filters / groups;
  const int64_t block = filter_block(DType::kFloat), blocks = groups * blocks_of(filters, block);
  Tensor weight = result(x, {conv.filters, channels, kernel_size, kernel_size}, MemoryFormat::Contiguous);

  bool finite = true;
  if (x.size(0) == 0) {
    std::fill_n(static_cast<float*>(weight.mutable_data_ptr()), weight.numel(), 0.0f);
    return {weight, finite};
  }

  // Points that stay in the last cache until they are multiplied; how the sum is cut depends on the sizes alone.
  constexpr int64_t kPart = int64_t{16} << 20;
  const int64_t bytes = kWinogradPoints * (conv.channels + blocks * block) * 4;
  const int64_t tiles = tiles_of(conv, x.size(0)),
                part = std::min(tiles, std::max<int64_t>(64, kPart / bytes / 64 * 64));
  Tensor inputs = result(x, {kWinogradPoints, conv.channels, part, 1}, MemoryFormat::Contiguous);
  Tensor grads = result(x, {kWinogradPoints, blocks, part, block}, MemoryFormat::Contiguous);
  Tensor sums = result(x, {blocks, kWinogradPoints, channels, block}, MemoryFormat::Contiguous);
  WinogradGradArgs args = {static_cast<const float*>(input.const_data_ptr()),
                           static_cast<const float*>(gradient.const_data_ptr()),
                           static_cast<float*>(inputs.mutable_data_ptr()),
                           static_cast<float*>(grads.mutable_data_ptr()),
                           static_cast<float*>(sums.mutable_data_ptr()),
                           static_cast<float*>(weight.mutable_data_ptr()),
                           &finite,
                           conv,
                           x.size(0),
                           static_cast<int>(groups),
                           0,
                           0};
  for (; args.first < tiles; args.first += part) {
    args.tiles = std::min(part, tiles - args.first);
    run(winograd_grad_points_kernel(), args, args.tiles, bytes);
    run(winograd_grad_products_kernel(), args, blocks * kWinogradPoints, channels * block * args.tiles);
  }
  run(winograd_grad_weights_kernel(), args, blocks, kWinogradPoints * channels * block);
  return {weight, finite};
}

}  // namespace
}  // namespace alexnet_cuda

STABLE_TORCH_LIBRARY_IMPL(alexnet_cuda, CPU, m) {
  m.impl("_winograd_conv2d", TORCH_BOX(&alexnet_cuda::winograd_conv2d));
  m.impl("_winograd_conv2d_weight_grad", TORCH_BOX(&alexnet_cuda::winograd_conv2d_weight_grad));
}
