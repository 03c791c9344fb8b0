// The eager path of convolution (eager.h): forward and gradients of a convolution, with its
// activation or without, and of the input gradient that a transposed convolution is.
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

constexpr const char* kConvModule = "weft.conv_ops";

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
    return py::module_::import(kConvModule)
        .attr("ConvWindow")(as_tuple(stride.all()), as_tuple(padding.all()),
                            as_tuple(dilation.all()), groups);
  }

  Tensor fprop(const Tensor& x, const Tensor& w, const Tensor& bias,
               c10::string_view activation = "none", double slope = 0) const {
    return conv_activated(x, w, if_defined(bias), activation, slope, stride.all(), padding.all(),
                          dilation.all(), groups);
  }
  Tensor dgrad(const Tensor& gy, const Tensor& w, const Tensor& bias, IntArrayRef size) const {
    return conv_dgrad(gy, w, if_defined(bias), size, stride.all(), padding.all(), dilation.all(),
                      groups);
  }
  Tensor wgrad(const Tensor& x, const Tensor& gy, IntArrayRef size) const {
    return conv_wgrad(x, gy, size, stride.all(), padding.all(), dilation.all(), groups);
  }
  std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& x, const Tensor& gy, const Tensor& w,
                                              const Tensor& y, c10::string_view activation,
                                              double slope, bool bias) const {
    return conv_backward(x, gy, w, if_defined(y), activation, slope, bias, stride.all(),
                         padding.all(), dilation.all(), groups);
  }
};

// Of x or gy, the weights and the bias.
struct ConvOp {
  static constexpr const char* kModule = kConvModule;
  static constexpr size_t kTensors = 3, kReturned = 1, kDifferentiable = 1;
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

// y = activation(x ⋆ w + bias).
struct Convolved : ConvOp {
  DimVector input_size;
  std::string activation = "none";
  double slope = 0;

  variable_list forward(const In& in, bool) {
    check(in);
    input_size = in[0].sizes();
    weight_size = in[1].sizes();
    return {window.fprop(in[0], in[1], in[2], activation, slope)};
  }
  void attributes(py::dict& ctx) const {
    ctx["sizes"] = py::make_tuple(as_tuple(input_size), as_tuple(weight_size));
    ctx["window"] = window.described();
  }
  // `y` is undefined without an activation.
  variable_list gradients_of(const Tensor& x, const Tensor& w, const Tensor& y, const Tensor& grad,
                             const std::vector<bool>& wanted) const {
    variable_list found(kTensors);
    if (wanted[0] && wanted[1]) {
      std::tie(found[0], found[1], found[2]) =
          window.backward(x, grad, w, y, activation, slope, wanted[2]);
      if (!wanted[2]) found[2] = Tensor();
      return found;
    }
    const Tensor gy = y.defined() ? conv_sum_gradient(grad, y, activation, slope) : grad;
    if (wanted[0]) found[0] = window.dgrad(gy, w, Tensor(), input_size);
    if (wanted[1]) found[1] = window.wgrad(x, gy, weight_size);
    if (wanted[2]) found[2] = conv_bias_gradient(gy, weight_size);
    return found;
  }
};

struct Conv : Convolved {
  static constexpr const char* kFunction = "Conv";
  static constexpr size_t kOptions = WindowArguments::kCount;

  bool read(PyObject* const* options) { return window.read(options); }
  variable_list gradients(const variable_list& saved, const variable_list& grads,
                          const std::vector<bool>& wanted) const {
    return gradients_of(saved[0], saved[1], Tensor(), grads[0], wanted);
  }
};

struct ConvActivated : Convolved {
  static constexpr const char* kFunction = "ConvActivated";
  static constexpr size_t kOptions = 2 + WindowArguments::kCount;

  bool read(PyObject* const* options) {
    return read_name(options[0], activation) && activation != "none" &&
           read_number(options[1], slope) && window.read(options + 2);
  }
  void attributes(py::dict& ctx) const {
    Convolved::attributes(ctx);
    ctx["activation"] = activation;
    ctx["slope"] = slope;
  }
  variable_list saved(const In& in, const variable_list& outputs,
                      const std::array<bool, kTensors>& needed) const {
    variable_list tensors = ConvOp::saved(in, outputs, needed);
    tensors.push_back(outputs[0]);
    return tensors;
  }
  variable_list gradients(const variable_list& saved, const variable_list& grads,
                          const std::vector<bool>& wanted) const {
    return gradients_of(saved[0], saved[1], saved[2], grads[0], wanted);
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
                                  eager_method<ConvActivated>("conv_activated"),
                                  eager_method<ConvDgrad>("conv_dgrad"),
                                  {nullptr, nullptr, 0, nullptr}};
  return methods;
}

}  // namespace weft
