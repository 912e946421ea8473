// The CUDA back end: from checked arguments to launches on torch's current stream. `Memory` allocates: torch's CUDA
// allocator (backend.cpp), or guarded host memory where the kernels run on the emulator (emulated/module.cpp).
#pragma once

#include <limits>

#include "../host/register.h"
#include "kernels.h"

namespace alexnet_cuda {

template <class Memory>
struct CudaBackend : Memory {
  static DType dtype_of(const char* op, const Tensor& x) {
    const ScalarType type = x.scalar_type();
    if (type == ScalarType::Float) return DType::kFloat;
    if (type == ScalarType::Half) return DType::kHalf;
    if (type == ScalarType::BFloat16) return DType::kBFloat16;
    STD_TORCH_CHECK(false, op, ": expected x to be float32, float16 or bfloat16 on CUDA, got scalar type ",
                    static_cast<int>(type));
  }

  // Kernels count the elements of one image in 32 bits, those of a batch in 64.
  static void check_size(const char* op, const char* name, int64_t elements) {
    STD_TORCH_CHECK(elements <= std::numeric_limits<int32_t>::max(), op, ": expected one image of ", name,
                    " to have fewer than 2^31 elements, got ", elements);
  }

  static void local_response_norm(const char* op, const LrnArguments& args, const Tensor& like) {
    launch(op, launch_local_response_norm, args, like, 0);
  }
  static void local_response_norm_backward(const char* op, const LrnArguments& args, const Tensor& like) {
    launch(op, launch_local_response_norm_backward, args, like, args.spatial ? elements(args.images) : 0);
  }

  static void max_pool2d(const char* op, const PoolArguments& args, const Tensor& like) {
    Memory::check(launch_max_pool2d(args, Memory::stream(like)), op);
  }
  static void max_pool2d_backward(const char* op, const PoolArguments& args, const Tensor& like) {
    Memory::check(launch_max_pool2d_backward(args, Memory::stream(like)), op);
  }

  static void relu_lrn_max_pool2d(const char* op, const TailArguments& args, const Tensor& like) {
    launch(op, launch_relu_lrn_max_pool2d, args, like, relu_lrn_max_pool2d_workspace(args));
  }
  static void relu_lrn_max_pool2d_backward(const char* op, const TailArguments& args, const Tensor& like) {
    launch(op, launch_relu_lrn_max_pool2d_backward, args, like, relu_lrn_max_pool2d_workspace(args));
  }

  static std::optional<MemoryFormat> conv2d_format(const Images&, const Conv& conv, MemoryFormat of_x) {
    const bool has_kernel = is_conv11x11s4(conv) && conv.filters <= kMaxFilters;
    return has_kernel ? std::optional(of_x) : std::nullopt;
  }
  static constexpr auto conv2d_weight_grad_format = conv2d_format;
  static bool conv2d(const char* op, ConvArguments args, const Tensor& like) {
    const DType dtype = args.images.dtype = product_dtype(args.images.dtype, like);
    return launch(op, launch_conv2d, args, like, conv2d_workspace(dtype, args.conv));
  }
  static bool conv2d_weight_grad(const char* op, ConvArguments args, const Tensor& like) {
    const DType dtype = product_dtype(args.images.dtype, like);
    const bool is_float =
        dtype == DType::kTF32x3 && !has_tf32x3_weight_grad(Memory::compute_capability(like), args.conv);
    args.images.dtype = is_float ? DType::kFloat : dtype;
    std::optional<Tensor> unused;  // the kernel always writes a bias gradient
    if (!args.grad_bias) {
      unused = Memory::allocate(like, {args.conv.filters}, MemoryFormat::Contiguous);
      args.grad_bias = unused->mutable_data_ptr();
    }
    return launch(op, launch_conv2d_weight_grad, args, like, conv2d_weight_grad_workspace(args));
  }
  static bool conv2d_input_grad(const char* op, ConvArguments args, const Tensor& like) {
    const DType dtype = args.images.dtype = product_dtype(args.images.dtype, like);
    return launch(op, launch_conv2d_input_grad, args, like, conv2d_input_grad_workspace(dtype, args.conv));
  }

  static bool fuses_first_block(const BlockArguments& args) { return alexnet_cuda::fuses_first_block(args); }
  static void conv2d_relu_lrn_max_pool2d(const char* op, BlockArguments args, const Tensor& like) {
    Tensor workspace = floats(like, conv2d_workspace(args.conv.images.dtype, args.conv.conv));
    args.conv.workspace = static_cast<float*>(workspace.mutable_data_ptr());
    const auto launcher = Memory::uses_wgmma(like) ? launch_conv2d_relu_lrn_max_pool2d_wgmma
                          : first_block_bytes(args) <= Memory::shared_memory_limit(like)
                              ? launch_conv2d_relu_lrn_max_pool2d
                              : launch_conv2d_relu_lrn_max_pool2d_streamed;
    Memory::check(launcher(args, Memory::multiprocessors(like), Memory::stream(like)), op);
  }

 private:
  static int64_t elements(const Images& images) { return images.count * images.channels * images.pixels(); }

  static Tensor floats(const Tensor& like, int64_t n) {
    return Memory::allocate(like, {n}, MemoryFormat::Contiguous, ScalarType::Float);
  }

  // A convolution rounds float32 products to TF32 wherever torch's own does.
  static DType product_dtype(DType dtype, const Tensor& like) {
    if (dtype != DType::kFloat) return dtype;
    StableIValue allowed;
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("alexnet_cuda::_allows_tf32", "", &allowed, TORCH_ABI_VERSION));
    if (torch::stable::detail::to<bool>(allowed)) return DType::kTF32;
    return has_fast_tf32(Memory::compute_capability(like)) ? DType::kTF32x3 : dtype;
  }

  template <class Launcher, class Arguments>
  static bool launch(const char* op, Launcher launcher, Arguments args, const Tensor& like, int64_t workspace_floats) {
    std::optional<Tensor> workspace;
    if (workspace_floats) {
      workspace = floats(like, workspace_floats);
      args.workspace = static_cast<float*>(workspace->mutable_data_ptr());
    }
    Memory::check(launcher(args, Memory::stream(like)), op);
    return true;
  }
};

}  // namespace alexnet_cuda
