// Convolution on CUDA as a tile product: fprop, and dgrad by phases.
//
// The phases of a strided dgrad are products of one launch, each with its run of blocks.
//
// A block makes a tile of positions x channels of one group; operands.h says what it multiplies.
// The reduction runs over all channels and places as one index, so few channels do not leave tiles
// half empty. The epilogue adds the bias, rounds, and applies the activation to what was rounded,
// as a separate layer would. Packs of 16 bytes need channels-last maps whose channels are packs;
// everything else goes element by element, threads along the positions.
//
// Bound: FLOPs of the tensor cores with many channels; with few, bytes, of which the map is read
// once a tile and not once a place.
#include "conv/conv_cuda.h"

namespace weft::WEFT_TARGET {
namespace {

using device::load;

struct Finish {
  Activation activation = Activation::none;
  double slope = 0;
};

// Products of one launch; those of block first_block[i] and on are of product i.
struct Phases {
  int count = 0;
  unsigned first_block[conv_plan::kMostPhases + 1] = {};
  TileProduct product[conv_plan::kMostPhases];
};
static_assert(sizeof(Phases) < 32000, "a kernel has 32764 bytes of parameters");

template <class Acc, class T>
WEFT_DEVICE auto finisher(const TileProduct& t, const Finish& finish, const T* bias) {
  return [&t, &finish, bias](int group, int column, Acc sum) {
    if (bias != nullptr) sum += widen(load(bias + int64_t{1} * group * t.columns + column));
    const T result = narrow<T>(sum);
    if (finish.activation == Activation::none) return result;
    return narrow<T>(activated(finish.activation, finish.slope, widen(result)));
  };
}

template <class Kernel, class T>
WEFT_GLOBAL WEFT_HOT void conv_product(TileProduct t, Finish finish, const T* a, const T* b,
                                       const T* bias, T* c) {
  const auto block = static_cast<unsigned>(device::block_index());
  Kernel::run(t, block, a, b, c, finisher<accumulate_t<T>>(t, finish, bias));
}

template <class Kernel, class T>
WEFT_GLOBAL WEFT_HOT void conv_phases(WEFT_CONSTANT Phases phases, const T* a, const T* b,
                                      const T* bias, T* c) {
  const auto block = static_cast<unsigned>(device::block_index());
  int i = 0;
  while (block >= phases.first_block[i + 1]) ++i;
  const TileProduct& t = phases.product[i];
  Kernel::run(t, block - phases.first_block[i], a, b, c,
              finisher<accumulate_t<T>>(t, Finish{}, bias));
}

template <class Math, ConvProduct kProduct>
using ProductKernel =
    TileKernel<typename Math::Element, typename Math::Element, typename Math::Operand,
               typename Math::Shape, along_a<Math, kProduct>, along_b<Math, kProduct>,
               /*kBoundedA=*/true, /*kBoundedB=*/false>;

template <class Math, ConvProduct kProduct>
void launch_product(const char* name, const ConvCudaPlan& plan, TileProduct& t,
                    const Finish& finish, const void* a, const void* b, const void* bias, void* c,
                    const Context& context) {
  using T = typename Math::Element;
  t.packed_out = Math::Shape::kPacked && begins_pack(c);
  device::launch({name, t.blocks(), Math::Shape::kThreads, plan.shared_bytes, context.stream},
                 conv_product<ProductKernel<Math, kProduct>, T>, t, finish,
                 static_cast<const T*>(a), static_cast<const T*>(b), static_cast<const T*>(bias),
                 static_cast<T*>(c));
}

void launch_phases(const ConvProblem& p, const ConvCudaPlan& plan, Phases& phases, const void* gy,
                   const void* w, const void* bias, void* gx, const Context& context) {
  constexpr const char* kName = "conv_dgrad_product";
  constexpr ConvProduct kProduct = ConvProduct::dgrad;
  dispatch_math(p, plan, [&](auto math) {
    using Math = decltype(math);
    using T = typename Math::Element;
    if (phases.count == 1)
      return launch_product<Math, kProduct>(kName, plan, phases.product[0], {}, gy, w, bias, gx,
                                            context);
    for (int i = 0; i < phases.count; ++i)
      phases.product[i].packed_out = Math::Shape::kPacked && begins_pack(gx);
    device::launch({kName, phases.first_block[phases.count], Math::Shape::kThreads,
                    plan.shared_bytes, context.stream},
                   conv_phases<ProductKernel<Math, kProduct>, T>, phases, static_cast<const T*>(gy),
                   static_cast<const T*>(w), static_cast<const T*>(bias), static_cast<T*>(gx));
  });
  phases.count = 0;
}

}  // namespace

void launch_fprop_product(const ConvProblem& p, const ConvCudaPlan& plan, const void* x,
                          const void* w, const void* bias, void* y, const Context& context) {
  TileProduct t = fprop_product(p, plan);
  dispatch_math(p, plan, [&](auto math) {
    launch_product<decltype(math), ConvProduct::fprop>(
        "conv_fprop_product", plan, t, {p.activation, p.slope}, x, w, bias, y, context);
  });
}

void launch_dgrad_product(const ConvProblem& p, const ConvCudaPlan& plan, const void* gy,
                          const void* w, const void* bias, void* gx, const Context& context) {
  Phases phases;
  conv_plan::for_phases(p, [&](const int64_t (&remainder)[3], int64_t) {
    const int i = phases.count++;
    phases.product[i] = dgrad_product(p, plan, remainder);
    phases.first_block[i + 1] =
        phases.first_block[i] + static_cast<unsigned>(phases.product[i].blocks());
    if (phases.count == conv_plan::kMostPhases)
      launch_phases(p, plan, phases, gy, w, bias, gx, context);
  });
  if (phases.count > 0) launch_phases(p, plan, phases, gy, w, bias, gx, context);
}

}  // namespace weft::WEFT_TARGET
