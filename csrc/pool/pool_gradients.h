// Backward of average pooling with fixed windows on CPU: the walk of pool_values.h transposed.
//
// The gradient of an input is the sum, over the outputs whose windows hold it, of gy / divisor. Per
// input row, those output rows are divided and added up to one line with unit stride; the line is
// spread to the stride of the windows, zeros between, where reducing windows of the same size along
// it gives the gradients. High overlapping windows do both axes so, for a strip of rows at once, by
// doubling. Input rows that lie in the same windows are equal: made once and copied.
#pragma once

#include "pool/pool_lines.h"

namespace weft::WEFT_TARGET {
namespace {

// The divisors of a part of an output row: one number, except at the borders of the map.
template <class T>
class Divisors {
 public:
  using A = accumulate_t<T>;

  // For parts of at most `width` outputs.
  Divisors(const PoolProblem& p, int64_t width)
      : p_(p),
        depth_(p.out[0]),
        height_(p.out[1]),
        width_(p.out[2]),
        row_(round_up(width * p.inner, kLanes<T>) + kLanes<T>) {
    Scratch<int64_t>* counts[3] = {&depth_, &height_, &width_};
    for (int axis = 0; axis < 3; ++axis)
      for (int64_t o = 0; o < p.out[axis]; ++o) (*counts[axis])[o] = pool_count(p, axis, o);
    fill_lanes(row_.data(), round_up(width * p.inner, kLanes<T>) + kLanes<T>, A{1});
  }

  void start(const RowPart& part, int64_t = 0) {
    const int64_t rows = depth_[part.d] * height_[part.h];
    const int64_t middle = width_[(part.begin + part.end) / 2];
    // Counts rise, stay and fall along an axis.
    uniform_ = p_.divisor != 0 || (width_[part.begin] == middle && width_[part.end - 1] == middle);
    value_ = broadcast<Vec<A>>(static_cast<A>(p_.divisor != 0 ? p_.divisor : rows * middle));
    if (uniform_ || (rows == held_rows_ && part.begin == held_begin_)) return;
    held_rows_ = rows;
    held_begin_ = part.begin;
    for (int64_t o = part.begin, j = 0; o < part.end; ++o) {
      const A divisor = static_cast<A>(rows * width_[o]);
      for (int64_t c = 0; c < p_.inner; ++c) row_[j++] = divisor;
    }
  }
  WEFT_INLINE Vec<A> operator()(int64_t j, Vec<A> sum) const {
    return sum / (uniform_ ? value_ : load_lanes(row_.data() + j));
  }

 private:
  const PoolProblem& p_;
  Scratch<int64_t> depth_, height_, width_;  // elements of the windows on each axis
  Scratch<A> row_;                           // of the part that starts at held_begin_
  Vec<A> value_ = {};
  bool uniform_ = true;
  int64_t held_rows_ = -1, held_begin_ = -1;
};

template <class T>
class GradientWalk {
 public:
  using Op = SumOf<T>;
  using A = accumulate_t<T>;
  static constexpr int64_t kWidth = kLanes<T>;

  GradientWalk(const PoolProblem& p, const T* gy)
      : p_(p),
        gy_(gy),
        doubling_(pool_avg_gradient_path(p) == PoolPath::passes),
        apart_(p.window[2].stride >= p.window[2].size &&
               (p.inner > 1 || p.window[2].size > kPoolDirectSize / 2)),
        tiles_(tiles_of(p)),
        reach_((tiles_.width() + p.window[2].size - 1) * p.inner),
        pitch_(round_up(reach_, kWidth)),
        strip_rows_(doubling_ ? strip_rows() : 0),
        sum_((tiles_.width() + p.window[2].size) * p.inner + kSlack),
        line_(pitch_ + kSlack),
        spare_(pitch_ + kSlack),
        depth_covers_(p.window[0], p.in[0], p.out[0], 1),
        height_covers_(p.window[1], p.in[1], p.out[1], 1),
        divisors_(p, tiles_.width() + p.window[2].size) {
    fill_lanes(sum_.data(), (tiles_.width() + p.window[2].size) * p.inner + kSlack, A{0});
    fill_lanes(line_.data(), pitch_ + kSlack, A{0});
    fill_lanes(spare_.data(), pitch_ + kSlack, A{0});
    if (!doubling_) return;
    const int64_t elements = (strip_rows_ + p.window[1].size - 1) * pitch_ + kSlack;
    strip_.resize(elements);
    strip_spare_.resize(elements);
    fill_lanes(strip_.data(), elements, A{0});
    fill_lanes(strip_spare_.data(), elements, A{0});
  }

  static int64_t items_of(const PoolProblem& p) { return tiles_of(p).items(p.outer); }

  // Input rows, items [begin, end) of the tiles.
  void run(int64_t begin, int64_t end, T* gx) {
    const int64_t inner = p_.inner;
    const bool whole_rows = tiles_.width() == p_.in[2];
    Range last_ds{0, 0}, last_hs{0, 0};
    RowPart part = tiles_.part(begin);
    T* out = gx + (tiles_.row(part) * p_.in[2] + part.begin) * inner;
    strip_end_ = 0;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = (part.end - part.begin) * inner;
      const Range ds = depth_covers_.outputs[part.d];
      const Range hs = height_covers_.outputs[part.h];
      const bool same = whole_rows && item > begin && ds.begin == last_ds.begin &&
                        ds.end == last_ds.end && hs.begin == last_hs.begin &&
                        hs.end == last_hs.end && (part.d > 0 || part.h > 0);
      if (same) {
        memcpy(static_cast<void*>(out), out - n, n * sizeof(T));
      } else if (doubling_) {
        reduce_line(strip_row(part, ds, end - item), out, n);
      } else {
        add_rows(part, ds, hs);
        if (apart_) {
          repeat(part, out, n);
        } else {
          spread(part, line_.data());
          reduce_line(line_.data(), out, n);
        }
      }
      last_ds = ds;
      last_hs = hs;
      out += n;
      part = tiles_.after(part);
    }
  }

 private:
  static constexpr int64_t kSlack = 4 * kWidth;
  static constexpr int64_t kStripBytes = 65536;

  static RowTiles tiles_of(const PoolProblem& p) {
    const bool whole_rows = pool_avg_gradient_path(p) == PoolPath::passes;
    return RowTiles(p.in, whole_rows ? 0 : p.inner * sizeof(A), p.window[2].size);
  }

  int64_t strip_rows() const {
    const int64_t span = p_.window[1].size;
    const int64_t rows = kStripBytes / (pitch_ * static_cast<int64_t>(sizeof(A)));
    const int64_t fit = rows > 2 * span ? rows - span : span;
    return fit < p_.in[1] ? fit : p_.in[1];
  }

  // The outputs along W that cover positions [part.begin, part.end).
  Range columns(const RowPart& part) {
    if (part.begin != covered_begin_) {
      covered_begin_ = part.begin;
      covered_ = {outputs_covering(p_.window[2], part.begin, p_.out[2]).begin,
                  outputs_covering(p_.window[2], part.end - 1, p_.out[2]).end};
    }
    return covered_;
  }

  // sum_ = the output rows ds x hs, divided, over the columns of `part`.
  void add_rows(const RowPart& part, const Range& ds, const Range& hs) {
    const Range os = columns(part);
    columns_ = os;
    const int64_t n = (os.end - os.begin) * p_.inner;
    bool first = true;
    for (int64_t od = ds.begin; od < ds.end; ++od)
      for (int64_t oh = hs.begin; oh < hs.end; ++oh) {
        const int64_t row = (part.outer * p_.out[0] + od) * p_.out[1] + oh;
        if (n <= 0) continue;
        add_row(gy_ + (row * p_.out[2] + os.begin) * p_.inner, n,
                RowPart{part.outer, od, oh, os.begin, os.end}, first);
        first = false;
      }
    if (first) columns_.end = columns_.begin;
  }

  void add_row(const T* row, int64_t n, const RowPart& outputs, bool first) {
    divisors_.start(outputs);
    A* sum = sum_.data();
    for (int64_t j = 0; j < n; j += kWidth) {
      const auto value = j + kWidth <= n ? load_vec(row + j) : load_some<Op>(row + j, n - j);
      const auto mine = divisors_(j, value);
      store_lanes(sum + j, first ? mine : load_lanes(sum + j) + mine);
    }
  }

  // line = sum_ at the stride of the windows, so that the sum of `size` elements from element w on
  // is the gradient of position part.begin + w.
  void spread(const RowPart& part, A* line) {
    const Window& window = p_.window[2];
    const int64_t inner = p_.inner;
    const int64_t stride = window.stride;
    const int64_t length = (part.end - part.begin + window.size - 1) * inner;
    const int64_t n = (columns_.end - columns_.begin) * inner;
    if (n <= 0) return fill_lanes(line, length, A{0});
    // Output o stands at element o * stride - lead.
    const int64_t lead = part.begin + window.padding - (window.size - 1);
    const int64_t begin = (columns_.begin * stride - lead) * inner;
    if (stride == 1) {
      fill_lanes(line, begin, A{0});
      for (int64_t j = 0; j < n; j += kWidth)
        store_lanes(line + begin + j, load_lanes(sum_.data() + j));
      fill_lanes(line + begin + n, length - begin - n, A{0});
    } else if (inner == 1 && stride == 2) {
      fill_lanes(line, begin, A{0});
      for (int64_t j = 0; j < n; j += kWidth) {
        Vec<A> low, high;
        interleave(load_lanes(sum_.data() + j), Vec<A>{}, low, high);
        store_lanes(line + begin + 2 * j, low);
        store_lanes(line + begin + 2 * j + kWidth, high);
      }
      const int64_t end = begin + 2 * n - 1;
      fill_lanes(line + end, length > end ? length - end : 0, A{0});
    } else {
      fill_lanes(line, length, A{0});
      for (int64_t o = 0; o < n / inner; ++o)
        memcpy(line + begin + o * stride * inner, sum_.data() + o * inner, inner * sizeof(A));
    }
  }

  // out = sum_, each output at all positions of its window.
  void repeat(const RowPart& part, T* out, int64_t n) {
    const Window& window = p_.window[2];
    const int64_t inner = p_.inner;
    A* line = line_.data();
    fill_lanes(line, n, A{0});
    for (int64_t o = columns_.begin; o < columns_.end; ++o) {
      const int64_t first = window.first_input(o) - part.begin;
      const int64_t begin = first < 0 ? 0 : first;
      const int64_t last = first + window.size;
      const int64_t end = last < part.end - part.begin ? last : part.end - part.begin;
      const A* sum = sum_.data() + (o - columns_.begin) * inner;
      if (inner == 1) {
        fill_lanes(line + begin, end - begin, *sum);
      } else {
        for (int64_t w = begin; w < end; ++w) memcpy(line + w * inner, sum, inner * sizeof(A));
      }
    }
    for (int64_t j = 0; j < n; j += kWidth) store_row<Op>(out, j, n, load_lanes(line + j));
  }

  // out = the windows of `size` elements along the line.
  void reduce_line(A* line, T* out, int64_t n) {
    int64_t size = p_.window[2].size;
    const int64_t inner = p_.inner;
    if (size > kPoolDirectSize) {
      line = reduce_windows<Op>(line, spare_.data(), n, size, inner);
      size = 1;
    }
    for (int64_t j = 0; j < n; j += kWidth) {
      auto sum = load_lanes(line + j);
      for (int64_t s = 1; s < size; ++s) sum += load_lanes(line + j + s * inner);
      store_row<Op>(out, j, n, sum);
    }
  }

  A* strip_row(const RowPart& part, const Range& ds, int64_t rows_left) {
    if (part.h == 0 || part.h >= strip_end_) {
      strip_begin_ = part.h;
      strip_end_ = part.h + strip_rows_ < p_.in[1] ? part.h + strip_rows_ : p_.in[1];
      if (strip_end_ > part.h + rows_left) strip_end_ = part.h + rows_left;
      make_strip(part, ds);
    }
    memcpy(line_.data(), strip_result_ + (part.h - strip_begin_) * pitch_, pitch_ * sizeof(A));
    return line_.data();
  }

  void make_strip(const RowPart& part, const Range& ds) {
    const Window& height = p_.window[1];
    const int64_t rows = strip_end_ - strip_begin_;
    // Output row oh stands at row oh * stride - lead.
    const int64_t lead = strip_begin_ + height.padding - (height.size - 1);
    for (int64_t r = 0; r < rows + height.size - 1; ++r) {
      A* line = strip_.data() + r * pitch_;
      const int64_t t = r + lead;
      const int64_t oh = t / height.stride;
      if (t < 0 || t % height.stride != 0 || oh >= p_.out[1]) {
        fill_lanes(line, pitch_, A{0});
        continue;
      }
      add_rows(part, ds, {oh, oh + 1});
      spread(part, line);
    }
    strip_result_ =
        reduce_windows<Op>(strip_.data(), strip_spare_.data(), rows * pitch_, height.size, pitch_);
  }

  const PoolProblem& p_;
  const T* gy_;
  const bool doubling_;
  const bool apart_;  // windows do not overlap along W, and each is wide enough to be written alone
  const RowTiles tiles_;
  const int64_t reach_;
  const int64_t pitch_;  // elements of a line
  const int64_t strip_rows_;
  int64_t strip_begin_ = 0, strip_end_ = 0;  // input rows that the strip holds
  Range columns_{0, 0};                      // outputs that sum_ holds
  Range covered_{0, 0};                      // those of the parts that start at covered_begin_
  int64_t covered_begin_ = -1;
  Scratch<A> sum_, line_, spare_, strip_, strip_spare_;
  A* strip_result_ = nullptr;
  const Covers depth_covers_, height_covers_;
  Divisors<T> divisors_;
};

}  // namespace
}  // namespace weft::WEFT_TARGET
