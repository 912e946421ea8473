// The Python module _emulator: every launcher of ../cuda/kernels.h, on numpy arrays.
//
// Arrays are one-dimensional and raw: float32 (also of dtype tf32), or uint16 with the bits of float16 and bfloat16, in
// the memory order that `images` = (dtype name, channels_last, n, c, h, w) states. Kernels work on copies, between
// guards: a read beyond an array's end gives NaN, and so does an output that is not written.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <tuple>

#include "../cuda/kernels.h"
#include "kernels.h"

namespace py = pybind11;

namespace {

using namespace alexnet_cuda;
using ImagesTuple = std::tuple<std::string, bool, int64_t, int64_t, int64_t, int64_t>;
using LrnTuple = std::tuple<int, int, double, double, double, int>;  // size, front, alpha, beta, k, groups
using PoolTuple = std::tuple<int, int, int, bool>;                   // kernel_size, stride, padding, ceil_mode

Images images_of(const ImagesTuple& t) {
  const auto& [dtype, channels_last, n, c, h, w] = t;
  static const std::map<std::string, DType> types = {
      {"float32", kFloat}, {"float16", kHalf}, {"bfloat16", kBFloat16}, {"tf32", kTF32}};
  if (!types.count(dtype)) throw py::value_error("dtype: expected float32, float16, bfloat16 or tf32, got " + dtype);
  return {types.at(dtype), channels_last, n, c, h, w};
}

int64_t element_size(const Images& images) {
  return images.dtype == kFloat || images.dtype == kTF32 ? 4 : 2;
}

Lrn lrn_of(const LrnTuple& t) {
  return std::make_from_tuple<Lrn>(t);
}

Pool pool_of(const PoolTuple& t, const Images& images) {
  const auto& [k, stride, padding, ceil_mode] = t;
  return {k,
          stride,
          padding,
          images.h,
          images.w,
          output_size(images.h, k, stride, padding, ceil_mode, true),
          output_size(images.w, k, stride, padding, ceil_mode, true)};
}

Conv conv_of(const Images& images, int64_t filters, int k, int stride, int padding, bool ceil_mode) {
  return {images.c,
          images.h,
          images.w,
          filters,
          k,
          stride,
          padding,
          output_size(images.h, k, stride, padding, ceil_mode, false),
          output_size(images.w, k, stride, padding, ceil_mode, false)};
}

int64_t offset = 0;  // set_offset

// An array of the caller's in device memory, or one for results.
class Buffer : public emulator::Array {
 public:
  using Array::Array;
  explicit Buffer(const py::array& from) : Array(from.nbytes(), offset * from.itemsize()) {
    if (!(from.flags() & py::array::c_style)) throw py::value_error("expected contiguous arrays");
    std::memcpy(data, from.data(), bytes);
  }
  float* floats() const { return reinterpret_cast<float*>(data); }
  py::array result(const char* format) const {
    py::dtype type(format);
    py::array array(type, std::vector<py::ssize_t>{bytes / type.itemsize()});
    std::memcpy(array.mutable_data(), data, bytes);
    return array;
  }
};

const char* format_of(const Images& images) {
  return element_size(images) == 4 ? "float32" : "uint16";
}

void check(gpu::error_t error) {
  if (error != gpu::kSuccess) throw std::runtime_error("the launcher returned an error");
}

py::array local_response_norm(const ImagesTuple& shape, const py::array& x, const LrnTuple& lrn, bool spatial) {
  const Images images = images_of(shape);
  const Buffer in(x), out(x.nbytes());
  check(launch_local_response_norm(images, in.data, out.data, lrn_of(lrn), spatial, nullptr));
  return out.result(format_of(images));
}

py::array local_response_norm_backward(const ImagesTuple& shape, const py::array& grad, const py::array& x,
                                       const LrnTuple& lrn, bool spatial) {
  const Images images = images_of(shape);
  const Buffer g(grad), in(x), out(x.nbytes()), workspace(spatial ? images.n * images.c * images.h * images.w * 4 : 0);
  check(launch_local_response_norm_backward(images, g.data, in.data, out.data, lrn_of(lrn), spatial, workspace.floats(),
                                            nullptr));
  return out.result(format_of(images));
}

py::tuple max_pool2d(const ImagesTuple& shape, const py::array& x, const PoolTuple& pool_, bool save_code) {
  const Images images = images_of(shape);
  const Pool pool = pool_of(pool_, images);
  const int64_t outputs = images.n * images.c * pool.out_height * pool.out_width;
  const Buffer in(x), out(outputs * element_size(images)), code(save_code ? outputs : 0);
  check(launch_max_pool2d(images, in.data, out.data, save_code ? code.data : nullptr, pool, nullptr));
  return py::make_tuple(out.result(format_of(images)), code.result("uint8"));
}

py::array max_pool2d_backward(const ImagesTuple& shape, const py::array& grad, const py::array& code,
                              const PoolTuple& pool) {
  const Images images = images_of(shape);
  const Buffer g(grad), where(code), out(images.n * images.c * images.h * images.w * element_size(images));
  check(launch_max_pool2d_backward(images, g.data, where.data, out.data, pool_of(pool, images), nullptr));
  return out.result(format_of(images));
}

py::tuple relu_lrn_max_pool2d(const ImagesTuple& shape, const py::array& x, int order, const LrnTuple& lrn,
                              const PoolTuple& pool_, bool save_code) {
  const Images images = images_of(shape);
  const Pool pool = pool_of(pool_, images);
  const int64_t outputs = images.n * images.c * pool.out_height * pool.out_width;
  const Buffer in(x), out(outputs * element_size(images)), code(save_code ? outputs : 0);
  check(launch_relu_lrn_max_pool2d(images, in.data, out.data, save_code ? code.data : nullptr,
                                   static_cast<Order>(order), lrn_of(lrn), pool, nullptr));
  return py::make_tuple(out.result(format_of(images)), code.result("uint8"));
}

py::array relu_lrn_max_pool2d_backward(const ImagesTuple& shape, const py::array& grad, const py::array& x,
                                       const py::array& code, int order, const LrnTuple& lrn, const PoolTuple& pool) {
  const Images images = images_of(shape);
  const Buffer g(grad), in(x), where(code), out(x.nbytes());
  const Buffer workspace(order == kReluPoolLrn ? code.nbytes() * 4 : 0);
  check(launch_relu_lrn_max_pool2d_backward(images, g.data, in.data, where.data, out.data, static_cast<Order>(order),
                                            lrn_of(lrn), pool_of(pool, images), workspace.floats(), nullptr));
  return out.result(format_of(images));
}

py::array conv2d(const ImagesTuple& shape, const py::array& x, const py::array& weight,
                 const std::optional<py::array>& bias, int64_t filters, int k, int stride, int padding,
                 bool ceil_mode) {
  const Images images = images_of(shape);
  const Conv conv = conv_of(images, filters, k, stride, padding, ceil_mode);
  const Buffer in(x), w(weight), b(bias ? *bias : py::array(py::dtype("uint16"), 0));
  const Buffer out(images.n * filters * conv.out_height * conv.out_width * element_size(images));
  const Buffer workspace(conv2d_workspace(images.dtype, conv) * 4);
  check(launch_conv2d(images, in.data, w.data, bias ? b.data : nullptr, out.data, conv, workspace.floats(), nullptr));
  return out.result(format_of(images));
}

py::tuple conv2d_weight_grad(const ImagesTuple& shape, const py::array& grad, const py::array& x, int64_t filters,
                             int k, int stride, int padding, bool ceil_mode) {
  const Images images = images_of(shape);
  const Conv conv = conv_of(images, filters, k, stride, padding, ceil_mode);
  const Buffer g(grad), in(x), dw(filters * images.c * k * k * element_size(images)),
      db(filters * element_size(images));
  const Buffer workspace(conv2d_weight_grad_workspace(images.dtype, images.n, conv) * 4);
  check(launch_conv2d_weight_grad(images, g.data, in.data, dw.data, db.data, conv, workspace.floats(), nullptr));
  return py::make_tuple(dw.result(format_of(images)), db.result(format_of(images)));
}

py::array conv2d_input_grad(const ImagesTuple& shape, const py::array& grad, const py::array& weight, int64_t filters,
                            int k, int stride, int padding, bool ceil_mode) {
  const Images images = images_of(shape);
  const Conv conv = conv_of(images, filters, k, stride, padding, ceil_mode);
  const Buffer g(grad), w(weight), out(images.n * images.c * images.h * images.w * element_size(images));
  const Buffer workspace(conv2d_input_grad_workspace(images.dtype, conv) * 4);
  check(launch_conv2d_input_grad(images, g.data, w.data, out.data, conv, workspace.floats(), nullptr));
  return out.result(format_of(images));
}

py::tuple conv2d_relu_lrn_max_pool2d(const ImagesTuple& shape, const py::array& x, const py::array& weight,
                                     const std::optional<py::array>& bias, int64_t filters, int padding, bool ceil_mode,
                                     const LrnTuple& lrn, const PoolTuple& pool_, bool save, int processors,
                                     bool wgmma) {
  const Images images = images_of(shape);
  const Conv conv = conv_of(images, filters, 11, 4, padding, ceil_mode);
  const Pool pool =
      pool_of(pool_, {images.dtype, images.channels_last, images.n, filters, conv.out_height, conv.out_width});
  const int64_t outputs = images.n * filters * pool.out_height * pool.out_width;
  const Buffer in(x), w(weight), b(bias ? *bias : py::array(py::dtype("uint16"), 0));
  const Buffer out(outputs * 2), a(save ? images.n * filters * conv.out_height * conv.out_width * 2 : 0);
  const Buffer code(save ? outputs : 0), workspace(conv2d_workspace(images.dtype, conv) * 4);
  if (!fuses_conv2d_relu_lrn_max_pool2d(images.dtype, conv, lrn_of(lrn), pool, kReluLrnPool, 227 * 1024))
    throw py::value_error("the kernel cannot do this");
  const auto launch = wgmma ? launch_conv2d_relu_lrn_max_pool2d_wgmma : launch_conv2d_relu_lrn_max_pool2d;
  check(launch(images, in.data, w.data, bias ? b.data : nullptr, out.data, save ? a.data : nullptr,
               save ? code.data : nullptr, conv, lrn_of(lrn), pool, processors, workspace.floats(), nullptr));
  return py::make_tuple(out.result("uint16"), a.result("uint16"), code.result("uint8"));
}

py::array run_kernel(const std::map<std::string, TestKernel>& kernels, const std::string& name, const py::array& in,
                     int64_t outputs) {
  const Buffer from(in), to(outputs * 4);
  check(kernels.at(name)(from.data, to.data));
  return to.result("float32");
}

std::vector<std::string> names(const std::map<std::string, TestKernel>& kernels) {
  std::vector<std::string> all;
  for (const auto& [name, kernel] : kernels) all.push_back(name);
  return all;
}

}  // namespace

PYBIND11_MODULE(_emulator, m) {
  py::register_exception<emulator::Error>(m, "Error", PyExc_RuntimeError);
  m.def(
      "set_order",
      [](const std::string& order, unsigned seed) {
        if (order != "ascending" && order != "descending" && order != "random")
          throw py::value_error("order: expected ascending, descending or random, got " + order);
        emulator::set_order(order == "ascending"    ? emulator::Order::kAscending
                            : order == "descending" ? emulator::Order::kDescending
                                                    : emulator::Order::kRandom,
                            seed);
      },
      py::arg("order"), py::arg("seed") = 0);
  // Of how many elements the arrays that come from Python start behind an aligned address.
  m.def("set_offset", [](int64_t elements) { offset = elements; });
  m.def("local_response_norm", &local_response_norm);
  m.def("local_response_norm_backward", &local_response_norm_backward);
  m.def("max_pool2d", &max_pool2d);
  m.def("max_pool2d_backward", &max_pool2d_backward);
  m.def("relu_lrn_max_pool2d", &relu_lrn_max_pool2d);
  m.def("relu_lrn_max_pool2d_backward", &relu_lrn_max_pool2d_backward);
  m.def("conv2d", &conv2d);
  m.def("conv2d_weight_grad", &conv2d_weight_grad);
  m.def("conv2d_input_grad", &conv2d_input_grad);
  m.def("conv2d_relu_lrn_max_pool2d", &conv2d_relu_lrn_max_pool2d);
  m.def("test_kernels", [] { return names(test_kernels()); });
  m.def("broken_kernels", [] { return names(broken_kernels()); });
  m.def("run_test_kernel", [](const std::string& name, const py::array& in, int64_t outputs) {
    return run_kernel(test_kernels(), name, in, outputs);
  });
  m.def("run_broken_kernel", [](const std::string& name, const py::array& in, int64_t outputs) {
    return run_kernel(broken_kernels(), name, in, outputs);
  });
}
