// AlexNet's whole first block by mma.sync with streamed weights, for GPUs whose thread blocks may have too little
// shared memory for all weights: 8.x and 12.x.
#include "conv2d_relu_lrn_max_pool2d_mma.h"

namespace alexnet_cuda {

static_assert(Layout<3, 96, true>::kBytes<true> <= kMinSharedMemory);

gpu::error_t launch_conv2d_relu_lrn_max_pool2d_streamed(const BlockArguments& args, int multiprocessors,
                                                        gpu::stream_t stream) {
  return launch_block_mma<true>(args, multiprocessors, stream);
}

}  // namespace alexnet_cuda
