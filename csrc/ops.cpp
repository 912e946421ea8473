// Every operator of the library, and nothing else: the table of contents.
//
// Kernels are registered per device: in cpu/ (this library) and cuda/ (_cuda.so). Fake kernels and autograd formulas
// are in alexnet_cuda/ops.py, which also turns the public arguments into these:
//   alpha      what multiplies the sum of squares: already divided by the number of elements where that is wanted
//   front      elements of the LRN window before the centre; size - 1 - front lie behind it
//   order      0 relu-lrn-pool, 1 relu-pool-lrn, 2 lrn-pool-relu
//   save_code  also return the uint8 window position (row-major, from the unpadded window start) of each maximum;
//              otherwise the second result has no elements
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(alexnet_cuda, m) {
  // an uninitialised tensor like x, in memory that an earlier result may have left (csrc/cpu/memory.h)
  m.def("_kept_empty_like(Tensor x) -> Tensor");
  // what torch.backends says of float32 convolutions: implemented in Python, for the CUDA kernels to ask at each call
  m.def("_allows_tf32() -> bool");
  m.def("conv2d(Tensor x, Tensor weight, Tensor? bias, int stride, int padding, bool ceil_mode) -> Tensor");
  // the gradients of the weight and of the bias
  m.def("_conv2d_weight_grad(Tensor grad, Tensor x, int kernel_size, int stride, int padding) -> (Tensor, Tensor)");
  m.def("_conv2d_input_grad(Tensor grad, Tensor weight, int height, int width, int stride, int padding) -> Tensor");

  // 3x3 and 5x5 convolutions with stride 1 and their transposes (torch.conv_transpose2d), float32 on a CPU, and whether
  // the result is finite and below 1.8e19: if not, it must be computed in another way
  m.def(
      "_winograd_conv2d(Tensor x, Tensor weight, Tensor? bias, int padding, int groups, bool transposed, bool relu) "
      "-> (Tensor, bool)");
  m.def(
      "_winograd_conv2d_weight_grad(Tensor grad, Tensor x, int kernel_size, int padding, int groups) "
      "-> (Tensor, bool)");

  m.def(
      "local_response_norm(Tensor x, int size, int front, float alpha, float beta, float k, int groups, "
      "bool spatial) -> Tensor");
  m.def(
      "_local_response_norm_backward(Tensor grad, Tensor x, int size, int front, float alpha, float beta, float k, "
      "int groups, bool spatial) -> Tensor");

  m.def(
      "max_pool2d(Tensor x, int kernel_size, int stride, int padding, bool ceil_mode, bool save_code) "
      "-> (Tensor, Tensor)");
  m.def(
      "_max_pool2d_backward(Tensor grad, Tensor code, int height, int width, int kernel_size, int stride, "
      "int padding) -> Tensor");

  m.def(
      "relu_lrn_max_pool2d(Tensor x, int order, int size, int front, float alpha, float beta, float k, int groups, "
      "int kernel_size, int stride, int padding, bool ceil_mode, bool save_code) -> (Tensor, Tensor)");
  m.def(
      "_relu_lrn_max_pool2d_backward(Tensor grad, Tensor x, Tensor code, int order, int size, int front, "
      "float alpha, float beta, float k, int groups, int kernel_size, int stride, int padding) -> Tensor");

  // (pooled output, convolution output, code); the last two have no elements unless save. wgmma: the other CUDA kernel,
  // on a device that has it
  m.def(
      "conv2d_relu_lrn_max_pool2d(Tensor x, Tensor weight, Tensor? bias, int conv_stride, int conv_padding, "
      "bool conv_ceil_mode, int order, int size, int front, float alpha, float beta, float k, int groups, "
      "int kernel_size, int stride, int padding, bool ceil_mode, bool save, bool wgmma) -> (Tensor, Tensor, Tensor)");
  // bytes of shared memory that a block of its CUDA kernel has
  m.def("_first_block_bytes(int channels, int filters) -> int");
}
