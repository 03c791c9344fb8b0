// The gradients of a CNN's layer: of its map, from what was kept of it, and all of them at once.
#include <c10/core/DeviceGuard.h>

#include "block/block_ops.h"
#include "core/parallel.h"
#include "ops_common.h"

namespace weft {
namespace {

using at::IntArrayRef;
using at::Tensor;

void note(const PoolProblem& p, const SignRows& rows, const BlockGradPlan& plan, int64_t tasks) {
  Plan noted;
  noted.kernel = "conv_pooled_grad";
  noted.path = p.inner > 1 ? "bands" : "planes";
  noted.tile = {{p.inner > 1 ? "rows" : "planes", plan.step}};
  noted.threads = static_cast<int>(tasks);
  noted.least_bytes =
      (p.in_elements() + p.out_elements()) * size_of(p.dtype) + rows.rows * rows.bytes();
  noted.bytes = noted.least_bytes;
  noted.flops = p.in_elements() + p.out_elements() * p.window_elements();
  note_plan(std::move(noted));
}

// The gradient of the sum that an average of `size` with its activation was made of, from the signs
// that conv_pooled kept.
Tensor conv_pooled_grad(const Tensor& grad, const Tensor& signs, IntArrayRef size,
                        c10::string_view activation, double slope, IntArrayRef pool_size,
                        IntArrayRef pool_stride, IntArrayRef pool_padding, bool channels_last) {
  const auto rank = static_cast<int>(size.size()) - 2;
  const char* op = "conv_pooled_grad";
  const Activation kind = activation_of(activation, slope);
  TORCH_CHECK_VALUE(block_has_signs(kind), op,
                    ": expected activation to be relu or leaky_relu, got ", activation);
  const std::vector<int64_t> once(pool_size.size(), 1);
  const PoolRequest request = avg_windows(size, {pool_size, pool_stride, pool_padding, once, false},
                                          true, {}, {"avg_pool", rank, "_backward"});
  TORCH_CHECK(grad.sizes() == IntArrayRef(request.output_sizes), op, ": expected grad of size ",
              IntArrayRef(request.output_sizes), ", got ", grad.sizes());
  PoolProblem p = request.problem;
  p.dtype = dtype_of(grad, op, "grad");
  p.divisor = p.window_elements();
  p.outer = channels_last ? size[0] : size[0] * size[1];
  p.inner = channels_last ? size[1] : 1;
  const SignRows rows = sign_rows(p, channels_last, kind, slope);
  TORCH_CHECK(signs.scalar_type() == at::kByte && signs.is_contiguous() &&
                  signs.sizes() == IntArrayRef({rows.rows, rows.bytes()}),
              op, ": expected contiguous uint8 signs of size [", rows.rows, ", ", rows.bytes(),
              "], got ", signs.scalar_type(), " of size ", signs.sizes());
  TORCH_CHECK(signs.device() == grad.device(), op, ": expected signs on ", grad.device(),
              " as grad is, got ", signs.device());
  const auto* const bits = static_cast<const uint8_t*>(signs.const_data_ptr());
  const c10::DeviceGuard guard(grad.device());
  if (!is_cpu(planning() ? planned_target() : target_for(grad))) {
    Tensor gx = mean_gradient(request, grad, channels_last);
    if (gx.numel() > 0 && !planning())
      kernels_for(gx, block_kernels_for)
          .pass_signs(rows, bits, gx.mutable_data_ptr(), context_for(gx));
    return gx;
  }
  const auto format = !channels_last ? at::MemoryFormat::Contiguous
                      : rank == 3    ? at::MemoryFormat::ChannelsLast3d
                                     : at::MemoryFormat::ChannelsLast;
  const Tensor gy = grad.contiguous(format);
  Tensor gx = empty_output(gy, size, format);
  if (p.in_elements() == 0) return gx;
  const BlockGradPlan plan = plan_block_grad(p, channels_last);
  const int64_t tasks = channels_last ? p.outer * plan.parts : plan.parts;
  if (planning()) {
    note(p, rows, plan, tasks);
    return gx;
  }
  const auto& kernels = kernels_for(gy, pool_kernels_for);
  const auto& sign_kernels = kernels_for(gy, block_kernels_for);
  const int64_t element = size_of(p.dtype);
  const auto* const from = static_cast<const char*>(gy.const_data_ptr());
  auto* const to = static_cast<char*>(gx.mutable_data_ptr());
  parallel_for(context_for(gy), tasks, 1, [&](int64_t begin, int64_t end) {
    const Context alone;
    for (int64_t task = begin; task < end; ++task) {
      const BlockGradPart part = grad_part_of(p, plan, channels_last, task);
      SignRows of_part = rows;
      of_part.rows = part.signs;
      char* const out = to + part.x * element;
      if (part.pool.out_elements() == 0) {  // between two windows
        memset(out, 0, part.pool.in_elements() * element);
        continue;
      }
      kernels.avg_backward(part.pool, from + part.y * element, out, alone);
      sign_kernels.pass_signs(of_part, bits + part.sign * rows.bytes(), out, alone);
    }
  });
  return gx;
}

void note(const BlockProblem& b) {
  const ConvProblem& p = b.conv;
  const int64_t pooled = b.pool.out_elements();
  Plan noted;
  noted.kernel = "conv_pooled_backward";
  noted.path = "made";
  noted.least_bytes =
      (2 * (p.in_elements() + p.weight_elements()) + pooled) * size_of(p.dtype) +
      (b.maximum ? pooled * (b.pool.place_bytes() + size_of(p.dtype)) : p.out_elements() / 8);
  noted.bytes = noted.least_bytes;
  noted.flops = conv_flops(p, ConvStep::backward) + pooled * b.pool.window_elements();
  note_plan(std::move(noted));
}

// The gradients of input, weight and bias, of which the last is empty without one. `kept` comes
// from conv_pooled; `output`, which maxima need where there is an activation, too.
std::tuple<Tensor, Tensor, Tensor> conv_pooled_backward(
    const Tensor& input, const Tensor& grad, const Tensor& weight, const Tensor& kept,
    const std::optional<Tensor>& output, c10::string_view activation, double slope, bool bias,
    IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups,
    c10::string_view pooling, IntArrayRef pool_size, IntArrayRef pool_stride,
    IntArrayRef pool_padding) {
  const char* op = "conv_pooled_backward";
  const ConvRequest conv = conv_request(input, weight, std::nullopt, activation, slope, stride,
                                        padding, dilation, groups);
  BlockRequest block = block_request(conv, pooling, pool_size, pool_stride, pool_padding);
  const BlockProblem& b = block.problem;
  const bool last = b.conv.channels_last;
  TORCH_CHECK(output.has_value() == (b.maximum && b.conv.activation != Activation::none), op,
              ": output is expected of maxima where there is an activation, and only there");
  const Target target = planning() ? planned_target() : target_for(input);
  if (!is_cpu(target) || !block_fuses_backward(b)) {
    const Tensor sum = output ? conv_sum_gradient(grad, *output, activation, slope) : grad;
    const Tensor map = b.maximum ? max_gradient(std::move(block.pool), sum, kept, last)
                                 : conv_pooled_grad(grad, kept, conv.output_size, activation, slope,
                                                    pool_size, pool_stride, pool_padding, last);
    return conv_backward(input, map, weight, std::nullopt, "none", 0, bias, stride, padding,
                         dilation, groups);
  }
  const IntArrayRef size = block.pool.output_sizes;
  const auto check = [&](const Tensor& t, const char* argument) {
    check_same(t, input, op, argument);
    TORCH_CHECK(t.sizes() == size, op, ": expected ", argument, " of size ", size, ", got ",
                t.sizes());
  };
  check(grad, "grad");
  if (output) check(*output, "output");
  const SignRows signs = sign_rows(b.pool, last, b.conv.activation, b.conv.slope);
  const std::vector<int64_t> sign_size = {signs.rows, signs.bytes()};
  const auto kept_type = b.maximum && b.pool.place_bytes() > 1 ? at::kInt : at::kByte;
  TORCH_CHECK(kept.scalar_type() == kept_type && kept.sizes() == (b.maximum ? size : sign_size) &&
                  kept.device() == input.device(),
              op, ": expected kept to come from conv_pooled with the same arguments, got ",
              kept.scalar_type(), " of size ", kept.sizes(), " on ", kept.device());
  const Tensor gy = grad.contiguous(), places = kept.contiguous();
  const Tensor y = output ? output->contiguous() : Tensor();
  Tensor gx = empty_output(gy, input.sizes());
  Tensor gw = empty_output(gy, weight.sizes());
  Tensor gb = empty_output(gy, {bias ? b.conv.out_channels() : 0});
  if (planning()) {
    note(b);
    return {gx, gw, gb};
  }
  kernels_for(input, block_kernels_for)
      .backward(b,
                {conv.x.const_data_ptr(), gy.const_data_ptr(), conv.w.const_data_ptr(),
                 output ? y.const_data_ptr() : nullptr,
                 static_cast<const uint8_t*>(places.const_data_ptr()), gx.mutable_data_ptr(),
                 gw.mutable_data_ptr(), bias ? gb.mutable_data_ptr() : nullptr},
                context_for(input));
  return {gx, gw, gb};
}

[[maybe_unused]] const bool plans_registered =
    register_planned_ops({"conv_pooled_grad", "conv_pooled_backward"});

}  // namespace

TORCH_LIBRARY_FRAGMENT(weft, m) {
  m.def(
      "conv_pooled_grad(Tensor grad, Tensor signs, SymInt[] size, str activation, float slope, "
      "int[] pool_size, int[] pool_stride, int[] pool_padding, bool channels_last) -> Tensor");
  m.def(
      "conv_pooled_backward(Tensor input, Tensor grad, Tensor weight, Tensor kept, Tensor? output, "
      "str activation, float slope, bool bias, int[] stride, int[] padding, int[] dilation, int "
      "groups, str pooling, int[] pool_size, int[] pool_stride, int[] pool_padding) -> (Tensor, "
      "Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(weft, CPU, m) {
  m.impl("conv_pooled_grad", conv_pooled_grad);
  m.impl("conv_pooled_backward", conv_pooled_backward);
}
TORCH_LIBRARY_IMPL(weft, CUDA, m) {
  m.impl("conv_pooled_grad", conv_pooled_grad);
  m.impl("conv_pooled_backward", conv_pooled_backward);
}

}  // namespace weft
