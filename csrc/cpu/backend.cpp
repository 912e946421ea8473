// The CPU back end: which convolutions its kernels serve, packing of weights, and how the work is divided into tasks
// (kernels.h).
#include <algorithm>

#include "../host/register.h"
#include "tensors.h"

namespace alexnet_cuda {
namespace {

// Blocks of at most `planes` channels of an image (channels_last) or planes of the batch (contiguous).
int64_t plane_blocks(const Images& images, int64_t planes) {
  return images.channels_last ? images.count * ceil_div(images.channels, planes)
                              : ceil_div(images.count * images.channels, planes);
}

void run_lrn(void (*kernel)(const LrnArguments&, int64_t, int64_t), const LrnArguments& args) {
  const Images& images = args.images;
  const int64_t strips = images.channels_last ? ceil_div(images.count * images.pixels(), kStrip)
                                              : images.count * ceil_div(images.pixels(), kStrip);
  const int64_t work = images.pixels() * std::min(images.channels, kPlanes) * args.lrn.size;
  args.spatial ? run_tasks(kernel, args, plane_blocks(images, kPlanes), work)
               : run_tasks(kernel, args, strips, kStrip * images.channels);
}

// Filters of one block of packed weights: two vectors.
int64_t filter_block(DType dtype) {
  return 2 * vector_bytes() / (dtype == DType::kDouble ? 8 : 4);
}

int64_t filter_blocks(DType dtype, int64_t filters) {
  return ceil_div(filters, filter_block(dtype));
}

// `count` numbers in the type of the sums.
Buffer<char> sums_buffer(DType dtype, int64_t count) {
  return make_buffer<char>(count * (dtype == DType::kDouble ? 8 : 4));
}

// 11x11 with stride 4: whether Winograd's algorithm takes fewer products, which it does not for very few outputs.
bool is_winograd11x11s4(DType dtype, const Conv& c) {
  const int64_t tiles = ceil_div(c.out_height, 4) * ceil_div(c.out_width, 4);
  return dtype != DType::kDouble && tiles * kWinogradProducts < c.out_height * c.out_width * 121 / 16;
}

// 3x3 and 5x5 with stride 1: tiles of M x M outputs in the whole batch, M = 7 - kernel size.
int64_t winograd_tiles(const Conv& c, int64_t images) {
  const int64_t m = 7 - c.kernel_size;
  return images * ceil_div(c.out_height, m) * ceil_div(c.out_width, m);
}

// Whether the channels and the filters of each group fill whole vectors, in a convolution with stride 1 whose windows
// all contain a pixel.
bool fills_vectors(const Conv& c) {
  return c.stride == 1 && c.padding < c.kernel_size && c.channels > 0 && c.channels % (16 * c.groups) == 0 &&
         c.filters % (16 * c.groups) == 0;
}

// Whether the Winograd kernels support the convolution and take at most 1 / 1.25 of the products of a direct one. The
// transform of the weights costs as much as 16 tiles. Without AVX2 torch's own convolution is faster.
bool is_winograd3x3(const Images& images, const Conv& c) {
  const bool supported = images.dtype == DType::kFloat && level() != Level::kBaseline &&
                         (c.kernel_size == 3 || c.kernel_size == 5) && fills_vectors(c);
  return supported && c.kernel_size * c.kernel_size * images.count * c.out_height * c.out_width >
                          1.25 * kWinogradProducts * (winograd_tiles(c, images.count) + 16);
}

// Whether the matrix unit computes the weight gradient, which takes 0.5 to 0.9 of torch's time while an image stays in
// the second-level cache; for 5x5 filters torch is faster.
bool is_amx_weight_grad(const Images& images, const Conv& c) {
  constexpr int64_t kCacheBytes = int64_t{2} << 20;
  const int64_t positions = (c.height + c.padding) * (c.width + c.padding);
  return images.dtype == DType::kBFloat16 && has_amx() && c.kernel_size == 3 && fills_vectors(c) &&
         2 * positions * (c.channels + c.filters) <= kCacheBytes;
}

// 11x11 with stride 4: whether the matrix unit computes the convolution, which it does for three channels.
bool is_amx11x11s4(DType dtype, const Conv& c) {
  return dtype == DType::kBFloat16 && has_amx() && c.channels == 3 && c.out_width >= 16;
}

// Weight and bias of an 11x11 convolution as its forward kernel reads them.
struct PackedConv {
  ConvTask task;
  const DType dtype = task.images.dtype;
  const int64_t taps = 121 * task.conv.channels, blocks = filter_blocks(dtype, task.conv.filters);
  const int64_t filters = blocks * filter_block(dtype);
  const Buffer<char> weight = sums_buffer(dtype, filters* taps), bias = sums_buffer(dtype, filters);
  const Buffer<float> winograd_weight = make_buffer<float>(filters * kWinogradProducts * 16 * task.conv.channels);
  const Buffer<BFloat16> amx_weight = make_buffer<BFloat16>(filters * 12 * 32);
  bool in_range = true;

  explicit PackedConv(const ConvArguments& args) : task{args} {
    task.packed_weight = weight.get();
    task.packed_bias = bias.get();
    task.amx = is_amx11x11s4(dtype, task.conv);
    task.amx_weight = amx_weight.get();
    task.winograd = !task.amx && is_winograd11x11s4(dtype, task.conv);
    task.winograd_weight = winograd_weight.get();
    task.in_range = &in_range;
    run_tasks(conv2d_pack_weight_kernel(), task, blocks, 5 * taps * filter_block(dtype));
    task.winograd &= in_range;
  }
};

bool winograd_conv2d(WinogradTask task) {
  const Conv& c = task.conv;
  const int64_t blocks = c.groups * filter_blocks(DType::kFloat, c.filters / c.groups);
  const int64_t block_size = kWinogradProducts * c.channels / c.groups * filter_block(DType::kFloat);
  const auto weight = make_buffer<float>(blocks * block_size);
  bool finite = true;
  task.winograd_weight = weight.get();
  task.finite = &finite;
  run_tasks(winograd_weights_kernel(), task, blocks, block_size);
  run_tasks(winograd_forward_kernel(), task, ceil_div(winograd_tiles(c, task.images.count), kWinogradTask),
            kWinogradProducts * c.channels / c.groups * c.filters);
  return finite;
}

bool winograd_conv2d_weight_grad(WinogradTask task) {
  const Conv& c = task.conv;
  const int64_t channels = c.channels / c.groups, block = filter_block(DType::kFloat);
  const int64_t blocks = c.groups * filter_blocks(DType::kFloat, c.filters / c.groups);
  // So many tiles at once that their transforms stay in the second-level caches until they are multiplied. How the sum
  // is divided depends on the sizes alone.
  constexpr int64_t kCacheBytes = int64_t{4} << 20;
  const int64_t numbers = kWinogradProducts * (c.channels + blocks * block);  // of one tile
  const int64_t tiles = winograd_tiles(c, task.images.count);
  const int64_t part = std::min(tiles, std::max<int64_t>(64, kCacheBytes / (4 * numbers) / 64 * 64));
  const auto inputs = make_buffer<float>(kWinogradProducts * c.channels * part);
  const auto grads = make_buffer<float>((kWinogradProducts + 1) * blocks * part * block);
  const auto sums = make_buffer<float>(blocks * kWinogradProducts * channels * block);
  bool finite = true;
  task.inputs = inputs.get();
  task.grads = grads.get();
  task.sums = sums.get();
  task.finite = &finite;
  for (; task.first < tiles; task.first += part) {
    task.tiles = std::min(part, tiles - task.first);
    run_tasks(winograd_grad_inputs_kernel(), task, task.tiles, 4 * numbers);
    run_tasks(winograd_grad_products_kernel(), task, blocks * kWinogradProducts, channels * block * task.tiles);
  }
  run_tasks(winograd_grad_weights_kernel(), task, blocks, kWinogradProducts * channels * block);
  return finite;
}

bool amx_weight_grad(AmxTask task) {
  const Conv& c = task.conv;
  task.pitch = c.width + c.padding;
  task.span = (c.height + c.padding) * task.pitch;
  const int64_t tail =
      (c.kernel_size - 1) * (task.pitch + 1);  // positions that the last windows read beyond the images
  constexpr int64_t kPart = 2048;              // positions
  const int64_t part = std::clamp<int64_t>(kPart / task.span, 1, task.images.count);
  task.stride = round_up(part * task.span + tail + 64, 64) + 32;  // an odd number of cache lines
  const auto inputs = make_buffer<BFloat16>(c.channels * task.stride);
  const auto grads = make_buffer<BFloat16>(c.filters * round_up(part * task.span, 32));
  const auto zeros = make_buffer<BFloat16>(std::max(c.channels, c.filters));
  task.channels = c.channels / c.groups;
  task.filters = c.filters / c.groups;
  task.down = ceil_div(task.channels, 32);
  task.across = ceil_div(task.filters, 32);
  const int64_t tiles = c.groups * task.down * task.across;
  const int64_t sums_size = tiles * c.kernel_size * c.kernel_size * 32 * 32;
  const auto sums = make_buffer<float>(sums_size + c.filters);
  bool finite = true;
  std::fill_n(zeros.get(), std::max(c.channels, c.filters), BFloat16{});
  std::fill_n(sums.get(), sums_size + c.filters, 0.0f);
  task.zeros = zeros.get();
  task.inputs = inputs.get();
  task.grads = grads.get();
  task.sums = sums.get();
  task.bias_sums = sums.get() + sums_size;
  task.finite = &finite;
  for (; task.first < task.images.count; task.first += part) {
    task.count = std::min(part, task.images.count - task.first);
    task.positions = round_up(task.count * task.span, 32);
    run_tasks(amx::pack, task, ceil_div(task.positions + tail, 32), 64 * (c.channels + c.filters));
    run_tasks(amx::multiply, task, tiles, task.positions * 32 * c.kernel_size);
  }
  run_tasks(amx::write, task, c.filters / 16, 16 * task.channels * c.kernel_size * c.kernel_size);
  return finite;
}

struct Cpu : CpuTensors {
  static void local_response_norm(const char*, const LrnArguments& args, const Tensor&) {
    run_lrn(args.spatial ? spatial_lrn_forward_kernel() : lrn_forward_kernel(), args);
  }
  static void local_response_norm_backward(const char*, const LrnArguments& args, const Tensor&) {
    run_lrn(args.spatial ? spatial_lrn_backward_kernel() : lrn_backward_kernel(), args);
  }

  static void max_pool2d(const char*, const PoolArguments& args, const Tensor&) {
    const int64_t channels = args.images.channels_last ? args.images.channels : kPlanes;
    run_tasks(max_pool_forward_kernel(), args, plane_blocks(args.images, channels) * args.pool.out_height,
              args.pool.stride * args.pool.width * channels);
  }
  static void max_pool2d_backward(const char*, const PoolArguments& args, const Tensor&) {
    const Images& images = args.images;
    const bool rows = images.channels_last;
    run_tasks(max_pool_backward_kernel(), args, images.count * (rows ? images.height : images.channels),
              images.width * (rows ? images.channels : images.height));
  }

  static void relu_lrn_max_pool2d(const char*, const TailArguments& args, const Tensor&) {
    run_tasks(tail_forward_kernel(), args, args.images.count * args.pool.out_height,
              args.pool.stride * args.pool.width * args.images.channels);
  }
  static void relu_lrn_max_pool2d_backward(const char*, const TailArguments& args, const Tensor&) {
    run_tasks(tail_backward_kernel(), args, args.images.count * args.pool.height,
              args.pool.width * args.images.channels);
  }

  static std::optional<MemoryFormat> conv2d_format(const Images& images, const Conv& conv, MemoryFormat of_x) {
    if (is_conv11x11s4(conv)) return of_x;
    return is_winograd3x3(images, conv) ? std::optional(MemoryFormat::ChannelsLast) : std::nullopt;
  }

  static bool conv2d(const char*, const ConvArguments& args, const Tensor&) {
    if (!is_conv11x11s4(args.conv)) return winograd_conv2d({args});
    const PackedConv packed(args);
    run_tasks(conv2d_forward_kernel(), packed.task, args.images.count * args.conv.out_height,
              args.conv.out_width * args.conv.filters * 121);
    return true;
  }

  static std::optional<MemoryFormat> conv2d_weight_grad_format(const Images& images, const Conv& conv,
                                                               MemoryFormat of_x) {
    return is_amx_weight_grad(images, conv) ? MemoryFormat::ChannelsLast : conv2d_format(images, conv, of_x);
  }
  static bool conv2d_weight_grad(const char*, const ConvArguments& args, const Tensor&) {
    if (is_amx_weight_grad(args.images, args.conv)) return amx_weight_grad({args});
    if (!is_conv11x11s4(args.conv)) return winograd_conv2d_weight_grad({args});
    const DType dtype = args.images.dtype;
    const int64_t rows = args.images.count * args.conv.out_height, blocks = filter_blocks(dtype, args.conv.filters);
    const int64_t sums_of_block = (121 * args.conv.channels + 1) * filter_block(dtype);
    ConvTask task{args};
    task.amx = is_amx11x11s4(dtype, task.conv);
    task.winograd = is_winograd11x11s4(dtype, args.conv);
    // Depends on the sizes alone, so threads do not change the result.
    task.chunks = std::clamp<int64_t>(rows / 8, 1, 32);
    const Buffer<char> sums = sums_buffer(dtype, task.chunks * blocks * sums_of_block);
    task.sums = sums.get();
    run_tasks(conv2d_weight_grad_kernel(), task, task.chunks, blocks * sums_of_block);
    run_tasks(conv2d_weight_grad_reduce_kernel(), task, blocks, task.chunks * sums_of_block);
    return true;
  }

  // The input gradient of a convolution with stride 1 is a convolution of grad, with the weight's filters and channels
  // exchanged.
  static bool conv2d_input_grad(const char*, const ConvArguments& args, const Tensor&) {
    const Conv& c = args.conv;
    if (!is_conv11x11s4(c)) {
      WinogradTask task{args};
      task.x = args.grad;
      task.transposed = true;
      task.conv.padding = c.kernel_size - 1 - c.padding;
      std::swap(task.conv.channels, task.conv.filters);
      std::swap(task.conv.height, task.conv.out_height);
      std::swap(task.conv.width, task.conv.out_width);
      return winograd_conv2d(task);
    }
    const DType dtype = args.images.dtype;
    const int64_t taps = filter_blocks(dtype, 11 * c.channels) * filter_block(dtype);  // of a kernel row, padded
    const Buffer<char> weight = sums_buffer(dtype, 11 * taps * c.filters);
    ConvTask task{args};
    task.packed_weight = weight.get();
    run_tasks(conv2d_pack_taps_kernel(), task, 11, taps * c.filters);
    run_tasks(conv2d_input_grad_kernel(), task, args.images.count * c.height, c.width * c.channels * c.filters);
    return true;
  }

  static bool fuses_first_block(const BlockArguments& args) { return is_conv11x11s4(args.conv.conv); }
  static void conv2d_relu_lrn_max_pool2d(const char*, const BlockArguments& args, const Tensor&) {
    const PackedConv packed(args.conv);
    const Pool& pool = args.tail.pool;
    run_tasks(block_forward_kernel(), BlockTask{packed.task, args.tail}, args.tail.images.count * pool.out_height,
              pool.stride * pool.width * args.conv.conv.filters * 121);
  }
};

// The weight gradient of a linear layer, 151 MB for AlexNet's first one: torch's matrix product into memory of the CPU
// caching allocator, since mapping that much new memory takes longer than the product.
Tensor linear_weight_grad(const Tensor& grad, const Tensor& x) {
  const Tensor grad_weight = Cpu::allocate(x, {grad.size(1), x.size(1)}, MemoryFormat::Contiguous);
  const auto results = call_torch("aten::mm", "out", torch::stable::transpose(grad, 0, 1), x, grad_weight);
  return torch::stable::detail::to<Tensor>(results[0]);
}

}  // namespace
}  // namespace alexnet_cuda

STABLE_TORCH_LIBRARY_IMPL(alexnet_cuda, CPU, m) {
  alexnet_cuda::register_operators<alexnet_cuda::Cpu>(m);
  m.impl("_linear_weight_grad", TORCH_BOX(&alexnet_cuda::linear_weight_grad));
}
