// Faults of Hopper's words, planted: kernels that are wrong on purpose, as in faults.cpp.
#include <cstring>

#include "device/hopper.h"
#include "device/selftest.h"

namespace weft::WEFT_TARGET {
namespace {

using device::load;
using device::MBarrier;
using device::store;
using device::TensorMap;

constexpr int kThreads = 128;
constexpr int kRows = 4;  // of 32 numbers, 128 bytes: the input, and a box
constexpr int kBoxBytes = kRows * device::kBoxRowBytes;

// The input as [row, 32] for boxes, and as [1, row, 32] for windows without padding.
struct Maps {
  TensorMap tile;
  TensorMap windows;
};

// What most of these kernels share: a box, a barrier that expects one arrival.
struct Stage {
  device::SharedMemory memory;
  int32_t* box = memory.take<int32_t, device::kBoxAlignment>(kBoxBytes / 4);
  MBarrier* landed = memory.take<MBarrier>(1);

  Stage() {
    if (device::thread_index() == 0) landed->init(1);
    device::barrier();
  }
};

bool first() { return device::thread_index() == 0; }
void finish(const int32_t* in, int32_t* out) {
  store(out + device::thread_index(), load(in + device::thread_index()));
}

// ---- barriers that count bytes ---------------------------------------------------------------

void lost_arrival(const int32_t* in, int32_t* out, const Maps&) {
  device::SharedMemory memory;
  auto* met = memory.take<MBarrier>(1);
  if (first()) met->init(kThreads);
  device::barrier();
  if (device::thread_index() != 40) met->arrive();
  if (device::thread_index() < 32) met->wait(0);
  finish(in, out);
}

void extra_arrival(const int32_t* in, int32_t* out, const Maps& maps) {
  Stage stage;
  if (first()) {
    stage.landed->arrive_expect(kBoxBytes);
    device::tma_load(stage.box, maps.tile, *stage.landed, 0, 0);
  }
  device::barrier();
  if (device::thread_index() == 9) stage.landed->arrive();
  device::barrier();
  stage.landed->wait(0);
  finish(in, out);
}

void uninitialised_mbarrier(const int32_t* in, int32_t* out, const Maps&) {
  device::SharedMemory memory;
  memory.take<MBarrier>(1)->arrive();
  finish(in, out);
}

// ---- copies of boxes -------------------------------------------------------------------------

void missing_bytes(const int32_t* in, int32_t* out, const Maps& maps) {
  Stage stage;
  if (first()) {
    stage.landed->arrive_expect(2 * kBoxBytes);
    device::tma_load(stage.box, maps.tile, *stage.landed, 0, 0);
  }
  stage.landed->wait(0);
  finish(in, out);
}

void too_many_bytes(const int32_t* in, int32_t* out, const Maps& maps) {
  Stage stage;
  if (first()) {
    stage.landed->arrive_expect(kBoxBytes / 2);
    device::tma_load(stage.box, maps.tile, *stage.landed, 0, 0);
  }
  stage.landed->wait(0);
  finish(in, out);
}

void boxes_in_flight(const int32_t* in, int32_t* out, const Maps& maps) {
  Stage stage;
  if (first()) {
    stage.landed->arrive_expect(kBoxBytes);
    device::tma_load(stage.box, maps.tile, *stage.landed, 0, 0);
  }
  finish(in, out);
}

void early_box_read(const int32_t*, int32_t* out, const Maps& maps) {
  Stage stage;
  if (first()) {
    stage.landed->arrive_expect(kBoxBytes);
    device::tma_load(stage.box, maps.tile, *stage.landed, 0, 0);
  }
  device::barrier();
  store(out + device::thread_index(), stage.box[device::thread_index()]);
  device::barrier();
  stage.landed->wait(0);
}

void misaligned_box(const int32_t* in, int32_t* out, const Maps& maps) {
  Stage stage;
  if (first()) device::tma_load(stage.box + 8, maps.tile, *stage.landed, 0, 0);
  finish(in, out);
}

void unswizzled_box(const int32_t* in, int32_t* out, const Maps& maps) {
  device::SharedMemory memory;
  auto* box = memory.take<int32_t, device::kBoxAlignment>(2 * kBoxBytes / 4);
  auto* landed = memory.take<MBarrier>(1);
  if (first()) {
    landed->init(1);
    device::tma_load(box + device::kBoxRowBytes / 4, maps.tile, *landed, 0, 0);
  }
  finish(in, out);
}

void box_outside_shared(const int32_t* in, int32_t* out, const Maps& maps) {
  Stage stage;
  if (first())
    device::tma_load(stage.box + device::kBoxRowBytes / 4, maps.tile, *stage.landed, 0, 0);
  finish(in, out);
}

void window_outside_box(const int32_t* in, int32_t* out, const Maps& maps) {
  Stage stage;
  if (first()) device::tma_load_im2col<3>(stage.box, maps.windows, *stage.landed, {0, {-1}, 0, {}});
  finish(in, out);
}

void window_by_a_tile_map(const int32_t* in, int32_t* out, const Maps& maps) {
  Stage stage;
  if (first()) device::tma_load_im2col<3>(stage.box, maps.tile, *stage.landed, {});
  finish(in, out);
}

// ---- products of a warpgroup -----------------------------------------------------------------

constexpr int kColumns = 8;

struct Product {
  device::SharedMemory memory;
  bf16* a = memory.take<bf16, device::kBoxAlignment>(64 * 64);
  bf16* b = memory.take<bf16, device::kBoxAlignment>(kColumns * 64);
  device::WgmmaSums<kColumns> sums;

  Product() {
    const int thread = device::thread_index();
    for (int i = thread; i < 64 * 64; i += kThreads) a[i] = narrow<bf16>(1);
    for (int i = thread; i < kColumns * 64; i += kThreads) b[i] = narrow<bf16>(1);
    sums.clear();
    device::fence_async();
    device::barrier();
  }

  void multiply() {
    device::wgmma_fence(sums);
    device::wgmma(sums, a, b);
    device::wgmma_commit();
  }
};

void lost_wgmma_warp(const int32_t* in, int32_t* out, const Maps&) {
  Product p;
  device::wgmma_fence(p.sums);
  if (device::thread_index() < 96) device::wgmma(p.sums, p.a, p.b);
  finish(in, out);
}

void unequal_wgmma(const int32_t* in, int32_t* out, const Maps&) {
  Product p;
  device::wgmma_fence(p.sums);
  device::wgmma(p.sums, device::thread_index() == 77 ? p.a + 16 : p.a, p.b);
  finish(in, out);
}

void misaligned_wgmma(const int32_t* in, int32_t* out, const Maps&) {
  Product p;
  device::wgmma_fence(p.sums);
  device::wgmma(p.sums, p.a + 8, p.b);
  finish(in, out);
}

void wgmma_outside_shared(const int32_t* in, int32_t* out, const Maps&) {
  Product p;
  device::wgmma_fence(p.sums);
  device::wgmma(p.sums, p.a + 8 * 64, p.b);
  finish(in, out);
}

void wgmma_without_fence(const int32_t* in, int32_t* out, const Maps&) {
  Product p;
  p.multiply();
  device::wgmma_wait<0>(p.sums);
  device::wgmma(p.sums, p.a, p.b);
  finish(in, out);
}

void products_in_flight(const int32_t* in, int32_t* out, const Maps&) {
  Product p;
  p.multiply();
  finish(in, out);
}

void early_sums(const int32_t*, int32_t* out, const Maps&) {
  Product p;
  p.multiply();
  p.multiply();
  device::wgmma_wait<1>(p.sums);
  int32_t bits;
  memcpy(&bits, &p.sums.value[1], sizeof(bits));
  store(out + device::thread_index(), bits);
  device::wgmma_wait<0>(p.sums);
}

// The first warp to wait lets the others' operand be overwritten.
void overwritten_operand(const int32_t* in, int32_t* out, const Maps&) {
  Product p;
  p.multiply();
  if (device::thread_index() % 32 == 31) p.b[0] = narrow<bf16>(2);
  device::barrier();
  device::wgmma_wait<0>(p.sums);
  finish(in, out);
}

struct Fault {
  const char* word;
  void (*kernel)(const int32_t*, int32_t*, const Maps&);
};

constexpr Fault kFaults[] = {
    {"lost_arrival", lost_arrival},
    {"extra_arrival", extra_arrival},
    {"uninitialised_mbarrier", uninitialised_mbarrier},
    {"missing_bytes", missing_bytes},
    {"too_many_bytes", too_many_bytes},
    {"boxes_in_flight", boxes_in_flight},
    {"early_box_read", early_box_read},
    {"misaligned_box", misaligned_box},
    {"unswizzled_box", unswizzled_box},
    {"box_outside_shared", box_outside_shared},
    {"window_outside_box", window_outside_box},
    {"window_by_a_tile_map", window_by_a_tile_map},
    {"lost_wgmma_warp", lost_wgmma_warp},
    {"unequal_wgmma", unequal_wgmma},
    {"misaligned_wgmma", misaligned_wgmma},
    {"wgmma_outside_shared", wgmma_outside_shared},
    {"wgmma_without_fence", wgmma_without_fence},
    {"products_in_flight", products_in_flight},
    {"early_sums", early_sums},
    {"overwritten_operand", overwritten_operand},
};

bool run(const char* word, const void* in, void* out, int64_t, const Context& context) {
  for (const Fault& fault : kFaults) {
    if (strcmp(word, fault.word) != 0) continue;
    const device::TensorView rows{in, DType::f32, 2, {32, kRows}, {1, 32}};
    const device::TensorView image{in, DType::f32, 3, {32, kRows, 1}, {1, 32, 32 * kRows}};
    device::WindowBox windows;
    windows.channels = 32;
    windows.pixels = kRows;
    const Maps maps{device::tensor_map(rows, device::TileBox{{32, kRows}}),
                    device::tensor_map(image, windows)};
    constexpr int64_t kSharedBytes = 16 * 1024;
    device::launch({fault.word, 1, kThreads, kSharedBytes, context.stream}, fault.kernel,
                   static_cast<const int32_t*>(in), static_cast<int32_t*>(out), maps);
    return true;
  }
  return false;
}

}  // namespace

const SelftestKernels hopper_fault_kernels = {run};

}  // namespace weft::WEFT_TARGET
