// Batch normalisation of float32, float16 and bfloat16 images with the statistics of the batch, on the CPU alone.
// Weight, bias, mean and variance are float32; sums over strips of pixels are added up in double.
#include <algorithm>
#include <cmath>

#include "tensors.h"

namespace alexnet_cuda {
namespace {

// Batch normalisation in training.
struct BatchNorm {
  const int64_t channels, pixels, strips = (pixels + kNormStrip - 1) / kNormStrip;
  std::vector<float> rows = std::vector<float>(5 * channels);  // mean, scale, bias, slope, offset of NormTask
  NormTask task;

  BatchNorm(const char* op, const Tensor& x, const Tensor& weight, const Tensor& bias, bool relu)
      : channels(x.size(1)), pixels(x.size(0) * x.size(2) * x.size(3)) {
    STD_TORCH_CHECK(x.scalar_type() != ScalarType::Double, op, ": expected float32, float16 or bfloat16, got float64");
    STD_TORCH_CHECK(channels % 16 == 0 && pixels > 0, op, ": expected images with a multiple of 16 channels");
    task.images = images_of<CpuTensors>(op, "x", x, size_of(x), MemoryFormat::ChannelsLast);
    task.relu = relu;
    task.mean = row(0), task.scale = row(1), task.bias = row(2), task.slope = row(3), task.offset = row(4);
    set_row(1, op, weight);
    set_row(2, op, bias);
  }

  float* row(int64_t i) { return rows.data() + i * channels; }
  void set_row(int64_t i, const char* op, const Tensor& t) {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.numel() == channels && t.stride(0) == 1, op,
                    ": expected weight, bias and statistics to be dense float32 with ", channels, " elements");
    std::copy_n(static_cast<const float*>(t.const_data_ptr()), channels, row(i));
  }

  // Three numbers of each channel: the sums over all pixels of the kernel's two terms, and its pivot.
  std::vector<double> sums(void (*kernel)(const NormTask&, int64_t, int64_t)) {
    const auto parts = make_buffer<float>(strips * 3 * channels);
    task.sums = parts.get();
    run_tasks(kernel, task, strips, kNormStrip * channels);
    std::vector<double> total(3 * channels);
    for (int64_t t = 0; t < strips; ++t)
      for (int64_t i = 0; i < 2 * channels; ++i) total[i] += parts.get()[t * 3 * channels + i];
    for (int64_t i = 2 * channels; i < 3 * channels; ++i) total[i] = parts.get()[i];
    return total;
  }

  Tensor apply(void (*kernel)(const NormTask&, int64_t, int64_t), const Tensor& x) {
    Tensor out = CpuTensors::allocate(x, size_of(x), MemoryFormat::ChannelsLast);
    task.out = out.mutable_data_ptr();
    run_tasks(kernel, task, strips, kNormStrip * channels);
    return out;
  }
};

std::tuple<Tensor, Tensor, Tensor> batch_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps,
                                              bool relu) {
  check_4d("batch_norm", "x", x);
  BatchNorm norm("batch_norm", x, weight, bias, relu);
  const Tensor images = CpuTensors::dense(x, MemoryFormat::ChannelsLast);
  norm.task.x = images.const_data_ptr();
  const std::vector<double> sums = norm.sums(batch_norm_sums_kernel());
  Tensor mean = torch::stable::empty_like(weight), var = torch::stable::empty_like(weight);
  float *const means = static_cast<float*>(mean.mutable_data_ptr()), *const vars =
                                                                         static_cast<float*>(var.mutable_data_ptr());
  for (int64_t c = 0; c < norm.channels; ++c) {
    const double shift = sums[c] / norm.pixels;
    means[c] = norm.row(0)[c] = sums[2 * norm.channels + c] + shift;
    const double variance = sums[norm.channels + c] / norm.pixels - shift * shift;
    vars[c] = variance < 0 ? 0 : variance;  // NaN stays
    norm.row(1)[c] /= std::sqrt(vars[c] + eps);
  }
  return {norm.apply(batch_norm_apply_kernel(), images), mean, var};
}

// The gradients of x, weight and bias.
std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                       const Tensor& bias, const Tensor& mean, const Tensor& var,
                                                       double eps, bool relu) {
  const char* op = "_batch_norm_backward";
  check_4d(op, "x", x);
  check_same(op, "grad", grad, x);
  check_sizes(op, "grad", grad, size_of(x));
  BatchNorm norm(op, x, weight, bias, relu);
  norm.set_row(0, op, mean);
  norm.set_row(3, op, var);
  float* const slope = norm.row(3);
  std::vector<double> deviation(norm.channels);
  for (int64_t c = 0; c < norm.channels; ++c) {
    deviation[c] = std::sqrt(slope[c] + eps);
    norm.row(1)[c] /= deviation[c];
  }
  const Tensor images = CpuTensors::dense(x, MemoryFormat::ChannelsLast),
               grads = CpuTensors::dense(grad, MemoryFormat::ChannelsLast);
  norm.task.x = images.const_data_ptr();
  norm.task.grad = grads.const_data_ptr();
  const std::vector<double> sums = norm.sums(batch_norm_grad_sums_kernel());
  Tensor grad_weight = torch::stable::empty_like(weight), grad_bias = torch::stable::empty_like(weight);
  for (int64_t c = 0; c < norm.channels; ++c) {
    const double scale = norm.row(1)[c], product = sums[norm.channels + c] / deviation[c];
    static_cast<float*>(grad_weight.mutable_data_ptr())[c] = product;
    static_cast<float*>(grad_bias.mutable_data_ptr())[c] = sums[c];
    slope[c] = -scale * product / deviation[c] / norm.pixels;
    norm.row(4)[c] = -scale * sums[c] / norm.pixels;
  }
  return {norm.apply(batch_norm_input_grad_kernel(), images), grad_weight, grad_bias};
}

}  // namespace
}  // namespace alexnet_cuda

STABLE_TORCH_LIBRARY_IMPL(alexnet_cuda, CPU, m) {
  m.impl("batch_norm", TORCH_BOX(&alexnet_cuda::batch_norm));
  m.impl("_batch_norm_backward", TORCH_BOX(&alexnet_cuda::batch_norm_backward));
}
