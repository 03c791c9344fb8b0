// What the recurrent ops tell of themselves where plans are asked for.
#include "ops_common.h"
#include "rnn/rnn_plans.h"
#include "rnn/rnn_sequence_plan.h"

#include <climits>

namespace weft {
namespace {

bool on_cuda() { return !is_cpu(planned_target()); }

Plan plan_of(const char* kernel, const char* path, const RnnCost& cost) {
  Plan plan;
  plan.kernel = kernel;
  plan.path = path;
  plan.flops = cost.flops;
  plan.bytes = cost.bytes;
  plan.least_bytes = cost.least_bytes;
  return plan;
}

int at_least_one(int64_t threads) { return static_cast<int>(threads > 1 ? threads : 1); }

// A block of the tile product makes rows × units.
void tile(Plan& plan, DType dtype, int64_t batch, int64_t units, int64_t gates) {
  plan.tile = {{"rows", CellTile::kRows}, {"units", CellTile::kUnits}};
  plan.blocks = CellTile::blocks(batch, units);
  plan.threads = CellTile::kThreads;
  plan.shared_bytes = CellTile::shared_bytes(dtype, gates);
}

void one_thread_each(Plan& plan, int64_t elements) {
  constexpr int kThreads = 256;
  plan.blocks = ceil_div(elements, kThreads);
  plan.threads = kThreads;
}

// All steps in one kernel: each slice of the batch reads the weights once, each block of units the
// states of all steps.
void sequence(Plan& plan, const LayerProblem& p, const SequencePlan& all, const char* kernel) {
  const int64_t weights = p.gates() * p.hidden * p.state();
  plan.kernel = kernel;
  plan.path = all.tensor_cores ? "sequence, tensor cores" : "sequence";
  plan.tile = {{"rows", all.rows}, {"units", all.units}};
  plan.blocks = all.blocks();
  plan.threads = all.threads;
  plan.shared_bytes = all.shared_bytes;
  plan.bytes = plan.least_bytes +
               ((all.row_blocks - 1) * weights + (all.unit_blocks - 1) * p.steps * p.states()) *
                   size_of(p.dtype);
}

[[maybe_unused]] const bool plans_registered = register_planned_ops(
    {"lstm_cell", "lstm_cell_backward", "lstm_cell_double_backward", "lstm_cell_gradients",
     "gru_cell", "gru_cell_backward", "gru_cell_double_backward", "gru_cell_gradients", "rnn_cell",
     "rnn_cell_gradients", "rnn_layer", "rnn_layer_gradients", "rnn_layer_double_backward",
     "mdlstm", "mdlstm_gradients", "mdlstm_double_backward"});

}  // namespace

bool cell_planned(const CellProblem& p, const char* kernel, int64_t gates, int64_t columns) {
  if (!planning()) return false;
  Plan plan = plan_of(kernel, on_cuda() ? "tile" : "units", cell_cost(p, gates, columns));
  if (on_cuda())
    tile(plan, p.dtype, p.batch, p.hidden, gates);
  else
    plan.threads = at_least_one(p.hidden / cell_grain(p, gates));
  note_plan(std::move(plan));
  return true;
}

bool elements_planned(const CellProblem& p, const char* kernel, int64_t columns) {
  if (!planning()) return false;
  Plan plan = plan_of(kernel, "elements", elements_cost(p, columns));
  if (on_cuda())
    one_thread_each(plan, p.units());
  else
    plan.threads = at_least_one(p.units() / kElementGrain);
  note_plan(std::move(plan));
  return true;
}

bool layer_planned(const LayerProblem& p, LayerPass pass, bool keeps, bool normalised) {
  if (!planning()) return false;
  const bool forward = pass == LayerPass::forward;
  const char* kernel = forward ? "recurrent_layer_step" : "recurrent_layer_gates_backward";
  Plan plan = plan_of(kernel, p.dual ? "steps, dual" : "steps", layer_cost(p, keeps));
  constexpr GridFacts kFacts = grid_facts_of(132);  // of an H100 or H200
  const SequencePlan all =
      forward ? forward_sequence(p, normalised, kFacts) : backward_sequence(p, normalised, kFacts);
  if (on_cuda() && all.persistent()) {
    sequence(plan, p, all,
             forward ? "recurrent_layer_sequence" : "recurrent_layer_sequence_backward");
  } else if (on_cuda()) {
    plan.launches = p.steps * layer_step_launches(p, pass, normalised);
    if (forward)
      tile(plan, p.dtype, p.batch, p.hidden, p.cell == LayerCell::gru_reset_before ? 2 : p.gates());
    else
      one_thread_each(plan, p.units());
  } else {
    plan.kernel = forward ? "rnn_layer" : "rnn_layer_backward";
    plan.threads = at_least_one(layer_split(p, INT_MAX).threads);
  }
  note_plan(std::move(plan));
  return true;
}

bool normalise_planned(const LayerProblem& p, bool forward) {
  if (!planning()) return false;
  const int64_t rows = p.steps * p.batch * p.gates();
  const int64_t bytes = rows * p.hidden * (forward ? 2 : 4) * size_of(p.dtype);
  Plan plan = plan_of(forward ? "recurrent_layer_normalise" : "recurrent_layer_normalise_backward",
                      "rows", {rows * p.hidden * 8, bytes, bytes});
  if (on_cuda()) {
    plan.blocks = rows;
    plan.threads = 128;
    plan.shared_bytes = plan.threads * (p.dtype == DType::f64 ? 8 : 4);
  }
  note_plan(std::move(plan));
  return true;
}

bool grid_planned(const GridProblem& p, bool forward) {
  if (!planning()) return false;
  Plan plan = plan_of(forward ? "grid_lstm" : "grid_lstm_backward",
                      p.dual ? "diagonals, dual" : "diagonals", grid_cost(p));
  if (on_cuda())
    plan.launches = p.diagonals();
  else
    plan.threads = at_least_one(grid_threads(p));
  note_plan(std::move(plan));
  return true;
}

bool product_planned(DType dtype, int64_t m, int64_t n, int64_t k) {
  if (!planning()) return false;
  note_plan(
      plan_of("product", on_cuda() ? "torch's" : "tile product", product_cost(dtype, m, n, k)));
  return true;
}

}  // namespace weft
