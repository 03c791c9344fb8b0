// The pybind11 module weft._C: loading it registers the ops; it exposes what is not an op.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "conv/conv_ops.h"
#include "core/kept_memory.h"
#include "core/rate.h"
#include "ops_common.h"
#include "pool/pool_ops.h"
#include "rnn/rnn_layer_ops.h"
#include "rnn/rnn_ops.h"
#include "rnn/rnn_sequence_plan.h"

#if WEFT_WITH_HOST_EXECUTION
#include "device/device.h"
#endif

namespace py = pybind11;

namespace {

#if WEFT_WITH_HOST_EXECUTION
py::list launch_reports() {
  py::list rows;
  for (const auto& r : weft::device::launch_reports()) {
    using namespace py::literals;
    rows.append(py::dict("kernel"_a = r.kernel, "blocks"_a = r.blocks, "threads"_a = r.threads,
                         "shared_bytes"_a = r.shared_bytes, "bytes_loaded"_a = r.bytes_loaded,
                         "bytes_stored"_a = r.bytes_stored, "sectors_loaded"_a = r.sectors_loaded,
                         "sectors_stored"_a = r.sectors_stored));
  }
  return rows;
}
#endif

// How CUDA would take all steps of a recurrent layer in one kernel, of elements of `bytes`
// bytes; None where each step has kernels of its own.
py::object sequence_plan(const std::string& cell, int bytes, int64_t steps, int64_t batch,
                         int64_t hidden, int64_t projection, bool normalised, bool backward,
                         int64_t multiprocessors) {
  using namespace py::literals;
  weft::LayerProblem p;
  p.cell = weft::layer::cell_of(cell);
  p.dtype = bytes == 8 ? weft::DType::f64 : bytes == 4 ? weft::DType::f32 : weft::DType::bf16;
  p.steps = steps, p.batch = batch, p.hidden = hidden, p.projection = projection;
  const weft::GridFacts facts = weft::grid_facts_of(multiprocessors);
  const weft::SequencePlan plan = backward ? weft::backward_sequence(p, normalised, facts)
                                           : weft::forward_sequence(p, normalised, facts);
  if (!plan.persistent()) return py::none();
  return py::dict("unit_blocks"_a = plan.unit_blocks, "row_blocks"_a = plan.row_blocks,
                  "units"_a = plan.units, "rows"_a = plan.rows, "staged_rows"_a = plan.staged_rows,
                  "shared_bytes"_a = plan.shared_bytes, "threads"_a = plan.threads,
                  "tensor_cores"_a = plan.tensor_cores);
}

// What the op that `call` runs would launch on `target`.
py::list plans_of(const std::string& target, const py::function& call) {
  using namespace py::literals;
  weft::request_plans(weft::target_named(target));
  try {
    call();
  } catch (...) {
    weft::take_plans();
    throw;
  }
  py::list rows;
  for (const weft::Plan& plan : weft::take_plans()) {
    py::dict tile;
    for (const auto& [axis, extent] : plan.tile) tile[py::str(axis)] = extent;
    rows.append(py::dict("kernel"_a = plan.kernel, "path"_a = plan.path, "tile"_a = tile,
                         "blocks"_a = plan.blocks, "threads"_a = plan.threads,
                         "launches"_a = plan.launches, "shared_bytes"_a = plan.shared_bytes,
                         "bytes"_a = plan.bytes, "least_bytes"_a = plan.least_bytes,
                         "flops"_a = plan.flops));
  }
  return rows;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "weft's compiled kernels; importing registers torch.ops.weft";
  m.attr("with_cuda") = static_cast<bool>(WEFT_WITH_CUDA);
  m.attr("with_host_execution") = static_cast<bool>(WEFT_WITH_HOST_EXECUTION);
  m.attr("cuda_architectures") = WEFT_CUDA_ARCHITECTURES;
  m.attr("compiler") = __VERSION__;
  m.def("cpu_target", [] { return weft::target_name(weft::cpu_target()); });
  m.def("available_cpu_targets", weft::available_cpu_targets);
  m.def("set_cpu_target", weft::set_cpu_target);
  m.def(
      "multiply_adds",
      [](int64_t rounds) {
        return weft::rate_kernels_for(weft::cpu_target())
            ->multiply_adds(rounds, weft::context_for(at::Tensor()));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def("set_host_execution", weft::set_host_execution);
  m.def("host_execution", weft::host_execution);
  m.def("set_sm90a_kernels", weft::set_sm90a_kernels);
  m.def("sm90a_kernels", weft::sm90a_kernels);
  m.def("kept_bytes", weft::kept_bytes);
  m.def("release_kept", weft::release_kept);
  PyModule_AddFunctions(m.ptr(), weft::eager_cells());
  PyModule_AddFunctions(m.ptr(), weft::eager_layers());
  PyModule_AddFunctions(m.ptr(), weft::eager_convolution());
  PyModule_AddFunctions(m.ptr(), weft::eager_pooling());
  m.def("planned_ops", weft::planned_ops);
  m.def("plans_of", plans_of);
  m.def("sequence_plan", sequence_plan, py::kw_only(), py::arg("cell"), py::arg("bytes"),
        py::arg("steps"), py::arg("batch"), py::arg("hidden"), py::arg("projection") = 0,
        py::arg("normalised") = false, py::arg("backward") = false,
        py::arg("multiprocessors") = 132);
#if WEFT_WITH_HOST_EXECUTION
  m.def("launch_reports", launch_reports);
  m.def("clear_launch_reports", weft::device::clear_launch_reports);
  m.def("set_multiprocessors", weft::device::set_multiprocessors);
#endif
}
