// The Python module _C. Importing it registers the operators and the CPU kernels (static initialisers in ops.cpp and
// cpu/); what it holds itself are facts about the build. No torch header, no tensor.
#include <pybind11/pybind11.h>

#include "build_info.h"
#include "cpu/level.h"
#include "cpu/memory.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.def("build_info", [] {
    py::dict info;
    info["built against torch"] = BUILD_TORCH_VERSION;
    info["runs on torch"] = ">= " BUILD_TORCH_TARGET;
    info["compiler"] = BUILD_COMPILER;
    info["CUDA toolkit"] = BUILD_CUDA_VERSION[0] ? BUILD_CUDA_VERSION : "none";
    info["CUDA architectures"] = BUILD_CUDA_ARCHITECTURES[0] ? BUILD_CUDA_ARCHITECTURES : "none";
    return info;
  });
  m.def("cpu_level", [] { return alexnet_cuda::cpu_level(); });
  m.def("cache_limit", &alexnet_cuda::cache_limit);
  m.def("set_cache_limit", &alexnet_cuda::set_cache_limit);
}
