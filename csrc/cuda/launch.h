// Host side of every launcher: grid sizes, cutting of large batches, and dispatch from run-time values to templates.
#pragma once

#include <algorithm>
#include <type_traits>

#include "kernels.h"

namespace alexnet_cuda {

constexpr int kThreads = 256;                       // of a thread block
constexpr int64_t kBusyThreads = int64_t{1} << 18;  // as many keep a large GPU busy

__host__ __device__ inline int divide_up(int64_t a, int64_t b) {
  return static_cast<int>((a + b - 1) / b);
}

// 0 <= i < n by one comparison: as an unsigned number, a negative one is too large.
GPU_DEVICE bool is_inside(int i, int n) {
  return static_cast<unsigned>(i) < static_cast<unsigned>(n);
}

template <class... Pointers>
bool are_aligned(int bytes, Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % bytes == 0) && ...);
}

#if defined(ALEXNET_CUDA_EMULATOR)  // so small that tests cut launches too
constexpr int64_t kMaxItems = int64_t{1} << 8, kMaxGridRows = 3, kMaxSplits = 2;
#else
constexpr int64_t kMaxItems = int64_t{1} << 30, kMaxGridRows = 65535;  // limits of a launch: work items, gridDim.y
constexpr int64_t kMaxSplits = 132;  // of a sum over pixels on tensor cores: the SMs of an H200
#endif

// Calls launch(first, count) for consecutive parts of n that have at most `limit` items.
template <class Launch>
gpu::error_t for_each_part(int64_t n, int64_t limit, Launch launch) {
  for (int64_t first = 0; first < n; first += limit) {
    const gpu::error_t error = launch(first, std::min(limit, n - first));
    if (error != gpu::kSuccess) return error;
  }
  return gpu::kSuccess;
}

// Calls launch(first image, number of images) with at most kMaxItems items, or else one image, per launch.
template <class Launch>
gpu::error_t for_each_batch(int64_t images, int64_t items_per_image, Launch launch) {
  return for_each_part(images, std::max(int64_t{1}, kMaxItems / items_per_image), launch);
}

template <class T>
struct Type {
  using type = T;
};

// body(std::true_type or std::false_type): makes a flag a template argument.
template <class Body>
auto dispatch_flag(bool flag, Body body) {
  return flag ? body(std::true_type{}) : body(std::false_type{});
}

// body(Type<T>) with the element type of a dtype that has CUDA kernels.
template <class Body>
auto dispatch_dtype(DType dtype, Body body) {
  if (dtype == DType::kHalf) return body(Type<gpu::half>{});
  if (dtype == DType::kBFloat16) return body(Type<gpu::bfloat16>{});
  return body(Type<float>{});
}

// body(Type<T>, channels_last)
template <class Body>
auto dispatch_images(const Images& images, Body body) {
  return dispatch_dtype(images.dtype, [&](auto type) {
    return dispatch_flag(images.channels_last, [&](auto nhwc) { return body(type, nhwc); });
  });
}

}  // namespace alexnet_cuda
