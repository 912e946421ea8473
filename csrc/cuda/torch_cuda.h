// torch's current CUDA stream, through its C ABI.
//
// The function lives in libtorch_cuda.so, which a CPU-only torch does not have. The weak reference lets this library
// load with either; with a CUDA build it is found through the dependency libtorch.so -> libtorch_cuda.so.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace alexnet_cuda {

inline bool torch_has_cuda() {
  return aoti_torch_get_current_cuda_stream != nullptr;
}

inline cudaStream_t current_stream(int32_t device_index) {
  STD_TORCH_CHECK(torch_has_cuda(), "alexnet_cuda: this build of torch has no CUDA support");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void cuda_check(cudaError_t error, const char* op) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": the CUDA kernel could not be launched: ", cudaGetErrorString(error));
}

}  // namespace alexnet_cuda
