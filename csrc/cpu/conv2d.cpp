// The convolutions of the CPU back end: which of them its kernels serve, packing of weights, and division into tasks.
#include <algorithm>

#include "backend.h"
#include "kernels.h"
#include "memory.h"
#include "tasks.h"

namespace alexnet_cuda {
namespace {

// Filters of one block of packed weights: two vectors.
int64_t filter_block(DType dtype) {
  return 2 * vector_bytes() / (dtype == DType::kDouble ? 8 : 4);
}

int64_t filter_blocks(DType dtype, int64_t filters) {
  return ceil_div(filters, filter_block(dtype));
}

// `count` numbers in the type of the sums.
Buffer<char> sums_buffer(DType dtype, int64_t count) {
  return Buffer<char>(count * (dtype == DType::kDouble ? 8 : 4));
}

bool is_conv11x11s4(const Conv& c) {
  return c.kernel_size == 11 && c.stride == 4 && c.groups == 1 &&
         (c.channels == 1 || c.channels == 3 || c.channels == 4);
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

// Whether the Winograd kernels support the convolution and take at most 1 / 1.25 of the products of a direct one. The
// transform of the weights costs as much as 16 tiles. Without AVX2 torch's own convolution is faster.
bool is_winograd3x3(const Images& images, const Conv& c) {
  const bool supported = images.dtype == DType::kFloat && level() != Level::kBaseline &&
                         (c.kernel_size == 3 || c.kernel_size == 5) && c.stride == 1 && c.padding < c.kernel_size &&
                         c.channels > 0 && c.channels % (16 * c.groups) == 0 && c.filters % (16 * c.groups) == 0;
  return supported && c.kernel_size * c.kernel_size * images.count * c.out_height * c.out_width >
                          1.25 * kWinogradProducts * (winograd_tiles(c, images.count) + 16);
}

// Weight and bias of an 11x11 convolution as its forward kernel reads them.
struct PackedConv {
  ConvTask task;
  const DType dtype = task.images.dtype;
  const int64_t taps = 121 * task.conv.channels, blocks = filter_blocks(dtype, task.conv.filters);
  const int64_t filters = blocks * filter_block(dtype);
  const Buffer<char> weight = sums_buffer(dtype, filters* taps), bias = sums_buffer(dtype, filters);
  const Buffer<float> winograd_weight{filters * kWinogradProducts * 16 * task.conv.channels};
  bool in_range = true;

  explicit PackedConv(const ConvArguments& args) : task{args} {
    task.packed_weight = weight.data();
    task.packed_bias = bias.data();
    task.winograd = is_winograd11x11s4(dtype, task.conv);
    task.winograd_weight = winograd_weight.data();
    task.in_range = &in_range;
    run_tasks(conv2d_pack_weight_kernel(), task, blocks, 5 * taps * filter_block(dtype));
    task.winograd &= in_range;
  }
};

bool winograd_conv2d(WinogradTask task) {
  const Conv& c = task.conv;
  const int64_t blocks = c.groups * filter_blocks(DType::kFloat, c.filters / c.groups);
  const int64_t block_size = kWinogradProducts * c.channels / c.groups * filter_block(DType::kFloat);
  const Buffer<float> weight(blocks * block_size);
  bool finite = true;
  task.winograd_weight = weight.data();
  task.finite = &finite;
  run_tasks(winograd_weights_kernel(), task, blocks, block_size);
  run_tasks(winograd_forward_kernel(), task, ceil_div(winograd_tiles(c, task.images.count), kWinogradTask),
            kWinogradProducts * channels * c.filters);
  return finite;
}

bool winograd_conv2d_weight_grad(WinogradTask task) {
  const Conv& c = task.conv;
  const int64_t channels = c.channels / c.groups, block = filter_block(DType::kFloat);
  const int64_t blocks = c.groups * filter_blocks(DType::kFloat, c.filters / c.groups);
  // So many tiles at once that their transforms stay in the last cache until they are multiplied. How the sum is
  // divided depends on the sizes alone.
  constexpr int64_t kCacheBytes = int64_t{16} << 20;
  const int64_t numbers = kWinogradProducts * (c.channels + blocks * block);  // of one tile
  const int64_t tiles = winograd_tiles(c, task.images.count);
  const int64_t part = std::min(tiles, std::max<int64_t>(64, kCacheBytes / (4 * numbers) / 64 * 64));
  const Buffer<float> inputs(kWinogradProducts * c.channels * part);
  const Buffer<float> grads((kWinogradProducts + 1) * blocks * part * block);
  const Buffer<float> sums(blocks * kWinogradProducts * channels * block);
  bool finite = true;
  task.inputs = inputs.data();
  task.grads = grads.data();
  task.sums = sums.data();
  task.finite = &finite;
  for (; task.first < tiles; task.first += part) {
    task.tiles = std::min(part, tiles - task.first);
    run_tasks(winograd_grad_inputs_kernel(), task, task.tiles, 4 * numbers);
    run_tasks(winograd_grad_products_kernel(), task, blocks * kWinogradProducts, channels * block * task.tiles);
  }
  run_tasks(winograd_grad_weights_kernel(), task, blocks, kWinogradProducts * channels * block);
  return finite;
}

}  // namespace

std::optional<MemoryFormat> Cpu::conv2d_format(const Images& images, const Conv& conv, MemoryFormat of_x) {
  if (is_conv11x11s4(conv)) return of_x;
  if (is_winograd3x3(images, conv)) return MemoryFormat::ChannelsLast;
  return std::nullopt;
}

bool Cpu::conv2d(const char*, const ConvArguments& args, const Tensor&) {
  if (!is_conv11x11s4(args.conv)) return winograd_conv2d({args});
  const PackedConv packed(args);
  run_tasks(conv2d_forward_kernel(), packed.task, args.images.count * args.conv.out_height,
            args.conv.out_width * args.conv.filters * 121);
  return true;
}

bool Cpu::conv2d_weight_grad(const char*, const ConvArguments& args, const Tensor&) {
  if (!is_conv11x11s4(args.conv)) return winograd_conv2d_weight_grad({args});
  const DType dtype = args.images.dtype;
  const int64_t rows = args.images.count * args.conv.out_height, blocks = filter_blocks(dtype, args.conv.filters);
  const int64_t sums_of_block = (121 * args.conv.channels + 1) * filter_block(dtype);
  ConvTask task{args};
  task.winograd = is_winograd11x11s4(dtype, args.conv);
  task.chunks =
      std::clamp<int64_t>(rows / 8, 1, 32);  // depends on the sizes alone, so threads do not change the result
  const Buffer<char> sums = sums_buffer(dtype, task.chunks * blocks * sums_of_block);
  task.sums = sums.data();
  run_tasks(conv2d_weight_grad_kernel(), task, task.chunks, blocks * sums_of_block);
  run_tasks(conv2d_weight_grad_reduce_kernel(), task, blocks, task.chunks * sums_of_block);
  return true;
}

// The input gradient of a convolution with stride 1 is a convolution of grad, with the weight's filters and channels
// exchanged.
bool Cpu::conv2d_input_grad(const char*, const ConvArguments& args, const Tensor&) {
  const Conv& c = args.conv;
  if (!is_conv11x11s4(c)) {
    WinogradTask task{args};
    task.x = args.grad;
    task.transposed = true;
    task.conv = {.channels = c.filters,
                 .height = c.out_height,
                 .width = c.out_width,
                 .filters = c.channels,
                 .kernel_size = c.kernel_size,
                 .stride = 1,
                 .padding = c.kernel_size - 1 - c.padding,
                 .groups = c.groups,
                 .out_height = c.height,
                 .out_width = c.width};
    return winograd_conv2d(task);
  }
  const DType dtype = args.images.dtype;
  const int64_t taps = filter_blocks(dtype, 11 * c.channels) * filter_block(dtype);  // of a kernel row, padded
  const Buffer<char> weight = sums_buffer(dtype, 11 * taps * c.filters);
  ConvTask task{args};
  task.packed_weight = weight.data();
  run_tasks(conv2d_pack_taps_kernel(), task, 11, taps * c.filters);
  run_tasks(conv2d_input_grad_kernel(), task, args.images.count * c.height, c.width * c.channels * c.filters);
  return true;
}

bool Cpu::fuses_first_block(const BlockArguments& args, const Tensor&) {
  return is_conv11x11s4(args.conv.conv);
}

void Cpu::conv2d_relu_lrn_max_pool2d(const char*, const BlockArguments& args, const Tensor&) {
  const PackedConv packed(args.conv);
  const Pool& pool = args.tail.pool;
  run_tasks(block_forward_kernel(), BlockTask{packed.task, args.tail}, args.tail.images.count * pool.out_height,
            pool.stride * pool.width * args.conv.conv.filters * 121);
}

}  // namespace alexnet_cuda
