// The eager path of a recurrent layer (eager.h): what it keeps for backward, and its gradients.
#include "eager.h"
#include "eager_arguments.h"
#include "rnn/rnn_layer_ops.h"

#include <algorithm>

namespace weft {
namespace {

using at::Tensor;
using namespace layer;

// (output, h_n, c_n) of one direction of one layer. The tensors are those of GivenLayer, then those
// of GivenMasks, which have no gradients.
struct RnnLayer {
  static constexpr const char *kModule = "weft.rnn_layer", *kFunction = "RNNLayer";
  static constexpr size_t kTensors = kLayerTensors + 5, kOptions = 4;
  static constexpr size_t kReturned = 3, kDifferentiable = 3;
  using In = std::array<Tensor, kTensors>;

  double zoneout = 0;
  std::string cell;
  bool reverse = false, recompute = false;

  bool read(PyObject* const* options) {
    return read_number(options[0], zoneout) && read_name(options[1], cell) &&
           read_flag(options[2], reverse) && read_flag(options[3], recompute);
  }
  void attributes(py::dict& ctx) const {
    ctx["zoneout"] = zoneout;
    ctx["cell"] = cell;
    ctx["reverse"] = reverse;
    ctx["recompute"] = recompute;
  }

  template <class Tensors>
  Arguments arguments(const Tensors& in) const {
    for (const size_t i : {0, 1, 3, 4})
      TORCH_CHECK_TYPE(in[i].defined(),
                       "weft::rnn_layer: input, h0, weight_ih and weight_hh must "
                       "be Tensors, not None");
    std::array<OptionalTensor, kTensors> given;
    for (size_t i = 0; i < kTensors; ++i)
      if (in[i].defined()) given[i] = in[i];
    return arguments_of({in[0], in[1], given[2], in[3], in[4], given[5], given[6], given[7],
                         given[8], given[9], given[10]},
                        {given[11], given[12], given[13], given[14], given[15], zoneout}, cell,
                        reverse);
  }
  static variable_list all(const Outputs& r) {
    return {r.output.value,         r.h_n.value,     r.c_n.value, r.cells.value, r.gates.value,
            r.input_products.value, r.products.value};
  }

  variable_list forward(const In& in, bool keep) const {
    return all(run_forward(arguments(in), keep && !recompute));
  }
  variable_list saved(const In& in, const variable_list& out,
                      const std::array<bool, kTensors>&) const {
    variable_list tensors(in.begin(), in.end());
    if (!recompute) {
      tensors.push_back(out[0]);
      tensors.insert(tensors.end(), out.begin() + kReturned, out.end());
    }
    return tensors;
  }
  variable_list gradients(const variable_list& s, const variable_list& grads,
                          const std::vector<bool>& wanted) const {
    const Arguments a = arguments(s);
    const variable_list made = recompute ? all(run_forward(a, true)) : variable_list();
    const Tensor& output = recompute ? made[0] : s[kTensors];
    const Tensor* kept = recompute ? &made[kReturned] : &s[kTensors + 1];
    std::array<bool, kLayerTensors> asked;
    std::copy_n(wanted.begin(), asked.size(), asked.begin());
    const auto found =
        layer_gradients(a, {grads[0], grads[1], a.p.has_cell() ? grads[2] : Tensor()},
                        {output, kept[0], kept[1], kept[2], kept[3]}, asked);
    variable_list result(kTensors);
    std::copy(found.begin(), found.end(), result.begin());
    return result;
  }
};

}  // namespace

PyMethodDef* eager_layers() {
  static PyMethodDef methods[] = {eager_method<RnnLayer>("rnn_layer"),
                                  {nullptr, nullptr, 0, nullptr}};
  return methods;
}

}  // namespace weft
