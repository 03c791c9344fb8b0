// The cell ops, as the dispatcher and the eager path (rnn_eager_ops.cpp) run them.
#pragma once

#include <Python.h>

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

namespace weft {

using OptionalTensor = std::optional<at::Tensor>;

// (h', c', kept gates)
std::tuple<at::Tensor, at::Tensor, at::Tensor> lstm_cell(
    const at::Tensor& input, const at::Tensor& h, const at::Tensor& c, const at::Tensor& w_ih,
    const at::Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
    bool keep_gates);

// Those gradients of (input, h, c, w_ih, w_hh, both biases) that are wanted.
std::vector<at::Tensor> lstm_cell_gradients(const OptionalTensor& grad_h,
                                            const OptionalTensor& grad_c, const at::Tensor& gates,
                                            const OptionalTensor& input, const OptionalTensor& h,
                                            const at::Tensor& c, const at::Tensor& c_next,
                                            const OptionalTensor& w_ih, const OptionalTensor& w_hh,
                                            std::array<bool, 6> wanted);

// (h', kept gates)
std::tuple<at::Tensor, at::Tensor> gru_cell(const at::Tensor& input, const at::Tensor& h,
                                            const at::Tensor& w_ih, const at::Tensor& w_hh,
                                            const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                                            bool keep_gates);

// Those gradients of (input, h, w_ih, w_hh, b_ih, b_hh) that are wanted.
std::vector<at::Tensor> gru_cell_gradients(const at::Tensor& grad_h, const at::Tensor& gates,
                                           const OptionalTensor& input, const at::Tensor& h,
                                           const OptionalTensor& w_ih, const OptionalTensor& w_hh,
                                           std::array<bool, 6> wanted);

// h'
at::Tensor rnn_cell(const at::Tensor& input, const at::Tensor& h, const at::Tensor& w_ih,
                    const at::Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                    bool relu);

// Those gradients of (input, h, w_ih, w_hh, both biases) that are wanted.
std::vector<at::Tensor> rnn_cell_gradients(const at::Tensor& grad_h, const at::Tensor& h_next,
                                           const OptionalTensor& input, const OptionalTensor& h,
                                           const OptionalTensor& w_ih, const OptionalTensor& w_hh,
                                           bool relu, std::array<bool, 5> wanted);

// The eager path's functions, ended by a row of nulls.
PyMethodDef* eager_cells();

}  // namespace weft
