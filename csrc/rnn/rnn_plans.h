// For the op files of recurrence: each function is true where plans are asked for; what would run
// is then noted, and nothing need run.
#pragma once

#include "rnn/rnn_plan.h"

namespace weft {

// A cell's forward, which writes `columns` numbers of a unit.
bool cell_planned(const CellProblem& p, const char* kernel, int64_t gates, int64_t columns);
// An elementwise pass over `columns` numbers of a unit.
bool elements_planned(const CellProblem& p, const char* kernel, int64_t columns);
bool layer_planned(const LayerProblem& p, LayerPass pass, bool keeps, bool normalised);
// Of the input's products of all steps.
bool normalise_planned(const LayerProblem& p, bool forward);
bool grid_planned(const GridProblem& p, bool forward);
// A [m, k] times B [k, n].
bool product_planned(DType dtype, int64_t m, int64_t n, int64_t k);

}  // namespace weft
