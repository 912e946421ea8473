// The Python module _emulated: the operators of the CUDA back end, computed on the CPU by the emulator. Importing it
// registers torch.ops.alexnet_cuda_emulated.*, with the schemas of torch.ops.alexnet_cuda.*; they take CPU tensors.
// Kernels work on copies of their inputs, between guards; results and workspaces start as NaN.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <ranges>

#include "../cuda/backend.h"
#include "kernels.h"

namespace py = pybind11;

namespace alexnet_cuda {
namespace {

// The emulated device; set from Python.
int64_t offset_elements = 0;
int multiprocessor_count = 132, compute_capability = 9;

struct GuardedMemory {
  struct Guard {
    explicit Guard(const Tensor&) {}
  };

  static Tensor allocate(const Tensor& like, const std::vector<int64_t>& size, MemoryFormat format,
                         std::optional<ScalarType> dtype = std::nullopt, int64_t offset = 0) {
    const Tensor layout = empty(like, size, format, dtype);
    if (layout.numel() == 0) return layout;
    std::vector<int64_t> strides;
    for (size_t d = 0; d < size.size(); ++d) strides.push_back(layout.stride(d));
    auto* array = new emulator::Array(layout.numel() * layout.element_size(), offset * layout.element_size());
    return torch::stable::from_blob(array->data, size, strides, like.device(), layout.scalar_type(),
                                    [array](void*) { delete array; });
  }
  static Tensor dense(const Tensor& x, MemoryFormat format) {
    Tensor copy = allocate(x, size_of(x), format, x.scalar_type(), offset_elements);
    return torch::stable::copy_(copy, x);
  }

  static gpu::stream_t stream(const Tensor&) { return nullptr; }
  static void check(gpu::error_t error, const char* op) {
    STD_TORCH_CHECK(error == gpu::kSuccess, op, ": the launcher returned an error");
  }
  static int multiprocessors(const Tensor&) { return multiprocessor_count; }
  static int shared_memory_limit(const Tensor&) { return 227 * 1024; }
  static bool uses_wgmma(const Tensor&) { return compute_capability == 9; }
};

// Runs kernels[name] on a copy of `in` and returns its `outputs` floats.
auto runner(const std::map<std::string, TestKernel>& kernels) {
  return [&kernels](const std::string& name, const py::array& in, int64_t outputs) {
    if (!(in.flags() & py::array::c_style)) throw py::value_error("expected a contiguous array");
    const emulator::Array from(in.nbytes(), offset_elements * in.itemsize()), to(outputs * 4);
    std::memcpy(from.data, in.data(), from.bytes);
    if (kernels.at(name)(from.data, to.data) != gpu::kSuccess)
      throw std::runtime_error("the launcher returned an error");
    return py::array_t<float>(outputs, reinterpret_cast<const float*>(to.data));
  };
}

}  // namespace
}  // namespace alexnet_cuda

STABLE_TORCH_LIBRARY_IMPL(alexnet_cuda_emulated, CPU, m) {
  alexnet_cuda::register_operators<alexnet_cuda::CudaBackend<alexnet_cuda::GuardedMemory>>(m);
}

PYBIND11_MODULE(_emulated, m) {
  py::register_exception<emulator::Error>(m, "Error", PyExc_RuntimeError);
  const auto set_order = [](const std::string& order, unsigned seed) {
    const std::map<std::string, emulator::Order> orders = {{"ascending", emulator::Order::kAscending},
                                                           {"descending", emulator::Order::kDescending},
                                                           {"random", emulator::Order::kRandom}};
    if (!orders.count(order)) throw py::value_error("order: expected ascending, descending or random, got " + order);
    emulator::set_order(orders.at(order), seed);
  };
  m.def("set_order", set_order, py::arg("order"), py::arg("seed") = 0);
  // By how many elements inputs start behind an aligned address.
  m.def("set_offset", [](int64_t elements) { alexnet_cuda::offset_elements = elements; });
  m.def("set_multiprocessors", [](int n) { alexnet_cuda::multiprocessor_count = n; });
  m.def("set_compute_capability", [](int major) { alexnet_cuda::compute_capability = major; });
  m.def("run_test_kernel", alexnet_cuda::runner(alexnet_cuda::test_kernels));
  m.def("run_broken_kernel", alexnet_cuda::runner(alexnet_cuda::broken_kernels));
  m.def("broken_kernels", [] {
    const auto names = std::views::keys(alexnet_cuda::broken_kernels);
    return std::vector<std::string>(names.begin(), names.end());
  });
}
