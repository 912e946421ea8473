// The CPU back end but for the convolutions (conv2d.cpp): tensors, and how the work is divided into tasks (kernels.h).
#include "backend.h"

#include <algorithm>

#include "../host/register.h"
#include "kernels.h"
#include "memory.h"
#include "tasks.h"

namespace alexnet_cuda {
namespace {

std::vector<int64_t> dense_strides(const std::vector<int64_t>& size, MemoryFormat format) {
  if (format == MemoryFormat::ChannelsLast) return {size[1] * size[2] * size[3], 1, size[3] * size[1], size[1]};
  std::vector<int64_t> strides(size.size(), 1);
  for (size_t d = size.size() - 1; d > 0; --d) strides[d - 1] = strides[d] * size[d];
  return strides;
}

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

}  // namespace

DType Cpu::dtype_of(const char* op, const Tensor& x) {
  const ScalarType type = x.scalar_type();
  if (type == ScalarType::Float) return DType::kFloat;
  if (type == ScalarType::Double) return DType::kDouble;
  if (type == ScalarType::Half) return DType::kHalf;
  if (type == ScalarType::BFloat16) return DType::kBFloat16;
  STD_TORCH_CHECK(false, op, ": expected x to be float32, float64, float16 or bfloat16, got scalar type ",
                  static_cast<int>(type));
}

Tensor Cpu::allocate(const Tensor& like, const std::vector<int64_t>& size, MemoryFormat format,
                     std::optional<ScalarType> dtype) {
  const ScalarType type = dtype.value_or(like.scalar_type());
  int64_t bytes = type == ScalarType::Byte ? 1 : like.element_size();
  for (int64_t n : size) bytes *= n;
  if (bytes < kMinCachedBytes || cache_limit() == 0) return empty(like, size, format, type);
  return torch::stable::from_blob(allocate_memory(bytes), size, dense_strides(size, format), like.device(), type,
                                  [bytes](void* data) { release_memory(data, bytes); });
}

// torch's `contiguous` is a call through its dispatcher, so only where it is needed.
Tensor Cpu::dense(const Tensor& x, MemoryFormat format) {
  const std::vector<int64_t> size = size_of(x), strides = dense_strides(size, format);
  bool is_dense = true;
  for (size_t d = 0; d < size.size(); ++d) is_dense &= size[d] == 1 || x.stride(d) == strides[d];
  return is_dense ? x : torch::stable::contiguous(x, format);
}

void Cpu::local_response_norm(const char*, const LrnArguments& args, const Tensor&) {
  run_lrn(args.spatial ? spatial_lrn_forward_kernel() : lrn_forward_kernel(), args);
}

void Cpu::local_response_norm_backward(const char*, const LrnArguments& args, const Tensor&) {
  run_lrn(args.spatial ? spatial_lrn_backward_kernel() : lrn_backward_kernel(), args);
}

void Cpu::max_pool2d(const char*, const PoolArguments& args, const Tensor&) {
  const int64_t channels = args.images.channels_last ? args.images.channels : kPlanes;
  run_tasks(max_pool_forward_kernel(), args, plane_blocks(args.images, channels) * args.pool.out_height,
            args.pool.stride * args.pool.width * channels);
}

void Cpu::max_pool2d_backward(const char*, const PoolArguments& args, const Tensor&) {
  const Images& images = args.images;
  const bool rows = images.channels_last;
  run_tasks(max_pool_backward_kernel(), args, images.count * (rows ? images.height : images.channels),
            images.width * (rows ? images.channels : images.height));
}

void Cpu::relu_lrn_max_pool2d(const char*, const TailArguments& args, const Tensor&) {
  run_tasks(tail_forward_kernel(), args, args.images.count * args.pool.out_height,
            args.pool.stride * args.pool.width * args.images.channels);
}

void Cpu::relu_lrn_max_pool2d_backward(const char*, const TailArguments& args, const Tensor&) {
  run_tasks(tail_backward_kernel(), args, args.images.count * args.pool.height, args.pool.width * args.images.channels);
}

}  // namespace alexnet_cuda

STABLE_TORCH_LIBRARY_IMPL(alexnet_cuda, CPU, m) {
  alexnet_cuda::register_operators<alexnet_cuda::Cpu>(m);
}
