// Convolution on CUDA as a tile product: fprop, and dgrad by phases.
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

template <class Kernel, class T>
WEFT_GLOBAL WEFT_HOT void conv_product(TileProduct t, Finish finish, const T* a, const T* b,
                                       const T* bias, T* c) {
  using Acc = accumulate_t<T>;
  Kernel::run(t, a, b, c, [&](int group, int column, Acc sum) {
    if (bias != nullptr) sum += widen(load(bias + int64_t{1} * group * t.columns + column));
    const T result = narrow<T>(sum);
    if (finish.activation == Activation::none) return result;
    return narrow<T>(activated(finish.activation, finish.slope, widen(result)));
  });
}

template <class Math, ConvProduct kProduct>
void launch_product(const char* name, const ConvCudaPlan& plan, TileProduct& t,
                    const Finish& finish, const void* a, const void* b, const void* bias, void* c,
                    const Context& context) {
  using T = typename Math::Element;
  using Shape = typename Math::Shape;
  using Kernel = TileKernel<T, T, typename Math::Operand, Shape, along_a<Math, kProduct>,
                            along_b<Math, kProduct>, /*kBoundedA=*/true, /*kBoundedB=*/false>;
  t.packed_out = Shape::kPacked && begins_pack(c);
  device::launch({name, t.blocks(), Shape::kThreads, plan.shared_bytes, context.stream},
                 conv_product<Kernel, T>, t, finish, static_cast<const T*>(a),
                 static_cast<const T*>(b), static_cast<const T*>(bias), static_cast<T*>(c));
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
  int64_t r[3];
  for (r[0] = 0; r[0] < p.window[0].stride; ++r[0])
    for (r[1] = 0; r[1] < p.window[1].stride; ++r[1])
      for (r[2] = 0; r[2] < p.window[2].stride; ++r[2]) {
        TileProduct t = dgrad_product(p, plan, r);
        if (t.rows == 0) continue;
        dispatch_math(p, plan, [&](auto math) {
          launch_product<decltype(math), ConvProduct::dgrad>("conv_dgrad_product", plan, t, {}, gy,
                                                             w, bias, gx, context);
        });
      }
}

}  // namespace weft::WEFT_TARGET
