// Convolution on Hopper: fprop, and dgrad of stride 1, by warpgroup products and box copies.
//
// A block makes a tile of 128 positions x 64 to 256 channels. One thread of its last warp copies:
// at each step the 64 channels that 128 windows see at one place, which the copy unit gathers
// itself, padding and the borders between rows and images included, and the weights that belong to
// them, into a ring of four stages. Two warpgroups multiply, 64 positions each, sums in registers;
// the stage of the step before is given back as soon as its products are done, so copies, products
// of this step and of the next overlap. Sums run over places, then channels, in ascending order.
// Weights lie [k][place][c], so fprop's are rows along the reduction and dgrad's along columns.
// The epilogue adds the bias, rounds and applies the activation, as conv_mma.cu does; four lanes
// exchange their pairs of columns, so that each stores 16 bytes.
//
// Bound: FLOPs of the tensor cores; a step of a tile of 256 columns multiplies 85 numbers for each
// one that it copies. Compiled for sm_90a and run on the host; not measured on a GPU yet, so it
// runs where Context::sm90a asks for it.
#include "conv/conv_wgmma.h"

namespace weft::WEFT_TARGET {
namespace {

using device::load;
using device::Major;
using device::Pack;

struct Epilogue {
  Activation activation;  // none, relu or leaky_relu
  float slope;
};

// One thread. The tile's first window, then every place with all its channels.
template <class Ring, Major kWeights, int kColumns>
WEFT_DEVICE void produce(const Ring& ring, const TensorMap& map, const TensorMap& weights,
                         const Walk& walk, int64_t first_row, int first_column) {
  device::WindowAt at = window_at(walk, first_row);
  const int places = walk.all_places();
  int step = 0;
  for (int place = 0; place < places; ++place) {
    set_place(walk, place, at);
    const int weight_place = walk.reversed ? places - 1 - place : place;
    for (int i = 0; i < walk.channel_steps; ++i, ++step) {
      const int stage = step % kStages;
      ring.empty[stage].wait(1 - step / kStages % 2);
      ring.full[stage].arrive_expect(Ring::kStageBytes);
      at.channel = i * kDepth;
      copy_windows(walk.rank, ring.a(stage), map, ring.full[stage], at);
      if constexpr (kWeights == Major::reduction) {
        device::tma_load(ring.b(stage), weights, ring.full[stage], at.channel, weight_place,
                         first_column);
      } else {
        for (int piece = 0; piece < kColumns; piece += 64)
          device::tma_load(ring.b(stage) + piece * kDepth, weights, ring.full[stage],
                           first_column + piece, weight_place, at.channel);
      }
    }
  }
}

template <class T, class Ring, Major kWeights, int kColumns>
WEFT_DEVICE void consume(const Ring& ring, int steps, device::WgmmaSums<kColumns>& sums) {
  const int group = device::thread_index() / device::kWarpgroup;
  sums.clear();
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages;
    ring.full[stage].wait(step / kStages % 2);
    const T* a = ring.a(stage) + group * kGroupRows * kDepth;
    const T* b = ring.b(stage);
    device::wgmma_fence(sums);
    WEFT_UNROLL
    for (int k = 0; k < kDepth; k += 16)
      device::wgmma<T, kWeights>(sums, a + k, b + (kWeights == Major::reduction ? k : k * 64));
    device::wgmma_commit();
    device::wgmma_wait<1>(sums);
    if (step > 0 && device::lane() == 0) ring.empty[(step - 1) % kStages].arrive();
  }
  device::wgmma_wait<0>(sums);
}

template <class T>
WEFT_DEVICE uint32_t finished(const Epilogue& epilogue, float sum, float bias) {
  const T rounded = narrow<T>(sum + bias);
  if (epilogue.activation == Activation::none) return rounded.bits;
  const float x = widen(rounded);
  if (epilogue.activation == Activation::relu)  // NaN stays NaN
    return x <= 0 ? 0 : rounded.bits;
  return x > 0 ? rounded.bits : narrow<T>(x * epilogue.slope).bits;
}

// Word q of lane t of four goes to word t of lane q.
WEFT_DEVICE void transpose_words(Pack<uint32_t, 4>& words) {
  const int t = device::lane() % 4;
  WEFT_UNROLL
  for (int mask = 1; mask < 4; mask *= 2) {
    const bool upper = (t & mask) != 0;
    WEFT_UNROLL
    for (int q = 0; q < 4; ++q) {
      if ((q & mask) != 0) continue;
      const uint32_t given = upper ? words[q] : words[q | mask];
      const uint32_t taken = device::shuffle_xor(given, mask);
      words[q] = upper ? taken : words[q];
      words[q | mask] = upper ? words[q | mask] : taken;
    }
  }
}

template <class T, int kColumns>
WEFT_DEVICE void store_sums(const device::WgmmaSums<kColumns>& sums, const Walk& walk,
                            const Epilogue& epilogue, int64_t first_row, int first_column,
                            const T* bias, T* out) {
  using Sums = device::WgmmaSums<kColumns>;
  const int t = device::lane() % 4;
  WEFT_UNROLL
  for (int j = 0; j < kColumns; j += 32) {
    Pack<uint32_t, 4> words[2];  // of this thread's rows
    WEFT_UNROLL
    for (int q = 0; q < 4; ++q) {
      const int i = (j / 8 + q) * 4;
      const int column = first_column + Sums::column(i);
      float added[2] = {0, 0};
      if (bias != nullptr && column < walk.columns) {
        added[0] = widen(load(bias + column));
        added[1] = widen(load(bias + column + 1));
      }
      WEFT_UNROLL
      for (int half = 0; half < 2; ++half)
        words[half][q] = finished<T>(epilogue, sums.value[i + 2 * half], added[0]) |
                         finished<T>(epilogue, sums.value[i + 2 * half + 1], added[1]) << 16;
    }
    const int column = first_column + j + 8 * t;
    WEFT_UNROLL
    for (int half = 0; half < 2; ++half) {
      transpose_words(words[half]);
      const int64_t row = first_row + Sums::row(2 * half);
      if (row >= walk.total_rows || column >= walk.columns) continue;
      device::store(reinterpret_cast<uint32_t*>(out + row * walk.columns + column), words[half]);
    }
  }
}

template <class T, Major kWeights, int kColumns>
WEFT_GLOBAL WEFT_HOT void conv_wgmma_tiles(WEFT_CONSTANT TensorMap map,
                                           WEFT_CONSTANT TensorMap weights, Walk walk,
                                           Epilogue epilogue, const T* bias, T* out) {
  using Stages = Ring<T, kColumns>;
  const Stages ring;
  const int first_column = static_cast<int>(device::block_index() % walk.tiles_n) * kColumns;
  const int64_t first_row = device::block_index() / walk.tiles_n * kRows;
  if (device::thread_index() >= 32 * kConsumerWarps) {
    if (device::lane() == 0)
      produce<Stages, kWeights, kColumns>(ring, map, weights, walk, first_row, first_column);
    return;
  }
  device::WgmmaSums<kColumns> sums;
  consume<T, Stages, kWeights>(ring, walk.steps(), sums);
  const int group = device::thread_index() / device::kWarpgroup;
  store_sums(sums, walk, epilogue, first_row + group * kGroupRows, first_column, bias, out);
}

// ---- launchers -------------------------------------------------------------------------------

// The weights as [k, place, c].
TensorMap weights_of(const ConvProblem& p, const ConvWgmmaPlan& plan, const void* w) {
  const int64_t places = p.window_elements();
  const device::TensorView view{w, p.dtype, 3, {p.c, places, p.k}, {1, p.c, p.c * places}};
  const int rows = plan.windows.reversed ? kDepth : plan.columns;
  return device::tensor_map(view, device::TileBox{{64, 1, rows}});
}

template <class T, Major kWeights, int kColumns>
void launch_tiles(const ConvProblem& p, const ConvWgmmaPlan& plan, const void* map, const void* w,
                  const void* bias, void* out, const Context& context) {
  const Epilogue epilogue =
      plan.windows.reversed ? Epilogue{} : Epilogue{p.activation, static_cast<float>(p.slope)};
  device::launch(
      {plan.windows.reversed ? "conv_dgrad_wgmma" : "conv_fprop_wgmma", plan.tiles_m * plan.tiles_n,
       kThreads, conv_wgmma::shared_bytes(kColumns), context.stream},
      conv_wgmma_tiles<T, kWeights, kColumns>, windows_of(p, plan, kRows, map),
      weights_of(p, plan, w), walk_of(p, plan), epilogue, static_cast<const T*>(bias),
      static_cast<T*>(out));
}

template <class T, Major kWeights>
void launch_width(const ConvProblem& p, const ConvWgmmaPlan& plan, const void* map, const void* w,
                  const void* bias, void* out, const Context& context) {
  switch (plan.columns) {
    case 64:
      return launch_tiles<T, kWeights, 64>(p, plan, map, w, bias, out, context);
    case 128:
      return launch_tiles<T, kWeights, 128>(p, plan, map, w, bias, out, context);
    case 192:
      return launch_tiles<T, kWeights, 192>(p, plan, map, w, bias, out, context);
    default:
      return launch_tiles<T, kWeights, 256>(p, plan, map, w, bias, out, context);
  }
}

template <class T>
void launch_weights(const ConvProblem& p, const ConvWgmmaPlan& plan, const void* map, const void* w,
                    const void* bias, void* out, const Context& context) {
  if (plan.windows.reversed)
    return launch_width<T, Major::columns>(p, plan, map, w, bias, out, context);
  return launch_width<T, Major::reduction>(p, plan, map, w, bias, out, context);
}

}  // namespace

bool launch_wgmma(const ConvProblem& p, ConvProduct step, const void* map, const void* w,
                  const void* bias, void* out, const Context& context) {
  if (!context.sm90a) return false;
  const bool aligned = begins_pack(map) && begins_pack(w) && begins_pack(out);
  const int multiprocessors = device::sm90a_multiprocessors();
  if (multiprocessors == 0) return false;
  const ConvWgmmaPlan plan = plan_conv_wgmma(p, step, aligned, {multiprocessors});
  if (!plan.fits) return false;
  if (p.dtype == DType::bf16)
    launch_weights<bf16>(p, plan, map, w, bias, out, context);
  else
    launch_weights<f16>(p, plan, map, w, bias, out, context);
  return true;
}

}  // namespace weft::WEFT_TARGET
