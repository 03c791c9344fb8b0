// The eager path of convolution (eager.h): forward and gradients of a convolution, and of the input
// gradient that a transposed convolution is.
#include "conv/conv_ops.h"
#include "eager.h"
#include "eager_arguments.h"

namespace weft {
namespace {

using at::DimVector;
using at::IntArrayRef;
using at::Tensor;

std::optional<Tensor> if_defined(const Tensor& t) {
  return t.defined() ? std::optional<Tensor>(t) : std::nullopt;
}

// The window arguments, each a tuple: stride, padding, dilation, and groups.
struct WindowArguments {
  static constexpr size_t kCount = 4;

  Ints stride, padding, dilation;
  int64_t groups = 1;

  bool read(PyObject* const* options) {
    return read_ints(options[0], stride) && read_ints(options[1], padding) &&
           read_ints(options[2], dilation) && read_int(options[3], groups);
  }
  py::object described() const {
    return py::module_::import("weft.conv")
        .attr("ConvWindow")(as_tuple(stride.all()), as_tuple(padding.all()),
                            as_tuple(dilation.all()), groups);
  }

  Tensor fprop(const Tensor& x, const Tensor& w, const Tensor& bias) const {
    return conv(x, w, if_defined(bias), stride.all(), padding.all(), dilation.all(), groups);
  }
  Tensor dgrad(const Tensor& gy, const Tensor& w, const Tensor& bias, IntArrayRef size) const {
    return conv_dgrad(gy, w, if_defined(bias), size, stride.all(), padding.all(), dilation.all(),
                      groups);
  }
  std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& x, const Tensor& gy, const Tensor& w,
                                              bool bias) const {
    return conv_backward(x, gy, w, std::nullopt, "none", 0, bias, stride.all(), padding.all(),
                         dilation.all(), groups);
  }
  Tensor wgrad(const Tensor& x, const Tensor& gy, IntArrayRef size) const {
    return conv_wgrad(x, gy, size, stride.all(), padding.all(), dilation.all(), groups);
  }
};

// Of x or gy, the weights and the bias.
struct ConvOp {
  static constexpr const char* kModule = "weft.conv";
  static constexpr size_t kTensors = 3, kReturned = 1;
  using In = std::array<Tensor, kTensors>;

  WindowArguments window;
  DimVector weight_size;

  static void check(const In& in) {
    TORCH_CHECK_TYPE(in[0].defined() && in[1].defined(),
                     "convolution: input and weight must be Tensors, not None");
  }
  variable_list saved(const In& in, const variable_list&,
                      const std::array<bool, kTensors>& needed) const {
    return {needed[1] ? in[0] : Tensor(), needed[0] ? in[1] : Tensor()};
  }
};

struct Conv : ConvOp {
  static constexpr const char* kFunction = "Conv";
  static constexpr size_t kOptions = WindowArguments::kCount;

  DimVector input_size;

  bool read(PyObject* const* options) { return window.read(options); }
  void attributes(py::dict& ctx) const {
    ctx["sizes"] = py::make_tuple(as_tuple(input_size), as_tuple(weight_size));
    ctx["window"] = window.described();
  }
  variable_list forward(const In& in, bool) {
    check(in);
    input_size = in[0].sizes();
    weight_size = in[1].sizes();
    return {window.fprop(in[0], in[1], in[2])};
  }
  variable_list gradients(const variable_list& saved, const variable_list& grads,
                          const std::vector<bool>& wanted) const {
    const Tensor& gy = grads[0];
    variable_list found(kTensors);
    if (wanted[0] && wanted[1]) {
      std::tie(found[0], found[1], found[2]) = window.backward(saved[0], gy, saved[1], wanted[2]);
      if (!wanted[2]) found[2] = Tensor();
      return found;
    }
    if (wanted[0]) found[0] = window.dgrad(gy, saved[1], Tensor(), input_size);
    if (wanted[1]) found[1] = window.wgrad(saved[0], gy, weight_size);
    // A convolution of no channels makes none, and leaves its bias alone.
    if (wanted[2])
      found[2] = weight_size[1] > 0 ? conv_bias_grad(gy) : gy.new_zeros({weight_size[0]});
    return found;
  }
};

struct ConvDgrad : ConvOp {
  static constexpr const char* kFunction = "ConvDgrad";
  static constexpr size_t kOptions = 1 + WindowArguments::kCount;

  Ints input_size;

  bool read(PyObject* const* options) {
    return read_ints(options[0], input_size) && window.read(options + 1);
  }
  void attributes(py::dict& ctx) const {
    ctx["weight_size"] = as_tuple(weight_size);
    ctx["window"] = window.described();
  }
  variable_list forward(const In& in, bool) {
    check(in);
    weight_size = in[1].sizes();
    return {window.dgrad(in[0], in[1], in[2], input_size.all())};
  }
  variable_list gradients(const variable_list& saved, const variable_list& grads,
                          const std::vector<bool>& wanted) const {
    const Tensor& cotangent = grads[0];
    variable_list found(kTensors);
    if (wanted[0]) found[0] = window.fprop(cotangent, saved[1], Tensor());
    if (wanted[1]) found[1] = window.wgrad(cotangent, saved[0], weight_size);
    if (wanted[2]) found[2] = conv_bias_grad(cotangent);
    return found;
  }
};

}  // namespace

PyMethodDef* eager_convolution() {
  static PyMethodDef methods[] = {eager_method<Conv>("conv"),
                                  eager_method<ConvDgrad>("conv_dgrad"),
                                  {nullptr, nullptr, 0, nullptr}};
  return methods;
}

}  // namespace weft
