// What the ops of a recurrent layer share: its arguments, and its two passes on tensors, in plain
// or in dual numbers.
#pragma once

#include <Python.h>

#include "gemm/gemm.h"
#include "ops_common.h"
#include "rnn/rnn_layer.h"
#include "rnn/rnn_products.h"

#include <optional>
#include <utility>
#include <vector>

namespace weft::layer {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The cell of that name; throws where there is none.
LayerCell cell_of(c10::string_view name);

// A tensor and, in dual numbers, its derivative; either may be undefined.
struct Pair {
  Tensor value, derivative;
};

// Contiguous, and checked.
struct Arguments {
  LayerProblem p;
  Pair input, h0, c0, w_ih, w_hh, b_ih, b_hh, peephole, w_hr, norm_ih, norm_hh;
  Tensor lengths, resets, dropout, zone_h, zone_c;
};

// As they come from the dispatcher.
struct GivenMasks {
  const OptionalTensor &lengths, &resets, &dropout, &zone_h, &zone_c;
  double zoneout;
};
struct GivenLayer {
  const Tensor &input, &h0;
  const OptionalTensor& c0;
  const Tensor &w_ih, &w_hh;
  const OptionalTensor &b_ih, &b_hh, &peephole, &w_hr, &norm_ih, &norm_hh;
};

// Throws for arguments that do not fit.
Arguments arguments_of(const GivenLayer& given, const GivenMasks& masks, c10::string_view cell,
                       bool reverse);

struct Outputs {
  Pair output, h_n, c_n, cells, gates;
  Pair input_products, products;  // W_ih x and W_hh h before normalisation
};
Outputs run_forward(const Arguments& a, bool keep);

// The incoming gradients; undefined ones are zeros.
struct Seeds {
  Tensor output, h_n, c_n;
};
void check_seeds(const Arguments& a, const Seeds& seeds);

// grad_h, grad_c and grad_peephole are in the accumulation type.
struct Gradients {
  Pair sums, hidden_sums, h, c, peephole;
  Pair input_products, products;  // of W_ih x and W_hh h before normalisation; without it the sums'
  // What is added to these gradients: by each row [T, B, gates * H], or by some together [n, gates
  // * H], in the accumulation type.
  Pair norm_ih, norm_hh;
  Pair projected, unprojected;        // the two factors of W_hr's gradient
  Stacked before, before_derivative;  // the state before each step as the product sees it
  Tensor taken;  // which of the T * B rows have a step; undefined where all count

  // Those of `of` [T, B, columns], [n, columns]; gathered once.
  Tensor rows(const Tensor& of) const;

 private:
  mutable std::vector<std::pair<Tensor, Tensor>> gathered_;
};
Gradients run_backward(const Arguments& a, const Seeds& seeds, const Outputs& kept,
                       bool need_before);

// What backward is given of forward.
struct KeptOutputs {
  Tensor output, cells, gates, input_products, products;
};
// The gradients of the tensors of GivenLayer, in their order; undefined where not wanted.
inline constexpr size_t kLayerTensors = 11;
std::array<Tensor, kLayerTensors> layer_gradients(const Arguments& a, const Seeds& given,
                                                  const KeptOutputs& outputs,
                                                  const std::array<bool, kLayerTensors>& wanted);

// `input` [T, B, I] w^T, in the accumulation type, [T * B, rows of w].
Tensor wide_product(const Tensor& input, const Tensor& w);

// Products of the sums' gradients `of` [T, B, gates * H].
Tensor input_gradient(const Gradients& g, const Tensor& of, const Tensor& w_ih);
std::array<Tensor, 2> weight_gradients(const Gradients& g, const Tensor& of, const Stacked& first,
                                       const Stacked& second);
Tensor weight_gradient(const Gradients& g, const Tensor& of, const Stacked& factor);
// Of W_hh in whole: a GRU that resets before has two products. `of`, `before` and `kept` may be of
// different planes.
Tensor hidden_weight_gradient(const Arguments& a, const Gradients& g, const Tensor& of,
                              const Stacked& before, const Tensor& gates);
Tensor bias_gradient(const Gradients& g, const Tensor& of);
// Of rows [n, columns] in the accumulation type.
Tensor wide_gradient(const Arguments& a, const Tensor& of);
Tensor norm_gradient(const Arguments& a, const Gradients& g, const Tensor& of);

}  // namespace weft::layer

namespace weft {

PyMethodDef* eager_layers();

}  // namespace weft
