#include <tuple>

#include "host.h"

namespace alexnet_cuda {
namespace {

std::tuple<Tensor, bool> winograd_conv2d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                         int64_t padding, int64_t groups, bool transposed, bool relu) {
  const char* op = "_winograd_conv2d";
  check_4d(op, "x", x);
  check_4d(op, "weight", weight);
  check_same(op, "weight", weight, x);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, op, ": expected x to be float32, got scalar type ",
                  static_cast<int>(x.scalar_type()));
  const int64_t channels = x.size(1), kernel_size = weight.size(2);
  STD_TORCH_CHECK(groups >= 1 && channels % (16 * groups) == 0, op, ": expected groups to cut the ", channels,
                  " channels of x into multiples of 16, got ", groups);
  STD_TORCH_CHECK(kernel_size == 3 || kernel_size == 5, op, ": expected a 3x3 or 5x5 kernel, got ", kernel_size, "x",
                  weight.size(3));
  STD_TORCH_CHECK(padding >= 0 && padding < kernel_size, op, ": expected padding to be in [0, ", kernel_size, "), got ",
                  padding);
  const int64_t filters = transposed ? weight.size(1) * groups : weight.size(0);
  STD_TORCH_CHECK(filters > 0 && filters % (16 * groups) == 0, op, ": expected groups to cut the ", filters,
                  " filters into multiples of 16, got ", groups);
  if (transposed) {
    check_sizes(op, "weight", weight, {channels, filters / groups, kernel_size, kernel_size});
  } else {
    check_sizes(op, "weight", weight, {filters, channels / groups, kernel_size, kernel_size});
  }
  if (bias) {
    check_same(op, "bias", *bias, x);
    check_sizes(op, "bias", *bias, {filters});
  }
  const Conv conv = checked_conv(op, channels, x.size(2), x.size(3), filters, kernel_size, 1,
                                 transposed ? kernel_size - 1 - padding : padding, false);
  const Tensor input = dense(x, MemoryFormat::ChannelsLast), dense_weight = dense(weight, MemoryFormat::Contiguous);
  const Tensor offset = dense(bias.value_or(no_elements(x, x.scalar_type())), MemoryFormat::Contiguous);
  Tensor y = result(x, {x.size(0), filters, conv.out_height, conv.out_width}, MemoryFormat::ChannelsLast);
  bool finite = true;
  if (y.numel() == 0) return {y, finite};

  const int64_t block = 2 * vector_bytes() / 4, blocks = groups * ((filters / groups + block - 1) / block);
  const Tensor points = result(x, {blocks, kWinogradPoints, channels / groups, block}, MemoryFormat::Contiguous);
  const WinogradConvArgs args = {static_cast<const float*>(input.const_data_ptr()),
                                 static_cast<const float*>(dense_weight.const_data_ptr()),
                                 bias ? static_cast<const float*>(offset.const_data_ptr()) : nullptr,
                                 static_cast<float*>(points.mutable_data_ptr()),
                                 static_cast<float*>(y.mutable_data_ptr()),
                                 &finite,
                                 conv,
                                 x.size(0),
                                 static_cast<int>(groups),
                                 transposed,
                                 relu};
  const int64_t outputs = 7 - kernel_size;
  const int64_t tiles =
      x.size(0) * ((conv.out_height + outputs - 1) / outputs) * ((conv.out_width + outputs - 1) / outputs);
  run(winograd_conv2d_weights_kernel(), args, blocks, kWinogradPoints * channels / groups * block);
  run(winograd_conv2d_kernel(), args, (tiles + kWinogradTask - 1) / kWinogradTask,
      kWinogradPoints * channels / groups * filters);
  return {format_of(x) == MemoryFormat::ChannelsLast ? y : torch::stable::contiguous(y), finite};
}

}  // namespace
}  // namespace alexnet_cuda

STABLE_TORCH_LIBRARY_IMPL(alexnet_cuda, CPU, m) {
  m.impl("_winograd_conv2d", TORCH_BOX(&alexnet_cuda::winograd_conv2d));
}
