// The cells' eager path (eager.h): what each keeps for backward, and its gradients.
#include "eager.h"
#include "rnn/rnn_ops.h"

#include <ATen/ops/zeros_like.h>

#include <utility>

namespace weft {
namespace {

using at::Tensor;

OptionalTensor given(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }
Tensor kept_if(bool needed, const Tensor& t) { return needed ? t : Tensor(); }

// `found` has the wanted gradients alone; its place i is the one of argument i.
template <size_t N>
variable_list at_places(std::vector<Tensor> found, const std::array<bool, N>& wanted) {
  if (found.size() == N) return found;
  variable_list result(N);
  auto next = found.begin();
  for (size_t i = 0; i < N; ++i)
    if (wanted[i]) result[i] = std::move(*next++);
  return result;
}

// The two biases of a cell that adds them have one gradient: the last of `gradients`.
void for_both_biases(variable_list& gradients, const std::vector<bool>& wanted) {
  const Tensor gradient = gradients.back();
  const size_t bias = gradients.size() - 1;
  gradients.push_back(kept_if(wanted[bias + 1], gradient));
  if (!wanted[bias]) gradients[bias] = Tensor();
}

template <size_t N>
std::array<bool, N> with_one_bias(const std::vector<bool>& wanted) {
  std::array<bool, N> result;
  for (size_t i = 0; i < N; ++i) result[i] = wanted[i];
  result[N - 1] = wanted[N - 1] || wanted[N];
  return result;
}

struct Cell {
  static constexpr const char* kModule = "weft.rnn";
  static constexpr size_t kOptions = 0;

  bool read(PyObject* const*) { return true; }
  void attributes(py::dict&) const {}
};

struct LstmCell : Cell {
  static constexpr const char* kFunction = "LSTMCell";
  static constexpr size_t kTensors = 7, kReturned = 2, kDifferentiable = 3;
  using In = std::array<Tensor, kTensors>;

  variable_list forward(const In& in, bool keep) const {
    auto [h, c, gates] =
        lstm_cell(in[0], in[1], in[2], in[3], in[4], given(in[5]), given(in[6]), keep);
    return {std::move(h), std::move(c), std::move(gates)};
  }
  variable_list saved(const In& in, const variable_list& out,
                      const std::array<bool, kTensors>& needed) const {
    return {out[2],
            in[2],
            out[1],
            kept_if(needed[3], in[0]),
            kept_if(needed[4], in[1]),
            kept_if(needed[0], in[3]),
            kept_if(needed[1], in[4])};
  }
  variable_list gradients(const variable_list& s, const variable_list& grads,
                          const std::vector<bool>& wanted) const {
    const auto asked = with_one_bias<6>(wanted);
    variable_list result =
        at_places(lstm_cell_gradients(given(grads[0]), given(grads[1]), s[0], given(s[3]),
                                      given(s[4]), s[1], s[2], given(s[5]), given(s[6]), asked),
                  asked);
    for_both_biases(result, wanted);
    return result;
  }
};

struct GruCell : Cell {
  static constexpr const char* kFunction = "GRUCell";
  static constexpr size_t kTensors = 6, kReturned = 1, kDifferentiable = 2;
  using In = std::array<Tensor, kTensors>;

  variable_list forward(const In& in, bool keep) const {
    auto [h, gates] = gru_cell(in[0], in[1], in[2], in[3], given(in[4]), given(in[5]), keep);
    return {std::move(h), std::move(gates)};
  }
  variable_list saved(const In& in, const variable_list& out,
                      const std::array<bool, kTensors>& needed) const {
    return {out[1], in[1], kept_if(needed[2], in[0]), kept_if(needed[0], in[2]),
            kept_if(needed[1], in[3])};
  }
  variable_list gradients(const variable_list& s, const variable_list& grads,
                          const std::vector<bool>& wanted) const {
    std::array<bool, 6> asked;
    for (size_t i = 0; i < asked.size(); ++i) asked[i] = wanted[i];
    return at_places(
        gru_cell_gradients(grads[0], s[0], given(s[2]), s[1], given(s[3]), given(s[4]), asked),
        asked);
  }
};

struct RnnCell {
  static constexpr const char *kModule = "weft.rnn", *kFunction = "RNNCell";
  static constexpr size_t kTensors = 6, kOptions = 1, kReturned = 1, kDifferentiable = 1;
  using In = std::array<Tensor, kTensors>;

  bool relu = false;

  bool read(PyObject* const* options) {
    relu = options[0] == Py_True;
    return PyBool_Check(options[0]);
  }
  void attributes(py::dict& ctx) const { ctx["relu"] = relu; }

  variable_list forward(const In& in, bool) const {
    return {rnn_cell(in[0], in[1], in[2], in[3], given(in[4]), given(in[5]), relu)};
  }
  variable_list saved(const In& in, const variable_list& out,
                      const std::array<bool, kTensors>& needed) const {
    return {out[0], kept_if(needed[2], in[0]), kept_if(needed[3], in[1]), kept_if(needed[0], in[2]),
            kept_if(needed[1], in[3])};
  }
  variable_list gradients(const variable_list& s, const variable_list& grads,
                          const std::vector<bool>& wanted) const {
    const auto asked = with_one_bias<5>(wanted);
    variable_list result = at_places(rnn_cell_gradients(grads[0], s[0], given(s[1]), given(s[2]),
                                                        given(s[3]), given(s[4]), relu, asked),
                                     asked);
    for_both_biases(result, wanted);
    return result;
  }
};

}  // namespace

PyMethodDef* eager_cells() {
  static PyMethodDef methods[] = {eager_method<LstmCell>("lstm_cell"),
                                  eager_method<GruCell>("gru_cell"),
                                  eager_method<RnnCell>("rnn_cell"),
                                  {nullptr, nullptr, 0, nullptr}};
  return methods;
}

}  // namespace weft
