#include "host.h"

namespace alexnet_cuda {
namespace {

Tensor kept_empty_like(const Tensor& x) {
  std::vector<int64_t> size(x.dim());
  for (int64_t d = 0; d < x.dim(); ++d) size[d] = x.size(d);
  return result(x, size, MemoryFormat::Contiguous);
}

}  // namespace
}  // namespace alexnet_cuda

STABLE_TORCH_LIBRARY_IMPL(alexnet_cuda, CPU, m) {
  m.impl("_kept_empty_like", TORCH_BOX(&alexnet_cuda::kept_empty_like));
}
