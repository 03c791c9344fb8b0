// The arguments of a recurrent layer's ops: checked, contiguous, and the problem that they are.
#include "rnn/rnn_layer_ops.h"

namespace weft::layer {

static const char* const kOp = "rnn_layer";

// ---- checks ------------------------------------------------------------------------------------

LayerCell cell_of(c10::string_view name) {
  if (name == "lstm") return LayerCell::lstm;
  if (name == "lstm_peephole") return LayerCell::lstm_peephole;
  if (name == "lstm_peephole_previous") return LayerCell::lstm_peephole_previous;
  if (name == "lstm_coupled") return LayerCell::lstm_coupled;
  if (name == "gru") return LayerCell::gru;
  if (name == "gru_reset_before") return LayerCell::gru_reset_before;
  if (name == "rnn_tanh") return LayerCell::tanh;
  if (name == "rnn_relu") return LayerCell::relu;
  TORCH_CHECK_VALUE(false, "weft::", kOp,
                    ": cell must be 'lstm', 'lstm_peephole', 'lstm_peephole_previous', "
                    "'lstm_coupled', 'gru', 'gru_reset_before', 'rnn_tanh' or 'rnn_relu', got '",
                    name, "'");
}

namespace {

void check_sizes(const Tensor& t, at::IntArrayRef expected, const Tensor& reference,
                 const char* name) {
  TORCH_CHECK(t.sizes() == expected, "weft::", kOp, ": ", name, " must be ", expected, ", got ",
              t.sizes());
  check_same(t, reference, kOp, name);
}

void check_sizes(const OptionalTensor& t, at::IntArrayRef expected, const Tensor& reference,
                 const char* name) {
  if (t) check_sizes(*t, expected, reference, name);
}

// A mask of another dtype than the input's.
void check_mask(const OptionalTensor& t, at::IntArrayRef expected, at::ScalarType dtype,
                const Tensor& input, const char* name) {
  if (!t) return;
  TORCH_CHECK(t->scalar_type() == dtype, "weft::", kOp, ": ", name, " must be of dtype ",
              dtype == at::kLong ? "int64" : "bool", ", got ", toString(t->scalar_type()));
  TORCH_CHECK(t->sizes() == expected, "weft::", kOp, ": ", name, " must be ", expected, ", got ",
              t->sizes());
  TORCH_CHECK(t->device() == input.device(), "weft::", kOp, ": expected ", name, " on ",
              input.device(), ", got ", t->device());
}

// On CUDA the values would have to be waited for.
void check_range(const Tensor& lengths, int64_t steps) {
  if (!lengths.defined() || !lengths.is_cpu()) return;
  const auto* values = lengths.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < lengths.numel(); ++row)
    TORCH_CHECK(values[row] >= 0 && values[row] <= steps, "weft::", kOp,
                ": lengths must be between 0 and the number of steps, ", steps, ", got ",
                values[row], " for row ", row);
}

Tensor contiguous(const OptionalTensor& t) { return t ? t->contiguous() : Tensor(); }

}  // namespace

// ---- arguments ---------------------------------------------------------------------------------

Arguments arguments_of(const GivenLayer& given, const GivenMasks& masks, c10::string_view cell,
                       bool reverse) {
  const Tensor& input = given.input;
  TORCH_CHECK(input.dim() == 3, "weft::", kOp, ": input must be [steps, batch, input_size], got ",
              input.sizes());
  TORCH_CHECK(given.w_hh.dim() == 2, "weft::", kOp, ": weight_hh must be a matrix, got ",
              given.w_hh.sizes());
  Arguments a;
  LayerProblem& p = a.p;
  p.dtype = dtype_of(input, kOp, "input");
  p.cell = cell_of(cell);
  p.steps = input.size(0), p.batch = input.size(1), p.hidden = given.w_hh.size(0) / p.gates();
  if (given.w_hr) {
    TORCH_CHECK(p.has_cell() && given.w_hr->dim() == 2 && given.w_hr->size(0) > 0, "weft::", kOp,
                ": weight_hr must be a matrix, and is for an LSTM, got ", given.w_hr->sizes());
    p.projection = given.w_hr->size(0);
  } else {
    p.hidden = given.w_hh.size(1);
  }
  p.reverse = reverse;
  p.zoneout = masks.zoneout;
  const int64_t rows = p.gates() * p.hidden;
  const std::array<int64_t, 2> state = {p.batch, p.state()}, cell_state = {p.batch, p.hidden};
  check_sizes(given.w_ih, {rows, input.size(2)}, input, "weight_ih");
  check_sizes(given.w_hh, {rows, p.state()}, input, "weight_hh");
  check_sizes(given.w_hr, {p.projection, p.hidden}, input, "weight_hr");
  check_sizes(given.b_ih, {rows}, input, "bias_ih");
  check_sizes(given.b_hh, {rows}, input, "bias_hh");
  check_sizes(given.h0, state, input, "h0");
  TORCH_CHECK(given.c0.has_value() == p.has_cell(), "weft::", kOp,
              ": c0 is for an LSTM, and an LSTM needs it");
  check_sizes(given.c0, cell_state, input, "c0");
  TORCH_CHECK(given.peephole.has_value() == p.has_peephole(), "weft::", kOp,
              ": weight_peephole is for a cell with peepholes, and such a cell needs it");
  check_sizes(given.peephole, {3 * p.hidden}, input, "weight_peephole");
  TORCH_CHECK(given.norm_ih.has_value() == given.norm_hh.has_value(), "weft::", kOp,
              ": weight_norm_ih and weight_norm_hh go together, got one of them");
  check_sizes(given.norm_ih, {rows}, input, "weight_norm_ih");
  check_sizes(given.norm_hh, {rows}, input, "weight_norm_hh");
  check_mask(masks.lengths, {p.batch}, at::kLong, input, "lengths");
  check_mask(masks.resets, {p.steps, p.batch}, at::kBool, input, "resets");
  check_sizes(masks.dropout, state, input, "the mask of recurrent_dropout");
  check_sizes(masks.zone_h, {p.steps, p.batch, p.state()}, input, "zoneout's mask of h");
  check_sizes(masks.zone_c, {p.steps, p.batch, p.hidden}, input, "zoneout's mask of c");
  TORCH_CHECK_VALUE(p.zoneout >= 0 && p.zoneout <= 1, "weft::", kOp,
                    ": zoneout must be between 0 and 1, got ", p.zoneout);

  a.input.value = input.contiguous(), a.h0.value = given.h0.contiguous();
  a.c0.value = contiguous(given.c0);
  a.w_ih.value = given.w_ih.contiguous(), a.w_hh.value = given.w_hh.contiguous();
  a.b_ih.value = contiguous(given.b_ih), a.b_hh.value = contiguous(given.b_hh);
  a.peephole.value = contiguous(given.peephole), a.w_hr.value = contiguous(given.w_hr);
  a.norm_ih.value = contiguous(given.norm_ih), a.norm_hh.value = contiguous(given.norm_hh);
  a.lengths = contiguous(masks.lengths), a.resets = contiguous(masks.resets);
  a.dropout = contiguous(masks.dropout);
  a.zone_h = contiguous(masks.zone_h), a.zone_c = contiguous(masks.zone_c);
  check_range(a.lengths, p.steps);
  return a;
}

void check_seeds(const Arguments& a, const Seeds& seeds) {
  const auto check = [&](const Tensor& t, at::IntArrayRef sizes, const char* name) {
    if (t.defined()) check_sizes(t, sizes, a.input.value, name);
  };
  check(seeds.output, {a.p.steps, a.p.batch, a.p.state()}, "grad_output");
  check(seeds.h_n, {a.p.batch, a.p.state()}, "grad_h_n");
  check(seeds.c_n, {a.p.batch, a.p.hidden}, "grad_c_n");
}

}  // namespace weft::layer
