// What Hopper's words do on the CPU: phases of barriers, copies in flight, products of a warpgroup.
//
// All of it is state of the block that runs (host.h, BlockState). A phase whose arrivals have all
// been made waits for its bytes; a copy waits for a thread that waits for it, since on hardware it
// may come as late as that. So a phase with bytes ends in `settle`, at a wait or at the arrival or
// copy that a waiting thread still missed.
#include "device/hopper.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <vector>

#include "device/guarded.h"
#include "device/hopper_copies.h"

namespace weft::device {
namespace {

using host::fault;
using host::Site;

constexpr int kWgmmaRows = 64;
constexpr int kWgmmaDepth = 16;
constexpr int kWgmmaColumns = 256;
constexpr int kPieceColumns = 64;

struct Barrier {
  int arrivals = 0;  // of each phase
  int missing = 0;   // of the open one
  int64_t expected = 0;
  int64_t brought = 0;
  int phase = 0;
  std::vector<BoxCopy> copies;
  std::vector<int> waiting;
};

// ---- products --------------------------------------------------------------------------------

// Sums of one thread that products are pending on, and what they will be.
struct PendingSums {
  float* at;
  std::vector<float> value;
  int group;  // of the latest product
};

// Operands that a product reads until all threads have waited for it.
struct Operands {
  const void* a;
  const void* b;
  Major major_a, major_b;
  int columns;
  int group;
  uint64_t digest;
};

struct ThreadProducts {
  bool fenced = false;
  int open_group = 0;
  std::vector<PendingSums> sums;
  std::vector<Operands> operands;
};

struct Warpgroup {
  int arrived = 0;
  host::Wgmma first{};  // what the first thread to arrive asked for
  int first_thread = 0;
  Site site;
  float a[kWgmmaRows][kWgmmaDepth];
  float b[kWgmmaDepth][kWgmmaColumns];
  float sums[kWgmmaRows][kWgmmaColumns];  // each thread's, while they meet
  uint64_t digest = 0;
};

// visit(8 elements, row or column, k) for each 16 bytes of an operand of `rows` rows or columns:
// they follow each other along k, or along columns.
template <class Visit>
void for_each_chunk(const void* operand, Major major, int rows, const Visit& visit) {
  const auto address = reinterpret_cast<uintptr_t>(operand);
  const auto* tile =
      reinterpret_cast<const unsigned char*>(address / kBoxAlignment * kBoxAlignment);
  const auto begin = static_cast<int64_t>(address % kBoxAlignment);
  const auto at = [&](int64_t offset) {
    return reinterpret_cast<const uint16_t*>(tile + swizzled(begin + offset));
  };
  if (major == Major::reduction) {
    for (int row = 0; row < rows; ++row)
      for (int k = 0; k < kWgmmaDepth; k += 8)
        visit(at(int64_t{row} * kBoxRowBytes + 2 * k), row, k);
    return;
  }
  for (int k = 0; k < kWgmmaDepth; ++k)
    for (int column = 0; column < rows; column += 8)
      visit(at((int64_t{column} / kPieceColumns * kPieceColumns + k) * kBoxRowBytes +
               column % kPieceColumns * 2),
            column, k);
}

uint64_t digest_of(const Operands& o) {
  uint64_t digest = 0, odd = 0x9E3779B97F4A7C15u;
  const auto add = [&](const uint16_t* elements, int, int) {
    uint64_t words[2];
    memcpy(words, elements, sizeof(words));
    digest += words[0] * odd ^ words[1] * (odd + 2);
    odd += 0x2545F4914F6CDD1Eu;
  };
  for_each_chunk(o.a, o.major_a, kWgmmaRows, add);
  for_each_chunk(o.b, o.major_b, o.columns, add);
  return digest;
}

void check_operand(const void* operand, Major major, int rows) {
  const auto offset = static_cast<int>(reinterpret_cast<uintptr_t>(operand) % kBoxAlignment);
  if (major == Major::reduction ? offset >= kBoxRowBytes || offset % (2 * kWgmmaDepth) != 0
                                : offset != 0)
    fault("wgmma with an operand that begins " + std::to_string(offset) +
          " bytes behind a multiple of 1024");
  const int bytes =
      major == Major::reduction
          ? (rows - 1) * kBoxRowBytes + 2 * kWgmmaDepth
          : (rows - 1) / kPieceColumns * kPieceColumns * kBoxRowBytes + kWgmmaDepth * kBoxRowBytes;
  host::check_shared(operand, bytes, "reads", "from");
}

// ---- the block -------------------------------------------------------------------------------

class HopperBlock : public host::BlockState {
 public:
  void thread_done() override {
    const ThreadProducts& mine = threads_[thread_index()];
    if (!mine.operands.empty()) fault("finishes with wgmma not waited for");
  }

  std::string block_done() override {
    for (const auto& [address, barrier] : barriers_)
      if (!barrier.copies.empty()) return "finishes with TMA copies that nobody waited for";
    return "";
  }

  void init(void* address, int arrivals) {
    host::check_alignment(address, 8, "mbarrier");
    host::check_shared(address, 8, "initialises an mbarrier of", "to");
    Barrier fresh;
    fresh.arrivals = fresh.missing = arrivals;
    barriers_[address] = fresh;
  }

  void arrive(void* address, int64_t bytes) {
    Barrier& b = barrier_at(address);
    if (b.missing == 0)
      fault("arrives at an mbarrier that expects " + std::to_string(b.arrivals) +
            " arrivals in a phase, and has them");
    --b.missing;
    b.expected += bytes;
    if (b.expected == 0 || !b.waiting.empty()) settle(b);
  }

  void wait(void* address, int parity, const Site& site) {
    Barrier& b = barrier_at(address);
    settle(b);
    while (b.phase % 2 == parity) {
      b.waiting.push_back(thread_index());
      host::park("wait at the mbarrier of ", site);
    }
  }

  void copy(const BoxCopy& copy, void* address) {
    Barrier& b = barrier_at(address);
    const int64_t bytes = copy.map.box_bytes();
    host::check_alignment(copy.shared, 128, "tma_load to shared memory");
    host::check_shared(copy.shared, static_cast<int>(bytes), "copies", "to");
    if (reinterpret_cast<uintptr_t>(copy.shared) % kBoxAlignment != 0)
      fault("tma_load to a box that does not begin at a multiple of 1024 bytes");
    check_base(copy);
    for_each_piece(copy, [](int64_t, const unsigned char* from, int64_t count) {
      host::count_load(from, static_cast<int>(count));
    });
    host::poison(copy.shared, bytes);
    b.copies.push_back(copy);
    b.brought += bytes;
    if (b.missing == 0 && b.brought > b.expected)
      fault("brings " + std::to_string(b.brought) + " bytes to an mbarrier that expects " +
            std::to_string(b.expected));
    if (!b.waiting.empty()) settle(b);
  }

  void wgmma(const host::Wgmma& product, const Site& site) {
    check_operand(product.a, product.major_a, kWgmmaRows);
    check_operand(product.b, product.major_b, product.columns);
    PendingSums& mine = sums_of(product);
    ThreadProducts& thread = threads_[thread_index()];
    Warpgroup& group = warpgroups_[thread_index() / kWarpgroup];
    const int first_row = thread_index() / 32 % 4 * 16 + lane() / 4;
    const auto sum = [&](int i) -> float& {
      return group.sums[first_row + i / 2 % 2 * 8][i / 4 * 8 + lane() % 4 * 2 + i % 2];
    };
    for (int i = 0; i < product.columns / 2; ++i) sum(i) = mine.value[i];
    meet(product, site);
    for (int i = 0; i < product.columns / 2; ++i) mine.value[i] = sum(i);
    mine.group = thread.open_group;
    thread.operands.push_back({product.a, product.b, product.major_a, product.major_b,
                               product.columns, thread.open_group, group.digest});
  }

  void fence() { threads_[thread_index()].fenced = true; }
  void commit() { ++threads_[thread_index()].open_group; }

  void wait_products(int pending) {
    ThreadProducts& mine = threads_[thread_index()];
    const auto complete = [&](const auto& x) { return x.group < mine.open_group - pending; };
    for (const Operands& o : mine.operands)
      if (complete(o) && lane() == 0 && digest_of(o) != o.digest)
        fault("waits for a wgmma whose operands have changed since it began");
    std::erase_if(mine.operands, complete);
    for (const PendingSums& s : mine.sums) {
      if (!complete(s)) continue;
      std::copy(s.value.begin(), s.value.end(), s.at);
      mine.fenced = false;
    }
    std::erase_if(mine.sums, complete);
  }

  HopperBlock()
      : threads_(block_size()), warpgroups_((block_size() + kWarpgroup - 1) / kWarpgroup) {}

 private:
  Barrier& barrier_at(void* address) {
    const auto found = barriers_.find(address);
    if (found == barriers_.end()) fault("uses an mbarrier that was not initialised");
    return found->second;
  }

  // Ends the open phase if nothing is missing but the landing of its copies.
  static void settle(Barrier& b) {
    if (b.missing > 0 || b.brought < b.expected) return;
    if (b.brought > b.expected)
      fault("waits for " + std::to_string(b.expected) + " bytes at an mbarrier that " +
            std::to_string(b.brought) + " are brought to");
    for (const BoxCopy& copy : b.copies) land(copy);
    b.copies.clear();
    b.expected = b.brought = 0;
    b.missing = b.arrivals;
    ++b.phase;
    for (int thread : b.waiting) host::unpark(thread);
    b.waiting.clear();
  }

  static void check_base(const BoxCopy& copy) {
    if (!copy.map.windows) return;
    const WindowBox& box = copy.map.window;
    for (int a = 0; a < copy.map.tensor.rank - 2; ++a) {
      const int64_t base = copy.coordinates[a + 1];
      if (base < box.lower[a] || base > copy.map.tensor.extent[a + 1] - 1 + box.upper[a])
        fault("tma_load_im2col from a window whose base " + std::to_string(base) +
              " lies outside the box of its tensor map");
      if (copy.offsets[a] < 0 || copy.offsets[a] >= 2 * window_box_limit(copy.map.tensor.rank))
        fault("tma_load_im2col at offset " + std::to_string(copy.offsets[a]) +
              "; the rank of its tensor map allows less than " +
              std::to_string(2 * window_box_limit(copy.map.tensor.rank)));
    }
  }

  PendingSums& sums_of(const host::Wgmma& product) {
    ThreadProducts& mine = threads_[thread_index()];
    for (PendingSums& s : mine.sums)
      if (s.at == product.sums) return s;
    if (!mine.fenced) fault("meets wgmma on sums that it has touched, without a wgmma_fence");
    const int count = product.columns / 2;
    mine.sums.push_back({product.sums, {product.sums, product.sums + count}, 0});
    host::poison(product.sums, count * int64_t{sizeof(float)});
    return mine.sums.back();
  }

  // Returns once all threads of the warpgroup are here; the last multiplies for all.
  void meet(const host::Wgmma& product, const Site& site) {
    const int index = thread_index() / kWarpgroup;
    const int begin = index * kWarpgroup;
    Warpgroup& group = warpgroups_[index];
    if (begin + kWarpgroup > block_size()) fault("meets wgmma in a warpgroup that is not whole");
    if (group.arrived == 0) {
      group.first = product;
      group.first_thread = thread_index();
      group.site = site;
    }
    if (group.first.a != product.a || group.first.b != product.b ||
        group.first.columns != product.columns || !host::same_site(group.site, site))
      fault("meets another wgmma than thread " + std::to_string(group.first_thread) +
            " of its warpgroup");
    if (++group.arrived < kWarpgroup) return host::park("wait at the wgmma of ", site);
    group.arrived = 0;
    multiply(group, product);
    group.digest =
        digest_of({product.a, product.b, product.major_a, product.major_b, product.columns, 0, 0});
    for (int thread = begin; thread < begin + kWarpgroup; ++thread)
      if (thread != thread_index()) host::unpark(thread);
  }

  static void multiply(Warpgroup& group, const host::Wgmma& product) {
    const bool a_along = product.major_a == Major::reduction;
    for_each_chunk(
        product.a, product.major_a, kWgmmaRows, [&](const uint16_t* elements, int row, int k) {
          for (int i = 0; i < 8; ++i)
            group.a[row + (a_along ? 0 : i)][k + (a_along ? i : 0)] = product.widen(elements[i]);
        });
    const bool b_along = product.major_b == Major::reduction;
    for_each_chunk(product.b, product.major_b, product.columns,
                   [&](const uint16_t* elements, int column, int k) {
                     for (int i = 0; i < 8; ++i)
                       group.b[k + (b_along ? i : 0)][column + (b_along ? 0 : i)] =
                           product.widen(elements[i]);
                   });
    for (int row = 0; row < kWgmmaRows; ++row)
      for (int k = 0; k < kWgmmaDepth; ++k)
        for (int column = 0; column < product.columns; ++column)
          group.sums[row][column] += group.a[row][k] * group.b[k][column];
  }

  std::map<const void*, Barrier> barriers_;
  std::vector<ThreadProducts> threads_;
  std::vector<Warpgroup> warpgroups_;
};

HopperBlock& block() {
  auto& state = host::block_state();
  if (state == nullptr) state = std::make_unique<HopperBlock>();
  return static_cast<HopperBlock&>(*state);
}

}  // namespace

namespace host {

void mbarrier_init(void* barrier, int arrivals) { block().init(barrier, arrivals); }
void mbarrier_arrive(void* barrier, int64_t bytes) { block().arrive(barrier, bytes); }
void mbarrier_wait(void* barrier, int parity, const Site& site) {
  block().wait(barrier, parity, site);
}

void tma_load(void* shared, const TensorMap& map, void* barrier, const int* coordinates,
              const int* offsets) {
  BoxCopy copy{static_cast<unsigned char*>(shared), map, {}, {}};
  std::copy_n(coordinates, map.tensor.rank, copy.coordinates);
  if (offsets != nullptr) std::copy_n(offsets, 3, copy.offsets);
  block().copy(copy, barrier);
}

void wgmma(const Wgmma& product, const Site& site) { block().wgmma(product, site); }
void wgmma_fence() { block().fence(); }
void wgmma_commit() { block().commit(); }
void wgmma_wait(int pending) { block().wait_products(pending); }

}  // namespace host
}  // namespace weft::device
