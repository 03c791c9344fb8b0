// One kernel per word of device/hopper.h, as selftest.cu has for the rest.
//
// Boxes are given back as they lie in shared memory, operands of products are given as they shall
// lie, and sums come back by thread; the test finds each by the index formulas of the PTX manual,
// so neither meaning of a word, the hardware's or the host's, is compared with itself. Numbers that
// a word needs (extents, corners, columns) follow its name.
#include "device/hopper.h"

#include <cstdlib>
#include <cstring>

#include "device/selftest.h"

namespace weft::WEFT_TARGET {
namespace {

using device::load;
using device::load_pack;
using device::MBarrier;
using device::Pack;
using device::store;
using device::TensorMap;

constexpr int kThreads = 128;
using Words = Pack<uint32_t, 4>;

// Warp 0 hands rounds of 32 numbers to warp 1 through a ring of two stages.
WEFT_GLOBAL void mbarrier_ring(const int32_t* in, int32_t* out, int rounds) {
  constexpr int kStages = 2;
  device::SharedMemory memory;
  auto* full = memory.take<MBarrier>(kStages);
  auto* empty = memory.take<MBarrier>(kStages);
  int32_t* values = memory.take<int32_t>(32 * kStages);
  const int lane = device::lane();
  if (device::thread_index() == 0)
    for (int i = 0; i < kStages; ++i) {
      full[i].init(32);
      empty[i].init(32);
    }
  device::barrier();
  for (int round = 0; round < rounds; ++round) {
    const int stage = round % kStages;
    const int parity = round / kStages % 2;
    const int64_t at = (device::block_index() * rounds + round) * 32;
    if (device::thread_index() < 32) {
      empty[stage].wait(1 - parity);  // the phase before the first counts as complete
      values[stage * 32 + lane] = load(in + at + lane);
      full[stage].arrive();
    } else {
      full[stage].wait(parity);
      store(out + at + lane, values[stage * 32 + 31 - lane]);
      empty[stage].arrive();
    }
  }
}

// Copies what a box holds to the output and fills the rest with zeros.
WEFT_DEVICE void give_back(const Words* box, int box_bytes, Words* out, int64_t packs) {
  for (int64_t i = device::thread_index(); i < packs; i += kThreads)
    store(out + i, i * 16 < box_bytes ? box[i] : Words{});
}

WEFT_DEVICE Words* begin_copy(device::SharedMemory& memory, MBarrier*& landed, int box_bytes) {
  auto* box = memory.take<Words, device::kBoxAlignment>(box_bytes / 16);
  landed = memory.take<MBarrier>(1);
  if (device::thread_index() == 0) landed->init(1);
  device::barrier();
  if (device::thread_index() == 0) landed->arrive_expect(box_bytes);
  return box;
}

struct Corner {
  int at[4];
};

WEFT_GLOBAL void tma_tile(WEFT_CONSTANT TensorMap map, int rank, Corner corner, int box_bytes,
                          Words* out, int64_t packs) {
  device::SharedMemory memory;
  MBarrier* landed;
  Words* box = begin_copy(memory, landed, box_bytes);
  const int (&c)[4] = corner.at;
  if (device::thread_index() == 0) {
    if (rank == 2) device::tma_load(box, map, *landed, c[0], c[1]);
    if (rank == 3) device::tma_load(box, map, *landed, c[0], c[1], c[2]);
    if (rank == 4) device::tma_load(box, map, *landed, c[0], c[1], c[2], c[3]);
  }
  landed->wait(0);
  give_back(box, box_bytes, out, packs);
}

WEFT_GLOBAL void tma_windows(WEFT_CONSTANT TensorMap map, int rank, device::WindowAt at,
                             int box_bytes, Words* out, int64_t packs) {
  device::SharedMemory memory;
  MBarrier* landed;
  Words* box = begin_copy(memory, landed, box_bytes);
  if (device::thread_index() == 0) {
    if (rank == 3) device::tma_load_im2col<3>(box, map, *landed, at);
    if (rank == 4) device::tma_load_im2col<4>(box, map, *landed, at);
    if (rank == 5) device::tma_load_im2col<5>(box, map, *landed, at);
  }
  landed->wait(0);
  give_back(box, box_bytes, out, packs);
}

constexpr int kDepth = 64;
constexpr int kTileBytes = 64 * device::kBoxRowBytes;  // of 64 rows

// Two warpgroups: a tile of a for each, one of b for both, then a · b, twice.
template <class T, device::Major kMajorB, device::Major kMajorA, int N>
WEFT_GLOBAL void wgmma_record(const Words* in, float* out) {
  constexpr bool kAColumns = kMajorA == device::Major::columns;
  constexpr bool kBColumns = kMajorB == device::Major::columns;
  constexpr int kBytesB = N * device::kBoxRowBytes;
  device::SharedMemory memory;
  auto* tiles = memory.take<Words, device::kBoxAlignment>((2 * kTileBytes + kBytesB) / 16);
  for (int i = device::thread_index(); i < (2 * kTileBytes + kBytesB) / 16; i += 2 * kThreads)
    tiles[i] = load_pack<4>(reinterpret_cast<const uint32_t*>(in + i));
  device::fence_async();
  device::barrier();
  const T* a = reinterpret_cast<const T*>(tiles) + device::thread_index() / kThreads * 64 * kDepth;
  const T* b = reinterpret_cast<const T*>(tiles) + 2 * 64 * kDepth;
  device::WgmmaSums<N> sums;
  sums.clear();
  device::wgmma_fence(sums);
  for (int round = 0; round < 2; ++round) {
    for (int k = 0; k < kDepth; k += 16)
      device::wgmma<T, kMajorB, kMajorA>(sums, a + (kAColumns ? k * 64 : k),
                                         b + (kBColumns ? k * 64 : k));
    device::wgmma_commit();
    device::wgmma_wait<1>(sums);
  }
  device::wgmma_wait<0>(sums);
  for (int i = 0; i < N / 2; ++i)
    store(out + int64_t{1} * device::thread_index() * (N / 2) + i, sums.value[i]);
}

// ---- launchers -------------------------------------------------------------------------------

// The numbers after a word's name.
struct Numbers {
  int count = 0;
  int value[32] = {};

  explicit Numbers(const char* text) {
    for (text = strchr(text, ' '); text != nullptr && count < 32; text = strchr(text + 1, ' '))
      value[count++] = atoi(text + 1);
  }
};

// A tensor of 16-bit elements without gaps: rank, then extents, fastest first.
device::TensorView view_of(const void* in, const int* number) {
  device::TensorView view;
  view.base = in;
  view.rank = number[0];
  int64_t step = 1;
  for (int a = 0; a < view.rank; ++a) {
    view.extent[a] = number[1 + a];
    view.step[a] = step;
    step *= view.extent[a];
  }
  return view;
}

constexpr int64_t shared_for(int64_t bytes) { return bytes + device::kBoxAlignment; }

// rank, 4 extents, 4 of the box, 4 of its corner
bool run_tile(const Numbers& n, const void* in, void* out, int64_t bytes, const Context& context) {
  device::TileBox box;
  Corner corner;
  int box_bytes = 2;
  for (int a = 0; a < 4; ++a) {
    box.extent[a] = n.value[5 + a];
    corner.at[a] = n.value[9 + a];
    if (a < n.value[0]) box_bytes *= box.extent[a];
  }
  device::launch({"tma_tile", 1, kThreads, shared_for(box_bytes), context.stream}, tma_tile,
                 device::tensor_map(view_of(in, n.value), box), n.value[0], corner, box_bytes,
                 static_cast<Words*>(out), bytes / 16);
  return true;
}

// rank, 5 extents, pixels, (lower, upper, stride, base, offset) for W, H, D, then channel, image
bool run_windows(const Numbers& n, const void* in, void* out, int64_t bytes,
                 const Context& context) {
  device::WindowBox box;
  device::WindowAt at;
  box.pixels = n.value[6];
  for (int a = 0; a < 3; ++a) {
    const int* number = n.value + 7 + 5 * a;
    box.lower[a] = number[0];
    box.upper[a] = number[1];
    box.stride[a] = number[2];
    at.base[a] = number[3];
    at.offset[a] = number[4];
  }
  at.channel = n.value[22];
  at.image = n.value[23];
  const int box_bytes = box.pixels * device::kBoxRowBytes;
  device::launch({"tma_windows", 1, kThreads, shared_for(box_bytes), context.stream}, tma_windows,
                 device::tensor_map(view_of(in, n.value), box), n.value[0], at, box_bytes,
                 static_cast<Words*>(out), bytes / 16);
  return true;
}

template <class T, device::Major kMajorB, device::Major kMajorA, int N>
bool run_wgmma_of(const void* in, void* out, const Context& context) {
  device::launch({"wgmma", 1, 2 * kThreads, shared_for(6 * kTileBytes), context.stream},
                 wgmma_record<T, kMajorB, kMajorA, N>, static_cast<const Words*>(in),
                 static_cast<float*>(out));
  return true;
}

template <class T, device::Major kMajorB, device::Major kMajorA = device::Major::reduction>
bool run_wgmma(int columns, const void* in, void* out, const Context& context) {
  if constexpr (kMajorB == device::Major::reduction) {
    if (columns == 8) return run_wgmma_of<T, kMajorB, kMajorA, 8>(in, out, context);
    if (columns == 40) return run_wgmma_of<T, kMajorB, kMajorA, 40>(in, out, context);
  }
  if (columns == 64) return run_wgmma_of<T, kMajorB, kMajorA, 64>(in, out, context);
  if (columns == 128) return run_wgmma_of<T, kMajorB, kMajorA, 128>(in, out, context);
  if (columns == 256) return run_wgmma_of<T, kMajorB, kMajorA, 256>(in, out, context);
  return false;
}

bool run(const char* word, const void* in, void* out, int64_t bytes, const Context& context) {
  using device::Major;
  const Numbers n(word);
  const auto is = [&](const char* name) {
    return strncmp(word, name, strlen(name)) == 0 && word[strlen(name)] == ' ';
  };
  if (is("mbarrier")) {
    const int rounds = n.value[0];
    device::launch({"mbarrier", bytes / (128 * rounds), 64, 512, context.stream}, mbarrier_ring,
                   static_cast<const int32_t*>(in), static_cast<int32_t*>(out), rounds);
    return true;
  }
  if (is("tma_load")) return run_tile(n, in, out, bytes, context);
  if (is("tma_load_im2col")) return run_windows(n, in, out, bytes, context);
  if (is("wgmma.bf16")) return run_wgmma<bf16, Major::reduction>(n.value[0], in, out, context);
  if (is("wgmma.f16")) return run_wgmma<f16, Major::reduction>(n.value[0], in, out, context);
  if (is("wgmma.bf16.columns"))
    return run_wgmma<bf16, Major::columns>(n.value[0], in, out, context);
  if (is("wgmma.f16.columns")) return run_wgmma<f16, Major::columns>(n.value[0], in, out, context);
  if (is("wgmma.bf16.both"))
    return run_wgmma<bf16, Major::columns, Major::columns>(n.value[0], in, out, context);
  if (is("wgmma.f16.both"))
    return run_wgmma<f16, Major::columns, Major::columns>(n.value[0], in, out, context);
  return false;
}

}  // namespace

const SelftestKernels hopper_selftest_kernels = {run};

}  // namespace weft::WEFT_TARGET
