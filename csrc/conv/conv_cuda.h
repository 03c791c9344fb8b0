// The CUDA launchers of convolution, and what their kernels share.
#pragma once

#include <cmath>
#include <type_traits>

#include "conv/conv_depthwise_plan.h"
#include "conv/conv_operands.h"

namespace weft::WEFT_TARGET {

// For problems whose plan is a product; see conv_plan_cuda.h.
void launch_fprop_product(const ConvProblem& p, const ConvCudaPlan& plan, const void* x,
                          const void* w, const void* bias, void* y, const Context& context);
void launch_dgrad_product(const ConvProblem& p, const ConvCudaPlan& plan, const void* gy,
                          const void* w, const void* bias, void* gx, const Context& context);
// context.workspace holds wgrad_workspace(p, plan) bytes.
void launch_wgrad_product(const ConvProblem& p, const ConvCudaPlan& plan, const void* x,
                          const void* gy, void* gw, const Context& context);
// On Hopper's own words (conv_wgmma*.cu), where the context asks for them and they suit: true.
bool launch_wgmma_fprop(const ConvProblem& p, const void* x, const void* w, const void* bias,
                        void* y, const Context& context);
bool launch_wgmma_dgrad(const ConvProblem& p, const void* gy, const void* w, const void* bias,
                        void* gx, const Context& context);
// context.workspace is that of the other product's plan.
bool launch_wgmma_wgrad(const ConvProblem& p, const void* x, const void* gy, void* gw,
                        const Context& context);

// gw = the partial sums [splits, weights] added in order.
void launch_wgrad_sum(const ConvProblem& p, int64_t splits, const void* partial, void* gw,
                      const Context& context);

// Depthwise problems whose plan is tiled; see conv_depthwise_plan.h. `inverse`: dgrad.
void launch_depthwise_gather(const ConvProblem& p, const DepthwisePlan& plan, bool inverse,
                             const void* source, const void* w, const void* bias, void* target,
                             const Context& context);
// context.workspace holds wgrad_workspace(p, plan) bytes.
void launch_depthwise_wgrad(const ConvProblem& p, const DepthwisePlan& plan, const void* x,
                            const void* gy, void* gw, const Context& context);

namespace {

template <class Acc>
WEFT_DEVICE Acc activated(Activation activation, double slope, Acc x) {
  switch (activation) {
    case Activation::relu:  // NaN stays NaN
      return x <= Acc{0} ? Acc{0} : x;
    case Activation::leaky_relu:
      return x > Acc{0} ? x : x * static_cast<Acc>(slope);
    case Activation::tanh:
      return std::tanh(x);
    case Activation::sigmoid:
      return Acc{1} / (Acc{1} + std::exp(-x));
    default:
      return x;
  }
}

template <ConvTile::Kind kKind, class T, bool kPlain>
struct ShapeOf {
  static constexpr ConvTile tile = conv_tile(kKind, sizeof(T), kPlain);
  using type = TileShape<tile.m, tile.n, tile.k, tile.warps_m, tile.warps_n, tile.stages,
                         kKind != ConvTile::Kind::element>;
};

// Element type, what is multiplied (the type itself, or tf32; float: no tensor cores) and tile.
template <class T, class MmaOperand, ConvTile::Kind kKind>
struct ConvMath {
  using Element = T;
  using Operand = MmaOperand;
  using Shape = typename ShapeOf<kKind, T, std::is_same_v<MmaOperand, float>>::type;
};

template <class Math, ConvProduct kProduct>
constexpr Along along_a =
    conv_tile_order(kProduct, Math::Shape::kPacked).a_by_reduction ? Along::reduction : Along::rows;
template <class Math, ConvProduct kProduct>
constexpr Along along_b =
    conv_tile_order(kProduct, Math::Shape::kPacked).b_by_reduction ? Along::reduction : Along::rows;

// Calls body(ConvMath<...>{}) for the plan's.
template <class T, class MmaOperand, class Body>
void dispatch_tile(const ConvCudaPlan& plan, const Body& body) {
  using Kind = ConvTile::Kind;
  if (plan.tile.kind == Kind::element) return body(ConvMath<T, MmaOperand, Kind::element>{});
  if constexpr (!std::is_same_v<T, double>)
    if (plan.tile.kind == Kind::large) return body(ConvMath<T, MmaOperand, Kind::large>{});
  return body(ConvMath<T, MmaOperand, Kind::small>{});
}

template <class Body>
void dispatch_math(const ConvProblem& p, const ConvCudaPlan& plan, const Body& body) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (std::is_same_v<T, float>)
      if (!plan.plain) return dispatch_tile<T, device::tf32>(plan, body);
    return dispatch_tile<T, T>(plan, body);
  });
}

inline bool begins_pack(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

}  // namespace
}  // namespace weft::WEFT_TARGET
