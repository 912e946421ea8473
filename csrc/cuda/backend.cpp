#include "backend.h"

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdlib>
#include <map>
#include <mutex>
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

  // What the runtime says of a device, asked once.
  struct Device {
    int multiprocessors, shared_memory_limit, capability;

    explicit Device(int index)
        : multiprocessors(attribute(index, cudaDevAttrMultiProcessorCount)),
          shared_memory_limit(attribute(index, cudaDevAttrMaxSharedMemoryPerBlockOptin)),
          capability(10 * attribute(index, cudaDevAttrComputeCapabilityMajor) +
                     attribute(index, cudaDevAttrComputeCapabilityMinor)) {}

    static int attribute(int index, cudaDeviceAttr which) {
      int value = 0;
      check(cudaDeviceGetAttribute(&value, which, index), "alexnet_cuda");
      return value;
    }
  };
  static const Device& device(const Tensor& x) {
    static std::mutex mutex;
    static std::map<int, Device> devices;  // elements of a map stay where they are
    const int index = x.get_device_index();
    const std::lock_guard lock(mutex);
    const auto known = devices.find(index);
    return known == devices.end() ? devices.emplace(index, index).first->second : known->second;
  }
  static int multiprocessors(const Tensor& x) { return device(x).multiprocessors; }
  static int compute_capability(const Tensor& x) { return device(x).capability; }
  static int shared_memory_limit(const Tensor& x) { return device(x).shared_memory_limit; }

  // ALEXNET_CUDA_WGMMA=0 lets a benchmark compare the two kernels of the first block.
  static bool uses_wgmma([[maybe_unused]] const Tensor& x) {
#ifdef ALEXNET_CUDA_WGMMA
    const char* wanted = std::getenv("ALEXNET_CUDA_WGMMA");
    return !(wanted && std::string_view(wanted) == "0") && device(x).capability == 90;
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
