// Every operator of the library, and nothing else: the table of contents.
//
// Their host code is in host/, their kernels in cpu/ (this library) and cuda/ (_cuda.so). Fake kernels, autograd and
// batching rules are in alexnet_cuda/ops/, which also turns the public arguments into these:
//   alpha      factor of the sum of squares: already divided by the number of elements where that is wanted
//   front      elements of the LRN window before the centre; size - 1 - front lie behind it
//   order      0 relu-lrn-pool, 1 relu-pool-lrn, 2 lrn-pool-relu
//   save_code  also return the uint8 window position (row-major, from the unpadded window start) of each maximum;
//              otherwise the second result has no elements
#include <torch/csrc/stable/library.h>

#ifndef ALEXNET_CUDA_NAMESPACE  // emulated/ defines the same operators under another name
#define ALEXNET_CUDA_NAMESPACE alexnet_cuda
#endif

#define LRN "int size, int front, float alpha, float beta, float k, int groups"
#define POOL "int kernel_size, int stride, int padding"
#define CONV "int stride, int padding, int groups"

static bool allows_tf32_by_default() {
  return true;
}

STABLE_TORCH_LIBRARY_FRAGMENT(ALEXNET_CUDA_NAMESPACE, m) {
  m.def("conv2d(Tensor x, Tensor weight, Tensor? bias, " CONV ", bool ceil_mode, bool relu) -> Tensor");
  // the gradients of the weight and of the bias, which has no elements unless with_bias
  m.def("_conv2d_weight_grad(Tensor grad, Tensor x, int kernel_size, " CONV ", bool with_bias) -> (Tensor, Tensor)");
  m.def("_conv2d_input_grad(Tensor grad, Tensor weight, int height, int width, " CONV ") -> Tensor");
  // what torch.backends says of float32 convolutions: asked by the CUDA kernels at each call
  m.def("_allows_tf32() -> bool");

  // linear layers in float32 on a CPU: implemented in Python (alexnet_cuda/ops/linear.py), but for the weight gradient
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, bool relu) -> Tensor");
  m.def("_linear_weight_grad(Tensor grad, Tensor x) -> Tensor");

  // batch normalisation in training, followed by ReLU if `relu`, on a CPU: y, and the batch's mean and variance
  m.def("batch_norm(Tensor x, Tensor weight, Tensor bias, float eps, bool relu) -> (Tensor, Tensor, Tensor)");
  m.def(
      "_batch_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor var, float eps, "
      "bool relu) -> (Tensor, Tensor, Tensor)");

  m.def("local_response_norm(Tensor x, " LRN ", bool spatial) -> Tensor");
  m.def("_local_response_norm_backward(Tensor grad, Tensor x, " LRN ", bool spatial) -> Tensor");

  m.def("max_pool2d(Tensor x, " POOL ", bool ceil_mode, bool save_code) -> (Tensor, Tensor)");
  m.def("_max_pool2d_backward(Tensor grad, Tensor code, int height, int width, " POOL ") -> Tensor");

  m.def("relu_lrn_max_pool2d(Tensor x, int order, " LRN ", " POOL
        ", bool ceil_mode, bool save_code) -> (Tensor, Tensor)");
  m.def("_relu_lrn_max_pool2d_backward(Tensor grad, Tensor x, Tensor code, int order, " LRN ", " POOL ") -> Tensor");

  // (pooled output, convolution output, code); the last two have no elements unless save
  m.def(
      "conv2d_relu_lrn_max_pool2d(Tensor x, Tensor weight, Tensor? bias, int conv_stride, int conv_padding, "
      "bool conv_ceil_mode, int order, " LRN ", " POOL ", bool ceil_mode, bool save) -> (Tensor, Tensor, Tensor)");
}

// Torch's flag has no C interface (none of the headers of the stable ABI names it, up to 2.14), so the Python package
// replaces this with a function that reads it; a process without Python has the flag's default. As an argument of the
// operators it would become a constant of compiled and exported graphs, which would not follow the flag.
STABLE_TORCH_LIBRARY_IMPL(ALEXNET_CUDA_NAMESPACE, CompositeImplicitAutograd, m) {
  m.impl("_allows_tf32", TORCH_BOX(&allows_tf32_by_default));
}
