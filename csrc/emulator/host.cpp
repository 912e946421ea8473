// The Python module _emulated, which a test loads in place of _C (ALEXNET_CUDA_EMULATED=1): the operators on CPU
// tensors, served by the CUDA kernels on the emulator and by their host code, ../cuda/register.cpp itself.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/accelerator.h>

#include "../check.h"
#include "../cpu/memory.h"
#include "../cuda/torch_cuda.h"

// Of torch's CUDA: every device is current, and its stream is null.
extern "C" {
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) {
  return AOTI_TORCH_SUCCESS;
}
}

namespace alexnet_cuda {
namespace {

// Results and workspaces between guards, and full of NaN.
Tensor guarded(const Tensor& like, const std::vector<int64_t>& size, MemoryFormat format,
               std::optional<ScalarType> dtype = std::nullopt) {
  const Tensor plain = empty(like, size, format, dtype);
  if (plain.numel() == 0) return plain;
  std::vector<int64_t> strides;
  for (size_t d = 0; d < size.size(); ++d) strides.push_back(plain.stride(d));
  auto* array = new emulator::Array(plain.numel() * plain.element_size());
  return torch::stable::from_blob(array->data, size, strides, like.device(), plain.scalar_type(),
                                  [array](void*) { delete array; });
}

}  // namespace
}  // namespace alexnet_cuda

#define ALEXNET_CUDA_WGMMA
#define CUDA CPU  // the dispatch key; every header with another meaning of these two is included above
#define empty guarded
#include "../cuda/register.cpp"
#undef CUDA
#undef empty

STABLE_TORCH_LIBRARY_IMPL(alexnet_cuda, CPU, m) {
  m.impl("_kept_empty_like", TORCH_BOX(&torch::stable::empty_like));
}

namespace py = pybind11;

PYBIND11_MODULE(_emulated, m) {  // what the package asks of _C
  m.def("build_info", [] { return py::dict(); });
  m.def("cpu_level", [] { return "CUDA kernels on the emulator"; });
  m.def("kept_memory_limit", &alexnet_cuda::kept_memory_limit);
  m.def("set_kept_memory", &alexnet_cuda::set_kept_memory);
}
