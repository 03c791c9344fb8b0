// The weight gradient on Hopper: gw[k, place, c] = Σ_window gy[window, k] · x[window at place, c].
//
// A block makes a tile of 128 output channels x 64 to 256 channels of one place, over a run of
// windows: at each step one thread of its last warp copies the gradients of 64 windows and what
// they see at the place (conv_wgmma.h); two warpgroups multiply, 64 output channels each. Both
// operands lie by windows in memory, and so in shared memory: rows along columns, for both. There
// are few weights and many windows, so the walk is split; a second launch adds the partial sums in
// order.
//
// Bound: FLOPs of the tensor cores; x is copied once a tile of output channels and place, gy once a
// place. Compiled for sm_90a and run on the host; not measured on a GPU yet.
#include "conv/conv_wgmma.h"

namespace weft::WEFT_TARGET {
namespace {

using device::Major;

constexpr int kPiece = 64 * kDepth;  // elements of 64 channels of a step

struct Tiles {
  int tiles_m, chunks;  // of output channels; of the channels of a place
  int k, c;
  int split_steps;
  int steps;  // of the whole walk
};

// A block's part: steps [first, end) of the walk for a tile of channels.
struct Part {
  int place, first_channel, first_k, split, first, end;
};

template <int kColumns>
WEFT_DEVICE Part part_of_block(const Tiles& tiles, int places) {
  auto index = static_cast<int>(device::block_index());
  Part part;
  part.first_channel = index % tiles.chunks * kColumns;
  index /= tiles.chunks;
  part.place = index % places;
  index /= places;
  part.first_k = index % tiles.tiles_m * kRows;
  part.split = index / tiles.tiles_m;
  part.first = part.split * tiles.split_steps;
  part.end = part.first + tiles.split_steps;
  if (part.end > tiles.steps) part.end = tiles.steps;
  return part;
}

// One thread.
template <class Stages, int kColumns>
WEFT_DEVICE void produce(const Stages& ring, const TensorMap& x, const TensorMap& gy,
                         const Walk& walk, const Part& part) {
  for (int step = part.first; step < part.end; ++step) {
    const int done = step - part.first, stage = done % kStages;
    ring.empty[stage].wait(1 - done / kStages % 2);
    ring.full[stage].arrive_expect(Stages::kStageBytes);
    for (int i = 0; i < kRows / 64; ++i)
      device::tma_load(ring.a(stage) + i * kPiece, gy, ring.full[stage], part.first_k + 64 * i,
                       step * kDepth);
    device::WindowAt at = window_at(walk, int64_t{1} * step * kDepth);
    set_place(walk, part.place, at);
    for (int i = 0; i < kColumns / 64; ++i) {
      at.channel = part.first_channel + 64 * i;
      copy_windows(walk.rank, ring.b(stage) + i * kPiece, x, ring.full[stage], at);
    }
  }
}

template <class T, class Stages, int kColumns>
WEFT_DEVICE void consume(const Stages& ring, int steps, device::WgmmaSums<kColumns>& sums) {
  const int group = device::thread_index() / device::kWarpgroup;
  sums.clear();
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages;
    ring.full[stage].wait(step / kStages % 2);
    const T* a = ring.a(stage) + group * kPiece;
    const T* b = ring.b(stage);
    device::wgmma_fence(sums);
    WEFT_UNROLL
    for (int k = 0; k < kDepth; k += 16)
      device::wgmma<T, Major::columns, Major::columns>(sums, a + k * 64, b + k * 64);
    device::wgmma_commit();
    device::wgmma_wait<1>(sums);
    if (step > 0 && device::lane() == 0) ring.empty[(step - 1) % kStages].arrive();
  }
  device::wgmma_wait<0>(sums);
}

// partial [splits, K, places, C]
template <class T, int kColumns>
WEFT_GLOBAL WEFT_HOT void conv_wgmma_wgrad(WEFT_CONSTANT TensorMap x, WEFT_CONSTANT TensorMap gy,
                                           Walk walk, Tiles tiles, float* partial) {
  using Stages = Ring<T, kColumns>;
  using Sums = device::WgmmaSums<kColumns>;
  const Stages ring;
  const int places = walk.all_places();
  const Part part = part_of_block<kColumns>(tiles, places);
  if (device::thread_index() >= 32 * kConsumerWarps) {
    if (device::lane() == 0) produce<Stages, kColumns>(ring, x, gy, walk, part);
    return;
  }
  Sums sums;
  consume<T, Stages>(ring, part.end - part.first, sums);
  const int group = device::thread_index() / device::kWarpgroup;
  WEFT_UNROLL
  for (int i = 0; i < Sums::kCount; i += 2) {
    const int k = part.first_k + group * kGroupRows + Sums::row(i);
    const int channel = part.first_channel + Sums::column(i);
    if (k >= tiles.k || channel >= tiles.c) continue;
    const int64_t row = (int64_t{1} * part.split * tiles.k + k) * places + part.place;
    device::store(partial + row * tiles.c + channel,
                  device::Pack<float, 2>{{sums.value[i], sums.value[i + 1]}});
  }
}

template <class T, int kColumns>
void launch_tiles(const ConvProblem& p, const ConvWgmmaPlan& plan, const void* x, const void* gy,
                  const Context& context) {
  const ConvWindows windows = conv_windows(p);
  const int64_t rows = p.n * p.out_positions();
  const device::TensorView gradients{gy, p.dtype, 2, {p.k, rows}, {1, p.k}};
  const Tiles tiles{static_cast<int>(plan.tiles_m),
                    static_cast<int>(plan.tiles_n / p.window_elements()),
                    static_cast<int>(p.k),
                    static_cast<int>(p.c),
                    static_cast<int>(plan.split_steps),
                    static_cast<int>(ceil_div(rows, kDepth))};
  device::launch({"conv_wgrad_wgmma", plan.blocks(), kThreads, conv_wgmma::shared_bytes(kColumns),
                  context.stream},
                 conv_wgmma_wgrad<T, kColumns>, map_of(p, plan, windows, kDepth, x),
                 device::tensor_map(gradients, device::TileBox{{64, kDepth}}),
                 walk_of(p, plan, windows), tiles, static_cast<float*>(context.workspace));
}

}  // namespace

bool launch_wgmma_wgrad(const ConvProblem& p, const void* x, const void* gy, void* gw,
                        const Context& context) {
  if (!context.sm90a || device::sm90a_multiprocessors() == 0) return false;
  const ConvWgmmaPlan plan =
      plan_conv_wgmma(p, ConvProduct::wgrad, begins_pack(x) && begins_pack(gy));
  if (!plan.fits) return false;
  dispatch_wgmma(p, plan, [&](auto element, auto columns) {
    launch_tiles<decltype(element), columns.value>(p, plan, x, gy, context);
  });
  launch_wgrad_sum(p, plan.splits, context.workspace, gw, context);
  return true;
}

}  // namespace weft::WEFT_TARGET
