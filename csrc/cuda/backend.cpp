#include "backend.h"

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdlib>
#include <string_view>

// The function lives in libtorch_cuda.so, which a CPU-only torch does not have. The weak reference lets this library
// load with either; with a CUDA build it is found through the dependency libtorch.so -> libtorch_cuda.so.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace alexnet_cuda {
namespace {

struct CudaMemory {
  struct Guard : torch::stable::accelerator::DeviceGuard {
    explicit Guard(const Tensor& x) : DeviceGuard(x.get_device_index()) {}
  };

  static Tensor allocate(const Tensor& like, const std::vector<int64_t>& size, MemoryFormat format,
                         std::optional<ScalarType> dtype = std::nullopt) {
    return empty(like, size, format, dtype);
  }
  static Tensor dense(const Tensor& x, MemoryFormat format) { return torch::stable::contiguous(x, format); }

  static cudaStream_t stream(const Tensor& x) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "alexnet_cuda: this build of torch has no CUDA support");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    return static_cast<cudaStream_t>(stream);
  }
  static void check(cudaError_t error, const char* op) {
    STD_TORCH_CHECK(error == cudaSuccess, op, ": the CUDA kernel could not be launched: ", cudaGetErrorString(error));
  }

  static int attribute(const Tensor& x, cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, x.get_device_index()), "alexnet_cuda");
    return value;
  }
  static int multiprocessors(const Tensor& x) { return attribute(x, cudaDevAttrMultiProcessorCount); }
  static int compute_capability(const Tensor& x) {
    return 10 * attribute(x, cudaDevAttrComputeCapabilityMajor) + attribute(x, cudaDevAttrComputeCapabilityMinor);
  }
  static int shared_memory_limit(const Tensor& x) { return attribute(x, cudaDevAttrMaxSharedMemoryPerBlockOptin); }

  // ALEXNET_CUDA_WGMMA=0 lets a benchmark compare the two kernels of the first block.
  static bool uses_wgmma([[maybe_unused]] const Tensor& x) {
#ifdef ALEXNET_CUDA_WGMMA
    const char* wanted = std::getenv("ALEXNET_CUDA_WGMMA");
    return !(wanted && std::string_view(wanted) == "0") && attribute(x, cudaDevAttrComputeCapabilityMajor) == 9;
#else
    return false;
#endif
  }
};

}  // namespace
}  // namespace alexnet_cuda

STABLE_TORCH_LIBRARY_IMPL(alexnet_cuda, CUDA, m) {
  alexnet_cuda::register_operators<alexnet_cuda::CudaBackend<alexnet_cuda::CudaMemory>>(m);
}
