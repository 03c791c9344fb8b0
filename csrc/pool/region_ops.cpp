// Pooling over regions: check the arguments, complete them into a RegionProblem, run the kernel.
//
// `regions` turns the boxes that users give into whole positions, once; what differentiates and
// what pools again works on those.
#include "ops_common.h"
#include "pool/region.h"

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include <cmath>
#include <limits>

namespace weft {
namespace {

using at::IntArrayRef;
using at::Tensor;

constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();

// ---- boxes to regions ------------------------------------------------------------------------

// A coordinate of a box in positions of the map, before rounding, in the precision of the boxes.
double on_map(const Tensor& boxes, double coordinate, double scale) {
  if (boxes.scalar_type() == at::kDouble) return coordinate * scale;
  return static_cast<float>(coordinate) * static_cast<float>(scale);
}

Tensor regions(const Tensor& boxes, double spatial_scale, IntArrayRef input_size) {
  TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == kRegionNumbers,
              "roi_pool: boxes must be of size [K, 5] (image, x1, y1, x2, y2), got ",
              boxes.sizes());
  TORCH_CHECK(boxes.is_floating_point(), "roi_pool: boxes must be of a floating dtype, got ",
              toString(boxes.scalar_type()));
  TORCH_CHECK(input_size.size() == 4,
              "roi_pool: Expected 4D (batch mode) tensor, but got input of"
              " size ",
              input_size);
  TORCH_CHECK_VALUE(std::isfinite(spatial_scale) && spatial_scale > 0,
                    "roi_pool: spatial_scale must be positive and finite, got ", spatial_scale);
  // A few numbers: all that follows is done where the host can say what is wrong with them.
  const Tensor host = boxes.to(at::kCPU, at::kDouble).contiguous();
  const double* box = host.const_data_ptr<double>();
  Tensor result = at::empty({host.size(0), kRegionNumbers}, at::kLong);
  int64_t* region = result.mutable_data_ptr<int64_t>();
  for (int64_t k = 0; k < host.size(0); ++k, box += kRegionNumbers, region += kRegionNumbers) {
    for (int i = 0; i < kRegionNumbers; ++i)
      TORCH_CHECK_VALUE(std::isfinite(box[i]), "roi_pool: boxes must be finite, got ", box[i],
                        " in box ", k);
    TORCH_CHECK_INDEX(box[0] >= 0 && box[0] < static_cast<double>(input_size[0]), "roi_pool: box ",
                      k, " is of image ", box[0], ", but input has ", input_size[0]);
    region[0] = static_cast<int64_t>(box[0]);
    for (int axis = 0; axis < 2; ++axis) {  // y, x
      const double first = on_map(boxes, box[2 - axis], spatial_scale);
      const double last = on_map(boxes, box[4 - axis], spatial_scale);
      const auto extent = static_cast<double>(input_size[2 + axis]);
      TORCH_CHECK_VALUE(first <= extent + 1 && last >= -1, "roi_pool: box ", k,
                        " lies outside the ", input_size[2], "x", input_size[3], " map: along ",
                        axis == 0 ? "y" : "x", " it is [", first, ", ", last,
                        "] in positions of the map; is spatial_scale=", spatial_scale, " right?");
      // Far ends are cut to where integers do not overflow.
      const double limit = static_cast<double>(kLimit) / 2;
      const auto begin = static_cast<int64_t>(std::max(std::round(first), -limit));
      const auto end = static_cast<int64_t>(std::min(std::round(last), limit));
      region[1 + axis] = begin;
      region[3 + axis] = std::max<int64_t>(end - begin + 1, 1);
    }
  }
  return boxes.is_cpu() ? result : result.to(boxes.device());
}

// ---- pooling over them -----------------------------------------------------------------------

struct Request {
  RegionProblem problem;
  at::MemoryFormat format;  // of the output and of gradients

  std::array<int64_t, 4> input_size() const {
    return {problem.images, problem.channels, problem.in[0], problem.in[1]};
  }
  std::array<int64_t, 4> output_size() const {
    return {problem.regions, problem.channels, problem.out[0], problem.out[1]};
  }
};

Request request_for(const char* op, IntArrayRef input_size, IntArrayRef output_size,
                    const Tensor& values, const Tensor& regions, at::MemoryFormat format) {
  TORCH_CHECK(input_size.size() == 4, op,
              ": Expected 4D (batch mode) tensor, but got input of size ", input_size);
  TORCH_CHECK(input_size[1] > 0 && input_size[2] > 0 && input_size[3] > 0, op,
              ": Expected input to have non-zero size for non-batch dimensions, but got ",
              input_size);
  TORCH_CHECK(output_size.size() == 2, op, ": output_size must be 2 ints, got ", output_size);
  TORCH_CHECK(output_size[0] > 0 && output_size[1] > 0 && output_size[0] <= kLimit / output_size[1],
              op, ": output_size must be positive and of less than 2^31 bins, got ", output_size);
  TORCH_CHECK(input_size[2] <= kLimit / input_size[3], op, ": integer out of range: a map of ",
              input_size[2], "x", input_size[3], " has more than 2^31 - 1 positions");
  TORCH_CHECK(values.device() == regions.device(), op,
              ": expected all tensors to be on the same device, but boxes are on ",
              regions.device(), " and the input on ", values.device());
  TORCH_CHECK(
      regions.dim() == 2 && regions.size(1) == kRegionNumbers && regions.scalar_type() == at::kLong,
      op, ": regions must be int64 [K, 5], got ", toString(regions.scalar_type()), regions.sizes());
  Request request{{}, format};
  RegionProblem& p = request.problem;
  p.dtype = dtype_of(values, op, "input");
  p.images = input_size[0];
  p.channels = input_size[1];
  p.regions = regions.size(0);
  for (int axis = 0; axis < 2; ++axis) {
    p.in[axis] = input_size[2 + axis];
    p.out[axis] = output_size[axis];
  }
  p.channels_last = format == at::MemoryFormat::ChannelsLast;
  return request;
}

at::MemoryFormat format_of(bool channels_last) {
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

// The bins that a tensor of the output's size has.
IntArrayRef bins_of(const char* op, const Tensor& t, const char* argument) {
  TORCH_CHECK(t.dim() == 4, op, ": ", argument, " must have the output's 4 dimensions, got size ",
              t.sizes());
  return t.sizes().slice(2);
}

void check_like_output(const char* op, const Request& request, const Tensor& t,
                       const char* argument) {
  TORCH_CHECK(t.sizes() == IntArrayRef(request.output_size()), op, ": ", argument,
              " must have the output's size ", IntArrayRef(request.output_size()), ", got ",
              t.sizes());
}

void check_places(const char* op, const Request& request, const Tensor& places,
                  const Tensor& values) {
  check_like_output(op, request, places, "places");
  TORCH_CHECK(places.device() == values.device(), op,
              ": expected all tensors to be on the same device, but places are on ",
              places.device(), " and the values on ", values.device());
  TORCH_CHECK(places.scalar_type() == at::kInt, op, ": places must be int32, got ",
              toString(places.scalar_type()));
}

// x as the forward kernels read it.
Tensor readable(const Tensor& input, const Request& request, const RegionKernels& kernels) {
  return input.contiguous(kernels.reads_channels_last ? at::MemoryFormat::ChannelsLast
                                                      : request.format);
}

std::tuple<Tensor, Tensor> region_max_pool(const Tensor& input, const Tensor& regions,
                                           IntArrayRef output_size, bool keep_places) {
  const Request request =
      request_for("region_max_pool", input.sizes(), output_size, input, regions, layout_of(input));
  const auto& kernels = kernels_for(input, region_kernels_for);
  const c10::DeviceGuard guard(input.device());
  const Tensor x = readable(input, request, kernels);
  const Tensor r = regions.contiguous();
  Tensor y = empty_output(x, request.output_size(), request.format);
  Tensor places = keep_places ? empty_output(x, request.output_size(), at::kInt, request.format)
                              : empty_output(x, {0}, at::kInt);
  if (y.numel() > 0)
    kernels.max_forward(request.problem, x.const_data_ptr(), r.const_data_ptr<int64_t>(),
                        y.mutable_data_ptr(),
                        keep_places ? places.mutable_data_ptr<int32_t>() : nullptr, context_for(x));
  return {y, places};
}

Tensor region_max_pool_backward(const Tensor& grad, const Tensor& places, const Tensor& regions,
                                IntArrayRef input_size, bool channels_last) {
  const char* op = "region_max_pool_backward";
  const Request request = request_for(op, input_size, bins_of(op, grad, "grad"), grad, regions,
                                      format_of(channels_last));
  check_like_output(op, request, grad, "grad");
  check_places(op, request, places, grad);
  const auto& kernels = kernels_for(grad, region_kernels_for);
  const c10::DeviceGuard guard(grad.device());
  const Tensor gy = grad.contiguous(request.format);
  const Tensor kept = places.contiguous(request.format);
  const Tensor r = regions.contiguous();
  Tensor gx = empty_output(gy, request.input_size(), request.format);
  if (gx.numel() > 0)
    kernels.max_backward(request.problem, gy.const_data_ptr(), r.const_data_ptr<int64_t>(),
                         kept.const_data_ptr<int32_t>(), gx.mutable_data_ptr(), context_for(gy));
  return gx;
}

Tensor region_max_pool_pick(const Tensor& input, const Tensor& places, const Tensor& regions) {
  const char* op = "region_max_pool_pick";
  const Request request = request_for(op, input.sizes(), bins_of(op, places, "places"), input,
                                      regions, layout_of(places));
  check_places(op, request, places, input);
  const auto& kernels = kernels_for(input, region_kernels_for);
  const c10::DeviceGuard guard(input.device());
  const Tensor x = input.contiguous(request.format);
  const Tensor kept = places.contiguous(request.format);
  const Tensor r = regions.contiguous();
  Tensor y = empty_output(x, request.output_size(), request.format);
  if (y.numel() > 0)
    kernels.max_pick(request.problem, x.const_data_ptr(), r.const_data_ptr<int64_t>(),
                     kept.const_data_ptr<int32_t>(), y.mutable_data_ptr(), context_for(x));
  return y;
}

Tensor region_avg_pool(const Tensor& input, const Tensor& regions, IntArrayRef output_size) {
  const Request request =
      request_for("region_avg_pool", input.sizes(), output_size, input, regions, layout_of(input));
  const auto& kernels = kernels_for(input, region_kernels_for);
  const c10::DeviceGuard guard(input.device());
  const Tensor x = readable(input, request, kernels);
  const Tensor r = regions.contiguous();
  Tensor y = empty_output(x, request.output_size(), request.format);
  if (y.numel() > 0)
    kernels.avg_forward(request.problem, x.const_data_ptr(), r.const_data_ptr<int64_t>(),
                        y.mutable_data_ptr(), context_for(x));
  return y;
}

Tensor region_avg_pool_backward(const Tensor& grad, const Tensor& regions, IntArrayRef input_size,
                                bool channels_last) {
  const char* op = "region_avg_pool_backward";
  const Request request = request_for(op, input_size, bins_of(op, grad, "grad"), grad, regions,
                                      format_of(channels_last));
  check_like_output(op, request, grad, "grad");
  const auto& kernels = kernels_for(grad, region_kernels_for);
  const c10::DeviceGuard guard(grad.device());
  const Tensor gy = grad.contiguous(request.format);
  const Tensor r = regions.contiguous();
  Tensor gx = empty_output(gy, request.input_size(), request.format);
  if (gx.numel() > 0)
    kernels.avg_backward(request.problem, gy.const_data_ptr(), r.const_data_ptr<int64_t>(),
                         gx.mutable_data_ptr(), context_for(gy));
  return gx;
}

void implement(torch::Library& m) {
  m.impl("regions", regions);
  m.impl("region_max_pool", region_max_pool);
  m.impl("region_max_pool_backward", region_max_pool_backward);
  m.impl("region_max_pool_pick", region_max_pool_pick);
  m.impl("region_avg_pool", region_avg_pool);
  m.impl("region_avg_pool_backward", region_avg_pool_backward);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(weft, m) {
  m.def("regions(Tensor boxes, float spatial_scale, SymInt[] input_size) -> Tensor");
  m.def(
      "region_max_pool(Tensor input, Tensor regions, SymInt[] output_size, bool keep_places) -> "
      "(Tensor output, Tensor places)");
  m.def(
      "region_max_pool_backward(Tensor grad, Tensor places, Tensor regions, SymInt[] input_size, "
      "bool channels_last) -> Tensor");
  m.def("region_max_pool_pick(Tensor input, Tensor places, Tensor regions) -> Tensor");
  m.def("region_avg_pool(Tensor input, Tensor regions, SymInt[] output_size) -> Tensor");
  m.def(
      "region_avg_pool_backward(Tensor grad, Tensor regions, SymInt[] input_size, "
      "bool channels_last) -> Tensor");
}

TORCH_LIBRARY_IMPL(weft, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(weft, CUDA, m) { implement(m); }

}  // namespace weft
