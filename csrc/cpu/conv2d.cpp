#include "conv2d.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <tuple>

#include "../dispatch.h"

namespace alexnet_cuda {
namespace {

template <class T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

Tensor bytes(const Tensor& like, int64_t size) {
  return empty(like, {size}, MemoryFormat::Contiguous, ScalarType::Byte);
}

int64_t sum_bytes(DType dtype) {
  return dtype == DType::kDouble ? 8 : 4;
}

// Whether the way of winograd_rows.h is open and takes fewer products, which it does not for very few outputs.
bool use_winograd(DType dtype, const Conv& c) {
  return c.kernel_size == 11 && c.stride == 4 && dtype != DType::kDouble &&
         blocks_of(c.out_height, 4) * blocks_of(c.out_width, 4) * kWinogradPoints <
             c.out_height * c.out_width * 121 / 16;
}

// As conv2d.h says.
template <class T, class Out>
void pack_weight(const T* from, Out* to, const Conv& c, int64_t block) {
  const int64_t k = c.kernel_size, row = k * c.channels * block;
  torch::stable::parallel_for(0, blocks_of(c.filters, block), 1, [&](int64_t begin, int64_t end) {
    std::fill(to + begin * k * row, to + end * k * row, Out(0.0f));
    const T* weight = from + begin * block * c.channels * k * k;
    for (int64_t f = begin * block; f < std::min(end * block, c.filters); ++f) {
      Out* filter = to + f / block * k * row + f % block;
      for (int64_t channel = 0; channel < c.channels; ++channel) {
        for (int64_t i = 0; i < k; ++i) {
          for (int64_t j = 0, tap = channel; j < k; ++j, tap += c.channels) {
            filter[i * row + tap * block] = static_cast<Out>(*weight++);
          }
        }
      }
    }
  });
}

// The same weights for the input gradient: [kernel row][block of taps][filter][tap in block].
template <class T, class Out>
void pack_taps(const T* from, Out* to, const Conv& c, int64_t block) {
  const int64_t k = c.kernel_size, row = blocks_of(k * c.channels, block) * c.filters * block;
  std::fill_n(to, k * row, Out(0));
  std::vector<int64_t> place(k * c.channels);
  for (int64_t tap = 0; tap < k * c.channels; ++tap) place[tap] = tap / block * c.filters * block + tap % block;
  for (int64_t f = 0; f < c.filters; ++f) {
    for (int64_t channel = 0; channel < c.channels; ++channel) {
      for (int64_t i = 0; i < k; ++i) {
        for (int64_t j = 0; j < k; ++j) {
          to[i * row + place[j * c.channels + channel] + f * block] = static_cast<Out>(*from++);
        }
      }
    }
  }
}

void check_weight(const char* op, const Tensor& weight) {
  check_4d(op, "weight", weight);
  STD_TORCH_CHECK(weight.size(2) == weight.size(3), op, ": expected a square kernel, got ", weight.size(2), "x",
                  weight.size(3));
}

Tensor conv2d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t stride, int64_t padding,
              bool ceil_mode) {
  PackedConv packed = pack_conv("conv2d", x, weight, bias, stride, padding, ceil_mode);
  const MemoryFormat format = format_of(x);
  const Conv& c = packed.args.conv;
  Tensor y = result(x, {x.size(0), c.filters, c.out_height, c.out_width}, format);
  packed.args.out = y.mutable_data_ptr();
  if (y.numel() == 0) return y;
  run(conv2d_forward_kernel(), packed.args, x.size(0) * c.out_height,
      c.out_width * c.filters * c.kernel_size * c.kernel_size);
  return y;
}

std::tuple<Tensor, Tensor> conv2d_weight_grad(const Tensor& grad, const Tensor& x, int64_t kernel_size, int64_t stride,
                                              int64_t padding) {
  const char* op = "_conv2d_weight_grad";
  check_4d(op, "x", x);
  check_same(op, "grad", grad, x);
  const Conv c = checked_conv_backward(op, grad, x.size(1), x.size(2), x.size(3), kernel_size, stride, padding);
  check_sizes(op, "grad", grad, {x.size(0), c.filters, c.out_height, c.out_width});
  const MemoryFormat format = format_of(x);
  const Images images = images_of(op, x, format);
  const Tensor input = dense(x, format), gradient = dense(grad, format);
  Tensor dw = empty(x, {c.filters, c.channels, kernel_size, kernel_size}, MemoryFormat::Contiguous);
  Tensor db = empty(x, {c.filters}, MemoryFormat::Contiguous);

  // How the sum is cut depends on the sizes alone, so the threads have no say in the rounding.
  const int64_t rows = x.size(0) * c.out_height, chunks = std::clamp<int64_t>(rows / 8, 1, 32);
  const int64_t taps = kernel_size * kernel_size * c.channels, block = filter_block(images.dtype);
  const int64_t padded = blocks_of(c.filters, block) * block, part = (taps + 1) * padded;
  Tensor partial = bytes(x, chunks * part * sum_bytes(images.dtype));
  const ConvArgs args = {input.const_data_ptr(),
                         gradient.const_data_ptr(),
                         nullptr,
                         nullptr,
                         nullptr,
                         partial.mutable_data_ptr(),
                         images,
                         c,
                         use_winograd(images.dtype, c),
                         chunks};
  run(conv2d_weight_grad_kernel(), args, chunks, part);

  ALEXNET_DISPATCH_FLOATING(x.scalar_type(), "conv2d", [&] {
    const auto* from = static_cast<const Sum<scalar_t>*>(partial.const_data_ptr());
    auto* to = static_cast<scalar_t*>(dw.mutable_data_ptr());
    auto* bias = static_cast<scalar_t*>(db.mutable_data_ptr());
    torch::stable::parallel_for(0, taps + 1, 16, [&](int64_t begin, int64_t end) {
      std::vector<Sum<scalar_t>> sum(c.filters);
      for (int64_t t = begin; t < end; ++t) {
        std::fill(sum.begin(), sum.end(), Sum<scalar_t>(0));
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          for (int64_t f = 0; f < c.filters; ++f) sum[f] += from[chunk * part + t * padded + f];
        }
        const int64_t i = t / (kernel_size * c.channels), j = t / c.channels % kernel_size, channel = t % c.channels;
        for (int64_t f = 0; f < c.filters; ++f) {
          scalar_t& result = t == taps ? bias[f] : to[((f * c.channels + channel) * kernel_size + i) * kernel_size + j];
          result = static_cast<scalar_t>(sum[f]);
        }
      }
    });
  });
  return {dw, db};
}

Tensor conv2d_input_grad(const Tensor& grad, const Tensor& weight, int64_t height, int64_t width, int64_t stride,
                         int64_t padding) {
  const char* op = "_conv2d_input_grad";
  check_weight(op, weight);
  check_same(op, "weight", weight, grad);
  const Conv c = checked_conv_backward(op, grad, weight.size(1), height, width, weight.size(2), stride, padding);
  check_sizes(op, "weight", weight, {c.filters, c.channels, c.kernel_size, c.kernel_size});
  const MemoryFormat format = format_of(grad);
  const Images images = {
      dtype_of(op, grad), format == MemoryFormat::ChannelsLast, grad.size(0), c.channels, height, width};
  const Tensor gradient = dense(grad, format), filters = dense(weight, MemoryFormat::Contiguous);
  Tensor dx = result(grad, {grad.size(0), c.channels, height, width}, format);
  if (dx.numel() == 0) return dx;

  const int64_t block = filter_block(images.dtype), taps = c.kernel_size * c.channels;
  Tensor packed = bytes(grad, c.kernel_size * blocks_of(taps, block) * c.filters * block * sum_bytes(images.dtype));
  ALEXNET_DISPATCH_FLOATING(grad.scalar_type(), "conv2d", [&] {
    pack_taps(static_cast<const scalar_t*>(filters.const_data_ptr()),
              static_cast<Sum<scalar_t>*>(packed.mutable_data_ptr()), c, block);
  });
  const ConvArgs args = {nullptr,
                         gradient.const_data_ptr(),
                         packed.const_data_ptr(),
                         nullptr,
                         nullptr,
                         dx.mutable_data_ptr(),
                         images,
                         c,
                         false,
                         0};
  run(conv2d_input_grad_kernel(), args, images.count * height, width * c.channels * c.filters);
  return dx;
}

}  // namespace

PackedConv pack_conv(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                     int64_t stride, int64_t padding, bool ceil_mode) {
  check_4d(op, "x", x);
  check_weight(op, weight);
  check_same(op, "weight", weight, x);
  check_sizes(op, "weight", weight, {weight.size(0), x.size(1), weight.size(2), weight.size(2)});
  if (bias) {
    check_same(op, "bias", *bias, x);
    check_sizes(op, "bias", *bias, {weight.size(0)});
  }
  const Conv c =
      checked_conv(op, x.size(1), x.size(2), x.size(3), weight.size(0), weight.size(2), stride, padding, ceil_mode);
  const MemoryFormat format = format_of(x);
  const Images images = images_of(op, x, format);
  const int64_t block = filter_block(images.dtype), padded = blocks_of(c.filters, block) * block;
  PackedConv packed = {dense(x, format),
                       bytes(x, padded * c.kernel_size * c.kernel_size * c.channels * sum_bytes(images.dtype)),
                       no_elements(x, ScalarType::Byte),
                       bytes(x, padded * sum_bytes(images.dtype)),
                       {}};
  const Tensor filters = dense(weight, MemoryFormat::Contiguous);
  const Tensor offsets = dense(bias.value_or(no_elements(x, x.scalar_type())), MemoryFormat::Contiguous);
  bool winograd = use_winograd(images.dtype, c);
  ALEXNET_DISPATCH_FLOATING(x.scalar_type(), "conv2d", [&] {
    const auto* from = static_cast<const scalar_t*>(filters.const_data_ptr());
    if (winograd) {
      for (int64_t i = 0; i < filters.numel(); ++i)
        winograd &= std::abs(static_cast<float>(from[i])) < kWinogradLargest;
    }
    pack_weight(from, static_cast<Sum<scalar_t>*>(packed.weight.mutable_data_ptr()), c, block);
    const auto* bias_from = static_cast<const scalar_t*>(offsets.const_data_ptr());
    auto* bias_to = static_cast<Sum<scalar_t>*>(packed.bias.mutable_data_ptr());
    for (int64_t f = 0; f < padded; ++f) bias_to[f] = f < offsets.numel() ? Sum<scalar_t>(bias_from[f]) : 0;
  });
  packed.args = {packed.x.const_data_ptr(),
                 nullptr,
                 packed.weight.const_data_ptr(),
                 nullptr,
                 packed.bias.const_data_ptr(),
                 nullptr,
                 images,
                 c,
                 winograd,
                 0};
  if (winograd) {
    packed.points = bytes(x, padded * kWinogradPoints * 16 * c.channels * sum_bytes(images.dtype));
    packed.args.points = packed.points.mutable_data_ptr();
    run(conv2d_winograd_weight_kernel(), packed.args, padded / block, kWinogradPoints * 16 * c.channels * block);
  }
  return packed;
}

}  // namespace alexnet_cuda

STABLE_TORCH_LIBRARY_IMPL(alexnet_cuda, CPU, m) {
  m.impl("conv2d", TORCH_BOX(&alexnet_cuda::conv2d));
  m.impl("_conv2d_weight_grad", TORCH_BOX(&alexnet_cuda::conv2d_weight_grad));
  m.impl("_conv2d_input_grad", TORCH_BOX(&alexnet_cuda::conv2d_input_grad));
}
