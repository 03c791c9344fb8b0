// Convolution on CUDA: the window walk, for what the tile product (conv_mma.cu) does not suit.
//
// fprop: a thread owns one output and walks its window over the channels of its group. dgrad: a
// thread owns one *input* and gathers from the outputs whose windows hold it. wgrad: a warp owns
// one weight; its lanes stride over images and positions and meet in a tree of shuffles. bias_grad:
// a block owns one channel. Every sum has one fixed order and nothing is atomic, so the bits never
// change; the channels of a place are summed first, which rounds less than one long chain.
// Neighbouring threads own neighbouring elements in memory, so accesses to the map coalesce along W
// (contiguous) or K (channels-last), and weights are broadcast. Bound: for dense problems FLOPs,
// which this walk leaves to the FMA pipes and to L1; the tile product is what gets them to the
// tensor cores. For depthwise problems bytes.
#include "conv/conv_cuda.h"
#include "device/index.h"

namespace weft::WEFT_TARGET {
namespace {

using device::global_thread;
using device::load;
using device::store;

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWgradThreads = 128;

// An element of a map: its image, its channel among all groups', its position.
struct Element {
  int64_t n, channel, d, h, w;
};

WEFT_DEVICE Element split(int64_t flat, int64_t channels, const int64_t (&extent)[3],
                          bool channels_last) {
  const device::Element e = device::split(flat, extent, channels_last ? channels : 1);
  if (channels_last) return {e.outer, e.inner, e.d, e.h, e.w};
  return {e.outer / channels, e.outer % channels, e.d, e.h, e.w};
}

// Where channel 0 of a position of image n lies, and how far the next channel is.
struct Pixel {
  int64_t base;
  int64_t step;
};

WEFT_DEVICE Pixel pixel(int64_t n, int64_t d, int64_t h, int64_t w, int64_t channels,
                        const int64_t (&extent)[3], bool channels_last) {
  const int64_t positions = extent[0] * extent[1] * extent[2];
  const int64_t at = (d * extent[1] + h) * extent[2] + w;
  if (channels_last) return {(n * positions + at) * channels, 1};
  return {n * channels * positions + at, positions};
}

// Where input channel 0 of weight (k, place) lies, and how far the next input channel is.
WEFT_DEVICE Pixel weight_at(const ConvProblem& p, int64_t k, int64_t place) {
  const int64_t places = p.window_elements();
  if (p.channels_last) return {(k * places + place) * p.c, 1};
  return {k * p.c * places + place, places};
}

// Without an activation the kernel keeps the registers that tanh and exp would take.
template <class T, bool kActivated>
WEFT_GLOBAL WEFT_HOT void conv_fprop(ConvProblem p, const T* x, const T* w, const T* bias, T* y) {
  const int64_t index = global_thread();
  if (index >= p.out_elements()) return;
  const Element e = split(index, p.out_channels(), p.out, p.channels_last);
  const int64_t first_channel = e.channel / p.k * p.c;
  const Range kd = places_inside(p.window[0], e.d, p.in[0]);
  const Range kh = places_inside(p.window[1], e.h, p.in[1]);
  const Range kw = places_inside(p.window[2], e.w, p.in[2]);
  accumulate_t<T> sum = 0;
  for (int64_t i = kd.begin; i < kd.end; ++i)
    for (int64_t j = kh.begin; j < kh.end; ++j)
      for (int64_t l = kw.begin; l < kw.end; ++l) {
        const int64_t d = p.window[0].first_input(e.d) + i * p.window[0].dilation;
        const int64_t h = p.window[1].first_input(e.h) + j * p.window[1].dilation;
        const int64_t column = p.window[2].first_input(e.w) + l * p.window[2].dilation;
        const Pixel from = pixel(e.n, d, h, column, p.in_channels(), p.in, p.channels_last);
        const Pixel by = weight_at(p, e.channel, (i * p.window[1].size + j) * p.window[2].size + l);
        accumulate_t<T> part = 0;
        for (int64_t c = 0; c < p.c; ++c)
          part += widen(load(x + from.base + (first_channel + c) * from.step)) *
                  widen(load(w + by.base + c * by.step));
        sum += part;
      }
  if (bias != nullptr) sum += widen(load(bias + e.channel));
  T result = narrow<T>(sum);
  if constexpr (kActivated) result = narrow<T>(activated(p.activation, p.slope, widen(result)));
  store(y + index, result);
}

template <class T>
WEFT_GLOBAL WEFT_HOT void conv_dgrad(ConvProblem p, const T* gy, const T* w, const T* bias, T* gx) {
  const int64_t index = global_thread();
  if (index >= p.in_elements()) return;
  const Element e = split(index, p.in_channels(), p.in, p.channels_last);
  const int64_t first_channel = e.channel / p.c * p.k;
  const int64_t c = e.channel % p.c;
  const Range od = outputs_covering(p.window[0], e.d, p.out[0]);
  const Range oh = outputs_covering(p.window[1], e.h, p.out[1]);
  const Range ow = outputs_covering(p.window[2], e.w, p.out[2]);
  accumulate_t<T> sum = 0;
  for (int64_t d = od.begin; d < od.end; ++d)
    for (int64_t h = oh.begin; h < oh.end; ++h)
      for (int64_t column = ow.begin; column < ow.end; ++column) {
        const int64_t i = place_of(p.window[0], e.d, d);
        const int64_t j = place_of(p.window[1], e.h, h);
        const int64_t l = place_of(p.window[2], e.w, column);
        if (i < 0 || j < 0 || l < 0) continue;
        const int64_t place = (i * p.window[1].size + j) * p.window[2].size + l;
        const Pixel from = pixel(e.n, d, h, column, p.out_channels(), p.out, p.channels_last);
        accumulate_t<T> part = 0;
        for (int64_t k = first_channel; k < first_channel + p.k; ++k) {
          const Pixel by = weight_at(p, k, place);
          part +=
              widen(load(gy + from.base + k * from.step)) * widen(load(w + by.base + c * by.step));
        }
        sum += part;
      }
  if (bias != nullptr) sum += widen(load(bias + e.channel));
  store(gx + index, narrow<T>(sum));
}

// The same value in all lanes: their sum, in a fixed order.
template <class Acc>
WEFT_DEVICE Acc warp_sum(Acc value) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += device::shuffle_xor(value, mask);
  return value;
}

template <class T>
WEFT_GLOBAL WEFT_HOT void conv_wgrad(ConvProblem p, const T* x, const T* gy, T* gw) {
  const int64_t index = global_thread() / kWarp;
  if (index >= p.weight_elements()) return;  // whole warps leave: a warp owns one weight
  const int64_t places = p.window_elements();
  int64_t flat = index;
  const int64_t inner = flat % (p.channels_last ? p.c : places);
  flat /= p.channels_last ? p.c : places;
  const int64_t middle = flat % (p.channels_last ? places : p.c);
  const int64_t k = flat / (p.channels_last ? places : p.c);
  const int64_t c = p.channels_last ? inner : middle;
  const int64_t place = p.channels_last ? middle : inner;
  const int64_t channel = k / p.k * p.c + c;
  const int64_t offset[3] = {
      place / p.window[2].size / p.window[1].size * p.window[0].dilation - p.window[0].padding,
      place / p.window[2].size % p.window[1].size * p.window[1].dilation - p.window[1].padding,
      place % p.window[2].size * p.window[2].dilation - p.window[2].padding};
  accumulate_t<T> sum = 0;
  for (int64_t at = device::lane(); at < p.n * p.out_positions(); at += kWarp) {
    const int64_t ow = at % p.out[2];
    const int64_t oh = at / p.out[2] % p.out[1];
    const int64_t od = at / p.out[2] / p.out[1] % p.out[0];
    const int64_t n = at / p.out_positions();
    const int64_t d = od * p.window[0].stride + offset[0];
    const int64_t h = oh * p.window[1].stride + offset[1];
    const int64_t w = ow * p.window[2].stride + offset[2];
    if (d < 0 || d >= p.in[0] || h < 0 || h >= p.in[1] || w < 0 || w >= p.in[2]) continue;
    const Pixel from = pixel(n, d, h, w, p.in_channels(), p.in, p.channels_last);
    const Pixel to = pixel(n, od, oh, ow, p.out_channels(), p.out, p.channels_last);
    sum +=
        widen(load(x + from.base + channel * from.step)) * widen(load(gy + to.base + k * to.step));
  }
  sum = warp_sum(sum);
  if (device::lane() == 0) store(gw + index, narrow<T>(sum));
}

template <class T>
WEFT_GLOBAL WEFT_HOT void conv_bias_grad(ConvProblem p, const T* gy, T* gb) {
  using Acc = accumulate_t<T>;
  device::SharedMemory shared;
  Acc* partial = shared.take<Acc>(kThreads / kWarp);
  const int64_t k = device::block_index();
  const int64_t positions = p.out_positions();
  Acc sum = 0;
  for (int64_t at = device::thread_index(); at < p.n * positions; at += kThreads) {
    const int64_t index =
        p.channels_last ? at * p.out_channels() + k
                        : (at / positions * p.out_channels() + k) * positions + at % positions;
    sum += widen(load(gy + index));
  }
  sum = warp_sum(sum);
  if (device::lane() == 0) partial[device::thread_index() / kWarp] = sum;
  device::barrier();
  if (device::thread_index() != 0) return;
  Acc total = 0;
  for (int i = 0; i < kThreads / kWarp; ++i) total += partial[i];
  store(gb + k, narrow<T>(total));
}

// ---- launchers -------------------------------------------------------------------------------

void launch_fprop(const ConvProblem& p, const void* x, const void* w, const void* bias, void* y,
                  const Context& context) {
  if (const DepthwisePlan tiles = plan_depthwise(p, ConvProduct::fprop); tiles.tiled)
    return launch_depthwise_gather(p, tiles, false, x, w, bias, y, context);
  if (launch_wgmma_fprop(p, x, w, bias, y, context)) return;
  const bool aligned = begins_pack(x) && begins_pack(w);
  const ConvCudaPlan plan = plan_conv_cuda(p, ConvProduct::fprop, aligned);
  if (plan.path == ConvCudaPlan::Path::product)
    return launch_fprop_product(p, plan, x, w, bias, y, context);
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto kernel =
        p.activation == Activation::none ? conv_fprop<T, false> : conv_fprop<T, true>;
    device::launch(
        {"conv_fprop", ceil_div(p.out_elements(), kThreads), kThreads, 0, context.stream}, kernel,
        p, static_cast<const T*>(x), static_cast<const T*>(w), static_cast<const T*>(bias),
        static_cast<T*>(y));
  });
}

void launch_dgrad(const ConvProblem& p, const void* gy, const void* w, const void* bias, void* gx,
                  const Context& context) {
  if (const DepthwisePlan tiles = plan_depthwise(p, ConvProduct::dgrad); tiles.tiled)
    return launch_depthwise_gather(p, tiles, true, gy, w, bias, gx, context);
  if (launch_wgmma_dgrad(p, gy, w, bias, gx, context)) return;
  const bool aligned = begins_pack(gy) && begins_pack(w);
  const ConvCudaPlan plan = plan_conv_cuda(p, ConvProduct::dgrad, aligned);
  if (plan.path == ConvCudaPlan::Path::product)
    return launch_dgrad_product(p, plan, gy, w, bias, gx, context);
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    device::launch({"conv_dgrad", ceil_div(p.in_elements(), kThreads), kThreads, 0, context.stream},
                   conv_dgrad<T>, p, static_cast<const T*>(gy), static_cast<const T*>(w),
                   static_cast<const T*>(bias), static_cast<T*>(gx));
  });
}

void launch_wgrad(const ConvProblem& p, const void* x, const void* gy, void* gw,
                  const Context& context) {
  if (const DepthwisePlan tiles = plan_depthwise(p, ConvProduct::wgrad); tiles.tiled)
    return launch_depthwise_wgrad(p, tiles, x, gy, gw, context);
  if (launch_wgmma_wgrad(p, x, gy, gw, context)) return;
  const bool aligned = begins_pack(x) && begins_pack(gy);
  const ConvCudaPlan plan = plan_conv_cuda(p, ConvProduct::wgrad, aligned);
  if (plan.path == ConvCudaPlan::Path::product)
    return launch_wgrad_product(p, plan, x, gy, gw, context);
  constexpr int kWeightsPerBlock = kWgradThreads / kWarp;
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    device::launch({"conv_wgrad", ceil_div(p.weight_elements(), kWeightsPerBlock), kWgradThreads, 0,
                    context.stream},
                   conv_wgrad<T>, p, static_cast<const T*>(x), static_cast<const T*>(gy),
                   static_cast<T*>(gw));
  });
}

void launch_bias_grad(const ConvProblem& p, const void* gy, void* gb, const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int64_t kSharedBytes = kThreads / kWarp * sizeof(accumulate_t<T>);
    device::launch({"conv_bias_grad", p.out_channels(), kThreads, kSharedBytes, context.stream},
                   conv_bias_grad<T>, p, static_cast<const T*>(gy), static_cast<T*>(gb));
  });
}

// Alignment is not known yet; the plan for unaligned maps may split more.
int64_t workspace_of_wgrad(const ConvProblem& p) {
  if (const DepthwisePlan tiles = plan_depthwise(p, ConvProduct::wgrad); tiles.tiled)
    return wgrad_workspace(p, tiles);
  const auto bytes = [&](bool aligned) {
    return wgrad_workspace(p, plan_conv_cuda(p, ConvProduct::wgrad, aligned));
  };
  return std::max(bytes(true), bytes(false));
}

}  // namespace

const ConvKernels conv_kernels = {launch_fprop, launch_dgrad, launch_wgrad, launch_bias_grad,
                                  workspace_of_wgrad};

}  // namespace weft::WEFT_TARGET
