// How a convolution runs on CUDA: a pure function of the problem and of the device's facts.
//
//   product  the tile product (gemm/tile_product.h) over rows (positions; output channels in
//            wgrad), columns (channels; channels times places in wgrad) and a reduction. On tensor
//            cores for bf16, f16, float64, and for float32 where TF32 is allowed.
//   walk     a thread makes one element: few channels a group, where a tile would be mostly empty,
//            and problems so small that one wave of threads does them.
//
// Depthwise problems have tiles of their own, see conv_depthwise_plan.h.
#pragma once

#include <algorithm>
#include <limits>

#include "conv/conv.h"
#include "conv/conv_phases.h"
#include "core/plan.h"

namespace weft {

enum class ConvProduct : uint8_t { fprop, dgrad, wgrad };

// The tile of a block: extents, warps, buffers of the pipeline.
struct ConvTile {
  enum class Kind : uint8_t {
    large,   // 128 x 128, packs of 16 bytes
    small,   // 64 x 64, packs
    element  // 64 x 64, element by element: contiguous maps, odd channels, odd addresses
  };
  Kind kind = Kind::element;
  int m = 64, n = 64, k = 16;
  int warps_m = 2, warps_n = 4;
  int stages = 3;

  constexpr int threads() const { return 32 * warps_m * warps_n; }
};

// `plain`: without tensor cores, which takes a grid of 16 x 16 threads.
constexpr ConvTile conv_tile(ConvTile::Kind kind, int64_t element_bytes, bool plain) {
  ConvTile tile;
  tile.kind = kind;
  if (kind == ConvTile::Kind::element) return tile;
  tile.k = static_cast<int>(64 / element_bytes);
  tile.stages = 4;
  if (kind == ConvTile::Kind::large)
    tile.m = tile.n = 128;
  else if (!plain)
    tile.warps_n = 2;
  return tile;
}

// The default is an sm_90's.
struct ConvCudaFacts {
  int64_t multiprocessors = 132;
};

// How the tiles of A and B lie in shared memory: [row][k] if by reduction, else [k][row]. As their
// operands lie in memory for packs; element by element, threads run along positions.
struct ConvTileOrder {
  bool a_by_reduction, b_by_reduction;
};

constexpr ConvTileOrder conv_tile_order(ConvProduct product, bool packs) {
  switch (product) {
    case ConvProduct::fprop:
      return {packs, true};
    case ConvProduct::dgrad:
      return {packs, !packs};
    default:
      return {!packs, !packs};
  }
}

struct ConvCudaPlan {
  enum class Path : uint8_t { product, walk };

  Path path = Path::walk;
  ConvTile tile;
  bool plain = false;  // float32 without tensor cores
  int64_t rows = 0, columns = 0, reduction = 0;
  int64_t splits = 1;       // of the reduction of wgrad, added in a second launch
  int64_t split_steps = 0;  // tiles of the reduction in each
  int64_t blocks = 0;
  int64_t launches = 1;  // of dgrad, for its phases
  int64_t shared_bytes = 0;
};

namespace conv_plan {

// A tile that is emptier than this is left to the walk.
constexpr int64_t kLeastChannels = 8;
// Products below which one wave of threads that walk is as good.
constexpr int64_t kLeastProducts = 1 << 15;
// Tiles of the reduction that are worth a partial sum of their own.
constexpr int64_t kLeastSplitSteps = 8;

// As gemm/tile_operand.h pads an operand's tile and gemm/tile_product.h stages a finished one.
constexpr int64_t operand_elements(int rows, int k, int64_t size, bool by_reduction) {
  const int pad = size == 2 || (size == 4 && !by_reduction) ? 8 : 4;
  return by_reduction ? rows * (k + pad) : k * (rows + pad);
}

constexpr int64_t shared_bytes(const ConvTile& tile, ConvProduct product, int64_t size) {
  const ConvTileOrder order = conv_tile_order(product, tile.kind != ConvTile::Kind::element);
  const int64_t stage = operand_elements(tile.m, tile.k, size, order.a_by_reduction) +
                        operand_elements(tile.n, tile.k, size, order.b_by_reduction);
  const int64_t out_size = product == ConvProduct::wgrad && size < 4 ? 4 : size;
  const int64_t out = tile.m * tile.n * out_size + 16 * std::max(tile.m, tile.n);
  return std::max(tile.stages * stage * size, out);
}

// Flat indices, and those of a tile that begins at the last one, and positions fit into the int
// that the kernels use for them.
constexpr int64_t kInt = std::numeric_limits<int32_t>::max();
constexpr bool fits(const ConvProblem& p) {
  constexpr int64_t kIndices = kInt - 1024;
  constexpr int64_t kPositions = 1 << 28;
  for (int a = 0; a < 3; ++a)
    if (p.in[a] > kPositions || p.out[a] > kPositions || p.window[a].padding > kPositions ||
        p.window[a].span() > kPositions || p.out[a] * p.window[a].stride > kPositions)
      return false;
  return p.groups < kIndices && p.n * std::max(p.in_positions(), p.out_positions()) < kIndices &&
         std::max(p.c, p.k) * p.window_elements() < kIndices;
}

}  // namespace conv_plan

// `aligned`: all operands begin at 16 bytes.
inline ConvCudaPlan plan_conv_cuda(const ConvProblem& p, ConvProduct product, bool aligned = true,
                                   const ConvCudaFacts& facts = {}) {
  using namespace conv_plan;
  using Kind = ConvTile::Kind;
  ConvCudaPlan plan;
  const int64_t places = p.window_elements();
  switch (product) {
    case ConvProduct::fprop:
      plan.rows = p.n * p.out_positions();
      plan.columns = p.k;
      plan.reduction = p.c * places;
      break;
    case ConvProduct::dgrad:  // all phases together
      plan.rows = p.n * p.in_positions();
      plan.columns = p.c;
      plan.reduction = p.k * places;
      break;
    case ConvProduct::wgrad:
      plan.rows = p.k;
      plan.columns = p.c * places;
      plan.reduction = p.n * p.out_positions();
      break;
  }
  const int64_t channels = product == ConvProduct::wgrad ? plan.rows : plan.columns;
  const int64_t other = product == ConvProduct::wgrad ? plan.columns : plan.reduction;
  if (!fits(p) || channels < kLeastChannels || other < kLeastChannels ||
      plan.rows * plan.columns * plan.reduction < kLeastProducts)
    return plan;

  plan.path = ConvCudaPlan::Path::product;
  plan.plain = p.dtype == DType::f32 && !p.tf32;
  const int64_t size = size_of(p.dtype);
  const int64_t pack = 16 / size;
  const auto blocks_of = [&](const ConvTile& tile) {
    return ceil_div(plan.rows, tile.m) * ceil_div(plan.columns, tile.n) * p.groups;
  };
  const bool packs = p.channels_last && aligned && p.c % pack == 0 && p.k % pack == 0;
  const ConvTile large = conv_tile(Kind::large, size, plan.plain);
  // float64 sums of a large tile would take all registers.
  const bool fills = plan.rows > 64 && plan.columns > 64 && p.dtype != DType::f64;
  const int64_t wanted = product == ConvProduct::wgrad ? 1 : facts.multiprocessors;
  plan.tile = conv_tile(!packs                                ? Kind::element
                        : fills && blocks_of(large) >= wanted ? Kind::large
                                                              : Kind::small,
                        size, plan.plain);
  const int64_t tiles = blocks_of(plan.tile);
  const int64_t steps = ceil_div(plan.reduction, plan.tile.k);
  plan.split_steps = steps;
  if (product == ConvProduct::wgrad) {
    const int64_t splits = std::clamp<int64_t>(2 * facts.multiprocessors / tiles, 1,
                                               std::max<int64_t>(steps / kLeastSplitSteps, 1));
    plan.split_steps = ceil_div(steps, splits);
    plan.splits = ceil_div(steps, plan.split_steps);
  }
  plan.blocks = tiles * plan.splits;
  if (product == ConvProduct::dgrad) {
    int64_t phases = 0;
    plan.blocks = 0;
    for_phases(p, [&](const int64_t (&)[3], int64_t rows) {
      ++phases;
      plan.blocks += ceil_div(rows, plan.tile.m) * ceil_div(plan.columns, plan.tile.n) * p.groups;
    });
    plan.launches = ceil_div(phases, int64_t{kMostPhases});
  }
  if (plan.blocks > kInt) return {};
  plan.shared_bytes = shared_bytes(plan.tile, product, size);
  return plan;
}

// What the partial sums of wgrad take, in bytes; 0 on the walk.
inline int64_t wgrad_workspace(const ConvProblem& p, const ConvCudaPlan& plan) {
  if (plan.path == ConvCudaPlan::Path::walk) return 0;
  const int64_t size = p.dtype == DType::f64 ? 8 : 4;
  return plan.splits * p.weight_elements() * size;
}

}  // namespace weft
