// What Python asks the CUDA library with ctypes (alexnet_cuda/_library.py).
#include <cuda_runtime_api.h>

// The newest CUDA version that the installed NVIDIA driver serves and the one of the runtime inside this library, as
// 1000 major + 10 minor; 0 without a driver. Makes no CUDA context.
extern "C" __attribute__((visibility("default"))) void alexnet_cuda_versions(int* driver, int* runtime) {
  if (cudaDriverGetVersion(driver) != cudaSuccess) *driver = 0;
  if (cudaRuntimeGetVersion(runtime) != cudaSuccess) *runtime = 0;
}
