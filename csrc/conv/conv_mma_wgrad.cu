// The weight gradient on CUDA as a tile product whose reduction is the positions of all images.
//
// There are few weights and many positions, so the positions are split: each block sums a run of
// them for its tile of output channels x (channels, places), and a second launch adds the partial
// sums in the order of the runs. Which runs there are depends on the problem alone, so the bits
// never change. Bound: FLOPs; both maps are read once for every tile of the other.
#include "conv/conv_cuda.h"
#include "device/index.h"

namespace weft::WEFT_TARGET {
namespace {

using device::load;
using device::store;

constexpr int kSumThreads = 256;

// partial [splits, G·K, C·places]
template <class Kernel, class T>
WEFT_GLOBAL WEFT_HOT void conv_wgrad_product(TileProduct t, const T* gy, const T* x,
                                             accumulate_t<T>* partial) {
  using Acc = accumulate_t<T>;
  const auto block = static_cast<unsigned>(device::block_index());
  Kernel::run(t, block, gy, x, partial, [](int, int, Acc sum) { return sum; });
}

template <class T>
WEFT_GLOBAL void conv_wgrad_sum(int64_t weights, int splits, const accumulate_t<T>* partial,
                                T* gw) {
  const int64_t index = device::global_thread();
  if (index >= weights) return;
  accumulate_t<T> sum = 0;
  for (int split = 0; split < splits; ++split) sum += load(partial + split * weights + index);
  store(gw + index, narrow<T>(sum));
}

}  // namespace

void launch_wgrad_product(const ConvProblem& p, const ConvCudaPlan& plan, const void* x,
                          const void* gy, void* gw, const Context& context) {
  TileProduct t = wgrad_product(p, plan);
  dispatch_math(p, plan, [&](auto math) {
    using Math = decltype(math);
    using T = typename Math::Element;
    using Acc = accumulate_t<T>;
    using Shape = typename Math::Shape;
    constexpr ConvProduct kProduct = ConvProduct::wgrad;
    using Kernel = TileKernel<T, Acc, typename Math::Operand, Shape, along_a<Math, kProduct>,
                              along_b<Math, kProduct>, /*kBoundedA=*/false, /*kBoundedB=*/true>;
    constexpr int64_t kOutPack = 16 / sizeof(Acc);
    t.packed_out = t.columns % kOutPack == 0 && begins_pack(context.workspace);
    device::launch(
        {"conv_wgrad_product", t.blocks(), Shape::kThreads, plan.shared_bytes, context.stream},
        conv_wgrad_product<Kernel, T>, t, static_cast<const T*>(gy), static_cast<const T*>(x),
        static_cast<Acc*>(context.workspace));
  });
  launch_wgrad_sum(p, plan.splits, context.workspace, gw, context);
}

void launch_wgrad_sum(const ConvProblem& p, int64_t splits, const void* partial, void* gw,
                      const Context& context) {
  const int64_t weights = p.weight_elements();
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    device::launch(
        {"conv_wgrad_sum", ceil_div(weights, kSumThreads), kSumThreads, 0, context.stream},
        conv_wgrad_sum<T>, weights, static_cast<int>(splits),
        static_cast<const accumulate_t<T>*>(partial), static_cast<T*>(gw));
  });
}

}  // namespace weft::WEFT_TARGET
