// Gradients of max pooling on CUDA where windows overlap much: added column by column, in strips.
//
// A gather (pool_max_inverse.cu) asks each of the R * S windows that hold an input whether its
// place is that input. Here a thread owns a column of inputs, one position in W of one channel. It
// goes through the rows of outputs in order, and asks only the S windows of a row that reach its
// column: where the place lies in the column, the gradient is added to the input that it names, in
// shared memory. A column has one owner, so the order of its sums is fixed without atomics.
//
// Rows of outputs are loaded a strip at a time. Sums are kept for the rows of inputs that the
// windows so far reach, in a ring: a strip's rows are complete when all windows that begin above
// its end have been met; they are stored, and their place in the ring is cleared for later rows.
// Bound: bytes; for high windows the S comparisons of an output. Tried and lost: keeping gradients
// and places of R rows, for the gather to read; it needs twice the shared memory, so that tiles
// were half as wide and moved up to 3.4 times the least.
#include "pool/pool_cuda.h"
#include "pool/pool_passes.h"

namespace weft::WEFT_TARGET {
namespace {

// How the two tensors of a box lie in shared memory, and divisors of the walk.
struct ColumnWalk {
  BoxLayout gradients, places;
  Divider by_size_w, by_kept;
};

template <class T, class Place>
struct MaxColumns {
  using Acc = accumulate_t<T>;
  const TileWalk& walk;
  const ColumnWalk& columns;
  const TileBlock& block;
  device::SharedMemory& shared;
  const T* gy;
  const Place* map_places;
  T* gx;
  T* piece = shared.take<T>(columns.gradients.elements);
  Place* place_piece = shared.take<Place>(columns.places.elements);
  const int sum_elements =
      walk.tile[0] * walk.tile[1] * walk.kept_rows * walk.tile[3] * walk.tile[4];
  Acc* sums = shared.take<Acc>(sum_elements);  // [outer, d, row of the ring, w, c]
  const T* gradients = nullptr;
  const Place* places = nullptr;
  ReachTables reaches = {};
  int* firsts[3] = {};  // the first input of each window in the box, relative to the tile

  WEFT_DEVICE void load(const TileBlock& chunk) {
    gradients = load_box(walk, chunk, columns.gradients, gy, piece);
    places = load_box(walk, chunk, columns.places, map_places, place_piece);
  }
  WEFT_DEVICE void make_tables() {
    reaches = reach_tables(walk, block, shared);
    for (int a = 0; a < 3; ++a) {
      firsts[a] = shared.take<int>(walk.box[a]);
      for (int i = device::thread_index(); i < block.box[a].size; i += device::block_size())
        firsts[a][i] = walk.axis[a].first_input(block.box[a].begin + i) - block.at[a];
    }
    for (int i = device::thread_index(); i < sum_elements; i += device::block_size()) sums[i] = 0;
  }

  WEFT_DEVICE int sum_index(int outer, int d, int row, int w, int c) const {
    return middle_index(walk, outer * walk.tile[1] + d, row, w, c);
  }

  // Adds the gradients of a chunk's rows, of which the first is row `first_row` of the block's box.
  WEFT_DEVICE void make_rows(const TileBlock& chunk, int first_row) const {
    const int items = block.outers * walk.tile[3] * walk.tile[4];
    for (int item = device::thread_index(); item < items; item += device::block_size()) {
      int c = item % walk.tile[4];
      int w = item / walk.tile[4];
      const int outer = w / walk.tile[3];
      w %= walk.tile[3];
      if (w >= block.extent[2] || c >= block.channels) continue;
      const Reach reach = reaches.axis[2][w];
      for (int d = 0; d < block.box[0].size; ++d) {
        const int plane = outer * block.box[0].size + d;
        for (int row = 0; row < chunk.box[1].size; ++row) {
          const T* gradient_row = gradients + plane * columns.gradients.plane_pitch +
                                  row * columns.gradients.row_pitch + c;
          const Place* place_row =
              places + plane * columns.places.plane_pitch + row * columns.places.row_pitch + c;
          for (int i = reach.begin; i < reach.end; ++i) {
            auto place = static_cast<int>(place_row[i * walk.tile[4]]);
            const int rows = columns.by_size_w.split(place);
            if (place * walk.axis[2].dilation != w - firsts[2][i]) continue;
            const int at_d = firsts[0][d] + rows / walk.axis[1].size * walk.axis[0].dilation;
            int at_h =
                firsts[1][first_row + row] + rows % walk.axis[1].size * walk.axis[1].dilation;
            if (at_d < 0 || at_d >= block.extent[0] || at_h < 0 || at_h >= block.extent[1])
              continue;
            columns.by_kept.split(at_h);
            sums[sum_index(outer, at_d, at_h, w, c)] += widen(gradient_row[i * walk.tile[4]]);
          }
        }
      }
    }
  }

  WEFT_DEVICE void make_tile(const TileBlock& strip, int first) const {
    if (walk.target_w * walk.target_c > 1)
      store_sums<16 / sizeof(T)>(strip, first);
    else
      store_sums<1>(strip, first);
  }

  // Stores and clears the sums of a strip, whose first row is row `first` of the tile.
  template <int kPack>
  WEFT_DEVICE void store_sums(const TileBlock& strip, int first) const {
    T* tile = gx + tile_start(walk, strip);
    const int items = tile_items(walk, strip);
    const int ring = first % walk.kept_rows;
    for (int item = device::thread_index(); item < items; item += device::block_size()) {
      TileElement e;
      if (!tile_element(walk, strip, item, e)) continue;
      Acc* sum = sums + sum_index(e.outer, e.d, ring_row(walk, ring, e.h), e.w, e.c);
      Acc values[kPack];
      load_values(sum, values);
      T results[kPack];
      for (int n = 0; n < kPack; ++n) {
        results[n] = narrow<T>(values[n]);
        values[n] = 0;
      }
      keep_values(sum, values);
      store_values(tile + target_offset(walk, e), results);
    }
  }
};

template <class T, class Place>
WEFT_GLOBAL WEFT_HOT void max_pool_backward_columns(TileWalk walk, ColumnWalk columns, const T* gy,
                                                    const Place* places, T* gx) {
  device::SharedMemory shared;
  const TileBlock block = block_of(walk);
  MaxColumns<T, Place> work{walk, columns, block, shared, gy, places, gx};
  for_strips(walk, block, work);
}

}  // namespace

void launch_max_backward_columns(const PoolProblem& p, const PoolPlan& plan, const void* gy,
                                 const void* places, void* gx, const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    dispatch_place(p, [&](auto place) {
      using Place = decltype(place);
      const TileWalk walk = walk_of(p, PoolStep::max_backward, plan, gy, gx);
      const ColumnWalk columns{box_layout(plan, walk, sizeof(T), gy),
                               box_layout(plan, walk, sizeof(Place), places),
                               Divider(walk.axis[2].size), Divider(walk.kept_rows)};
      device::launch(launch_of("max_pool_backward_columns", plan, context),
                     max_pool_backward_columns<T, Place>, walk, columns, static_cast<const T*>(gy),
                     static_cast<const Place*>(places), static_cast<T*>(gx));
    });
  });
}

}  // namespace weft::WEFT_TARGET
