// Registers every operator of ops.cpp for one back end.
//
// A back end is a struct of static functions (cpu/backend.cpp, cuda/backend.h):
//   dtype_of(op, x)                     throws for a dtype without kernels
//   allocate(like, size, format, dtype) an uninitialised tensor on the device of `like`
//   dense(x, format)                    x in that memory format, x itself if it is
//   Guard                               makes the device of a tensor current
//   check_size(op, name, elements)      throws if one image has more elements than kernels count
//   conv2d_format(images, conv, format) the memory format in which a kernel computes this convolution, none if torch's
//                                       own convolution serves better; the only place that chooses
//   conv2d(op, args, like), ...         one launch per operator, with scratch memory on the device of `like`; those of
//                                       convolutions return false if torch must compute the result instead
//   fuses_first_block(args)             whether conv2d_relu_lrn_max_pool2d takes these arguments
#pragma once

#include "lrn_max_pool2d.h"

namespace alexnet_cuda {

template <class Backend>
void register_operators(torch::stable::detail::StableLibrary& m) {
  m.impl("conv2d", TORCH_BOX(&conv2d<Backend>));
  m.impl("_conv2d_weight_grad", TORCH_BOX(&conv2d_weight_grad<Backend>));
  m.impl("_conv2d_input_grad", TORCH_BOX(&conv2d_input_grad<Backend>));
  m.impl("local_response_norm", TORCH_BOX(&local_response_norm<Backend>));
  m.impl("_local_response_norm_backward", TORCH_BOX(&local_response_norm_backward<Backend>));
  m.impl("max_pool2d", TORCH_BOX(&max_pool2d<Backend>));
  m.impl("_max_pool2d_backward", TORCH_BOX(&max_pool2d_backward<Backend>));
  m.impl("relu_lrn_max_pool2d", TORCH_BOX(&relu_lrn_max_pool2d<Backend>));
  m.impl("_relu_lrn_max_pool2d_backward", TORCH_BOX(&relu_lrn_max_pool2d_backward<Backend>));
  m.impl("conv2d_relu_lrn_max_pool2d", TORCH_BOX(&conv2d_relu_lrn_max_pool2d<Backend>));
}

}  // namespace alexnet_cuda
