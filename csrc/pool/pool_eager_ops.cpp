// The eager path of pooling (eager.h): the window arguments as Python has them, forward, gradient.
#include "eager.h"
#include "eager_arguments.h"
#include "pool/pool_ops.h"

#include <utility>

namespace weft {
namespace {

using at::IntArrayRef;
using at::Tensor;

// What `gradients` and Python's backward need to know of the input and its windows.
struct Pool {
  static constexpr const char* kModule = "weft.pool_ops";
  static constexpr size_t kTensors = 1, kReturned = 1, kDifferentiable = 1;
  using In = std::array<Tensor, kTensors>;

  PoolRequest request;
  bool channels_last = false;

  void remember(const Tensor& input, PoolRequest of_input) {
    request = std::move(of_input);
    channels_last = is_channels_last(input, request.op.rank);
  }
  static IntArrayRef sizes_of(const In& in) {
    TORCH_CHECK_TYPE(in[0].defined(), "pooling: input must be a Tensor, not None");
    return in[0].sizes();
  }
  template <class... Arguments>
  void describe(py::dict& ctx, const char* window, Arguments&&... arguments) const {
    ctx["layout"] = py::make_tuple(as_tuple(request.input_sizes), channels_last);
    ctx["window"] =
        py::module_::import(kModule).attr(window)(std::forward<Arguments>(arguments)...);
  }
};

struct MaxOfWindows : Pool {
  static constexpr const char* kFunction = "MaxPool";

  static variable_list kept(const PoolRequest& request, const Tensor& input, bool keep) {
    auto [y, places] = max_of(request, input, keep);
    if (!keep) return {std::move(y)};
    return {std::move(y), std::move(places)};
  }
  variable_list saved(const In&, const variable_list& out, const std::array<bool, 1>&) const {
    return {out[1]};
  }
  variable_list gradients(const variable_list& saved, const variable_list& grads,
                          const std::vector<bool>&) const {
    return {max_gradient(request, grads[0], saved[0], channels_last)};
  }
};

struct MeanOfWindows : Pool {
  static constexpr const char* kFunction = "AvgPool";

  variable_list saved(const In&, const variable_list&, const std::array<bool, 1>&) const {
    return {};
  }
  variable_list gradients(const variable_list&, const variable_list& grads,
                          const std::vector<bool>&) const {
    return {mean_gradient(request, grads[0], channels_last)};
  }
};

// rank, kernel_size, stride, padding, ... of fixed windows.
struct FixedWindows {
  int64_t rank = 0;
  Ints kernel_size, stride, padding;

  bool read(PyObject* const* options) {
    return read_int(options[0], rank) && rank >= 1 && rank <= 3 &&
           read_axes(options[1], rank, kernel_size) &&
           (Py_IsNone(options[2]) || read_axes(options[2], rank, stride)) &&
           read_axes(options[3], rank, padding);
  }
  OpName name(const char* stem) const { return {stem, static_cast<int>(rank)}; }
};

struct MaxPool : MaxOfWindows {
  static constexpr size_t kOptions = 6;  // ..., dilation, ceil_mode

  FixedWindows windows;
  Ints dilation;
  bool ceil_mode = false;

  bool read(PyObject* const* options) {
    return windows.read(options) && read_axes(options[4], windows.rank, dilation) &&
           read_flag(options[5], ceil_mode);
  }
  void attributes(py::dict& ctx) const {
    describe(ctx, "MaxWindow", as_tuple(windows.kernel_size.all()), as_tuple(windows.stride.all()),
             as_tuple(windows.padding.all()), as_tuple(dilation.all()), ceil_mode);
  }
  variable_list forward(const In& in, bool keep) {
    remember(in[0], max_windows(sizes_of(in),
                                {windows.kernel_size.all(), windows.stride.all(),
                                 windows.padding.all(), dilation.all(), ceil_mode},
                                windows.name("max_pool")));
    return kept(request, in[0], keep);
  }
};

struct AvgPool : MeanOfWindows {
  static constexpr size_t kOptions = 7;  // ..., ceil_mode, count_include_pad, divisor_override

  FixedWindows windows;
  bool ceil_mode = false, count_include_pad = true;
  std::optional<int64_t> divisor;

  bool read(PyObject* const* options) {
    return windows.read(options) && read_flag(options[4], ceil_mode) &&
           read_flag(options[5], count_include_pad) &&
           (Py_IsNone(options[6]) || read_int(options[6], divisor.emplace()));
  }
  void attributes(py::dict& ctx) const {
    describe(ctx, "AvgWindow", as_tuple(windows.kernel_size.all()), as_tuple(windows.stride.all()),
             as_tuple(windows.padding.all()), ceil_mode, count_include_pad, divisor);
  }
  variable_list forward(const In& in, bool) {
    static constexpr int64_t kNoDilation[] = {1};
    remember(in[0], avg_windows(sizes_of(in),
                                {windows.kernel_size.all(), windows.stride.all(),
                                 windows.padding.all(), kNoDilation, ceil_mode},
                                count_include_pad, divisor, windows.name("avg_pool")));
    return {mean_of(request, in[0])};
  }
};

// One int per axis.
struct OutputSize {
  Ints size;

  bool read(PyObject* const* options) {
    const Py_ssize_t rank = PyTuple_CheckExact(options[0]) ? PyTuple_GET_SIZE(options[0]) : 0;
    return rank >= 1 && rank <= 3 && read_axes(options[0], rank, size);
  }
  OpName name(const char* stem) const { return {stem, static_cast<int>(size.count)}; }
};

struct AdaptiveMaxPool : MaxOfWindows {
  static constexpr size_t kOptions = 1;

  OutputSize output;

  bool read(PyObject* const* options) { return output.read(options); }
  void attributes(py::dict& ctx) const {
    describe(ctx, "AdaptiveWindow", as_tuple(output.size.all()));
  }
  variable_list forward(const In& in, bool keep) {
    remember(in[0], adaptive_max_windows(sizes_of(in), output.size.all(),
                                         output.name("adaptive_max_pool")));
    return kept(request, in[0], keep);
  }
};

struct AdaptiveAvgPool : MeanOfWindows {
  static constexpr size_t kOptions = 1;

  OutputSize output;

  bool read(PyObject* const* options) { return output.read(options); }
  void attributes(py::dict& ctx) const {
    describe(ctx, "AdaptiveWindow", as_tuple(output.size.all()));
  }
  variable_list forward(const In& in, bool) {
    remember(in[0],
             adaptive_windows(sizes_of(in), output.size.all(), output.name("adaptive_avg_pool")));
    return {mean_of(request, in[0])};
  }
};

}  // namespace

PyMethodDef* eager_pooling() {
  static PyMethodDef methods[] = {eager_method<MaxPool>("max_pool"),
                                  eager_method<AvgPool>("avg_pool"),
                                  eager_method<AdaptiveMaxPool>("adaptive_max_pool"),
                                  eager_method<AdaptiveAvgPool>("adaptive_avg_pool"),
                                  {nullptr, nullptr, 0, nullptr}};
  return methods;
}

}  // namespace weft
