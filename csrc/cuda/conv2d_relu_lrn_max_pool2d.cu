// AlexNet's whole first block by mma.sync with resident weights, and which blocks the kernels of the first block take.
#include "conv2d_relu_lrn_max_pool2d_mma.h"

namespace alexnet_cuda {

bool fuses_first_block(const BlockArguments& args) {
  const Conv& conv = args.conv.conv;
  const Lrn& lrn = args.tail.lrn;
  const Pool& pool = args.tail.pool;
  const DType dtype = args.conv.images.dtype;
  const auto all_inside = [](int64_t out, int64_t size) { return out > 0 && 2 * out + 1 <= size; };
  // Colour images alone: kernels of 1 and 4 channels would double what takes longest to compile.
  return (dtype == DType::kHalf || dtype == DType::kBFloat16) && is_conv11x11s4(conv) && conv.channels == 3 &&
         (conv.filters == 64 || conv.filters == 96) && conv.out_width <= kMaxColumns &&
         args.tail.order == kReluLrnPool && is_lrn5(lrn) && lrn.groups == 1 && pool.kernel_size == 3 &&
         pool.stride == 2 && pool.padding == 0 && all_inside(pool.out_height, pool.height) &&
         all_inside(pool.out_width, pool.width);
}

int first_block_bytes(const BlockArguments& args) {
  const bool saves_nchw = args.tail.code && !args.conv.images.channels_last;
  return dispatch_layout<false>(args.conv.conv, [&](auto layout) {
    return saves_nchw ? decltype(layout)::template kBytes<true> : decltype(layout)::template kBytes<false>;
  });
}

gpu::error_t launch_conv2d_relu_lrn_max_pool2d(const BlockArguments& args, int multiprocessors, gpu::stream_t stream) {
  return launch_block_mma<false>(args, multiprocessors, stream);
}

}  // namespace alexnet_cuda
