// The input gradient of a convolution on Hopper, and so a transposed convolution, by phases.
//
// Each phase (conv_phases.h) is a walk of stride 1 over gy: a block makes a tile of 128 of its
// inputs x 64 to 256 input channels (conv_wgmma_tile.h), and its rows go to the inputs of the
// phase, a stride apart. Up to 16 phases share a launch, each with its own run of blocks and its
// own box of the copy unit, since where windows begin and end differs. The phase of remainder 0 has
// the most places, the last the fewest, so that blocks come in descending order of work where the
// window is not dilated. A phase that no place of the window reaches multiplies nothing and stores
// its bias. Weights lie [k][place][c], along the columns.
//
// Bound: FLOPs of the tensor cores; windows smaller than their stride: bytes of gx. Compiled for
// sm_90a and run on the host; not measured on a GPU yet.
#include "conv/conv_wgmma_tile.h"

namespace weft::WEFT_TARGET {
namespace {

// Where the inputs of a phase lie, as positions of gx.
struct Inputs {
  int64_t first;
  int64_t step[3];  // along W, H, D
  int64_t image;
};

// Walks of one launch; those of block first_block[i] and on are of walk i.
template <int kMost>
struct Phases {
  int count = 0;
  unsigned first_block[kMost + 1] = {};
  TensorMap gy[kMost];
  Walk walk[kMost];
  Inputs inputs[kMost];
};

WEFT_DEVICE int64_t input_of(const Walk& walk, const Inputs& inputs, int64_t row) {
  auto rest = static_cast<unsigned>(row);  // conv_plan::fits: rows are ints
  int64_t position = inputs.first;
  WEFT_UNROLL
  for (int a = 0; a < 3; ++a) {
    const auto rows = static_cast<unsigned>(walk.rows[a]);
    position += rest % rows * inputs.step[a];
    rest /= rows;
  }
  return position + rest * inputs.image;
}

template <class T, int kColumns, int kMost>
WEFT_GLOBAL WEFT_HOT void conv_wgmma_dgrad(WEFT_CONSTANT Phases<kMost> phases,
                                           WEFT_CONSTANT TensorMap w, const T* bias, T* gx) {
  const auto block = static_cast<unsigned>(device::block_index());
  int i = 0;
  if constexpr (kMost > 1)
    while (block >= phases.first_block[i + 1]) ++i;
  const Walk& walk = phases.walk[i];
  const Inputs& inputs = phases.inputs[i];
  make_tile<T, Major::columns, kColumns>(block - phases.first_block[i], phases.gy[i], w, walk,
                                         Epilogue{}, bias, gx, [&](int64_t row) {
                                           if constexpr (kMost == 1) return row;  // all inputs
                                           return input_of(walk, inputs, row);
                                         });
}

// ---- launchers -------------------------------------------------------------------------------

Inputs inputs_of(const ConvProblem& p, const int64_t (&remainder)[3]) {
  Inputs inputs{};
  inputs.image = p.in_positions();
  int64_t step = 1;
  for (int a = 2; a >= 0; --a) {
    const conv_plan::Phase phase = conv_plan::phase_of(p.window[a], p.in[a], remainder[a]);
    inputs.first += phase.first_input * step;
    inputs.step[2 - a] = p.window[a].stride * step;
    step *= p.in[a];
  }
  return inputs;
}

// kMost: 1 where the stride is.
template <class T, int kColumns, int kMost>
void launch_phases(const ConvProblem& p, const ConvWgmmaPlan& plan, const void* gy, const void* w,
                   const void* bias, void* gx, const Context& context) {
  const TensorMap weights = weights_of(p, kDepth, w);
  Phases<kMost> phases;
  const auto launch = [&] {
    device::launch({"conv_dgrad_wgmma", phases.first_block[phases.count], kThreads,
                    conv_wgmma::shared_bytes(kColumns), context.stream},
                   conv_wgmma_dgrad<T, kColumns, kMost>, phases, weights,
                   static_cast<const T*>(bias), static_cast<T*>(gx));
    phases.count = 0;
  };
  conv_plan::for_phases(p, [&](const int64_t (&remainder)[3], int64_t rows) {
    const ConvWindows windows = phase_windows(p, remainder);
    const int i = phases.count++;
    phases.gy[i] = map_of(p, plan, windows, kRows, gy);
    phases.walk[i] = walk_of(p, plan, windows);
    phases.inputs[i] = inputs_of(p, remainder);
    phases.first_block[i + 1] =
        phases.first_block[i] + static_cast<unsigned>(ceil_div(rows, kRows) * plan.tiles_n);
    if (phases.count == kMost) launch();
  });
  if (phases.count > 0) launch();
}

}  // namespace

bool launch_wgmma_dgrad(const ConvProblem& p, const void* gy, const void* w, const void* bias,
                        void* gx, const Context& context) {
  const bool aligned = begins_pack(gy) && begins_pack(w) && begins_pack(gx);
  const ConvWgmmaPlan plan = plan_here(p, ConvProduct::dgrad, aligned, context);
  if (!plan.fits) return false;
  const bool strided = p.window[0].stride > 1 || p.window[1].stride > 1 || p.window[2].stride > 1;
  dispatch_wgmma(p, plan, [&](auto element, auto columns) {
    using T = decltype(element);
    if (strided)
      launch_phases<T, columns.value, conv_plan::kMostPhases>(p, plan, gy, w, bias, gx, context);
    else
      launch_phases<T, columns.value, 1>(p, plan, gy, w, bias, gx, context);
  });
  return true;
}

}  // namespace weft::WEFT_TARGET
