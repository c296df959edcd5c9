#pragma once

#include "cuda/recurrence/forward.cuh"
#include "cuda/recurrence/recurrence.h"

namespace elattn::cuda {

/// How the warps of a block share S: each has tiles of kTileRows x 32 of it, `row_warps` of them below one another and
/// `column_warps` side by side. `size` is the features in whole tiles.
struct StepShape : Shape {
  int row_warps = 1, column_warps = 1;
};

inline constexpr int kMaxStepThreads = 256;

/// A lane has kPack columns of 16 rows: 64 registers at most, so that two of the largest blocks fit into a
/// multiprocessor.
inline constexpr int kStepRows = 16;
template <int kPack>
inline constexpr int kTileRows = 16 * kPack;

/// Columns of S that a lane moves at once where they are aligned: 16 bytes, but 8 of a squared kernel in float, whose
/// states are an even number of elements long and have S at an even offset.
template <class Map>
inline constexpr int kWidePack = Map::kHasValueGauge ? 2 : 16 / sizeof(typename Map::Scalar);

template <class Map>
__host__ __device__ Tile<typename Map::Scalar> step_results(Arena& arena, const StepShape& s) {
  return arena.tile<typename Map::Scalar>(s.row_warps * s.chunk, s.columns);
}

template <class Map>
size_t step_bytes(const StepShape& shape) {
  Arena arena(nullptr);
  ForwardPass<Map>::carve(arena, shape);
  step_results<Map>(arena, shape);
  return arena.bytes();
}

/// One token of one (sequence, kv head) by one block, with the state changed in place. S is read once and written once,
/// through registers: a lane has kPack columns of kStepRows rows, and asks for them before it waits for anything else
/// of the state. What does not fit into the registers of a block follows tile by tile.
template <class Map, int kPack>
class Step : ForwardPass<Map> {
  using Base = ForwardPass<Map>;
  using Base::p_, Base::s_, Base::item_, Base::sequence_, Base::map_, Base::chunk_, Base::batch_, Base::scaled_;
  using typename Base::A;

 public:
  __device__ Step(const StepParams& p, const StepShape& shape, const WorkItem& item, Arena& arena)
      : Base(p, shape, item, arena),
        row_warps_(shape.row_warps),
        column_warps_(shape.column_warps),
        results_(step_results<Map>(arena, shape)) {}

  /// q of the batch of heads from g on, and with the first k and v. A row is one warp's, so that no row waits for
  /// another.
  __device__ void load_inputs(int g) {
    with_element<A>(p_.dtype, [&](auto* type) { load_inputs(g, type); });
  }

  /// After load_inputs(0).
  __device__ void run(A* state) {
    const StateMatrix<Map, A> s{map_, s_, state};
    Part part;
    load(part, s, first_row(), first_column());
    map_.load(state, 0, s_.value_dim);
    __syncthreads();
    this->keys_to_features(0, 1);
    int g = 0;
    do {  // once even if there are no query heads
      const int heads = this->batch_of(g);
      if (g > 0) load_inputs(g);
      __syncthreads();
      this->queries_to_features(1, heads);
      __syncthreads();
      multiply(part, s, heads, g == 0);
      __syncthreads();
      write(g, heads);
      g += batch_;
    } while (g < p_.group);
    if constexpr (Map::kHasValueGauge) {
      if (map_.must_move()) map_.move(s);
    }
    map_.save(state, true);
  }

  /// The output of an inactive entry.
  __device__ void skip() const {
    const RowBlock out = outputs(0, static_cast<int>(p_.group));
#pragma unroll 1
    for (int i = warp(); i < p_.group; i += warps()) {
      for (int j = lane(); j < s_.value_dim; j += kWarpSize) store_element(p_.dtype, p_.out.data, out.row(i) + j, A(0));
    }
  }

 private:
  static constexpr int kLanes = kWarpSize / kPack;  // with the same rows

  /// What a lane holds of S.
  struct Part {
    int row, column;  // of the tile
    A x[kStepRows][kPack];
  };

  template <class T>
  __device__ void load_inputs(int g, const T*) {
    for (int r = warp() - (g == 0 ? 2 : 0), heads = this->batch_of(g); r < heads; r += warps()) {
      const bool value = r == -2, key = r == -1;
      const Rows rows = value ? p_.v : key ? p_.k : p_.q;
      const int64_t head = r < 0 ? item_.head : item_.head * p_.group + g + r;
      const T* from = static_cast<const T*>(rows.data) + sequence_.batch * rows.batch + head * rows.head;
      A* to = value ? chunk_.v.at(0, 0) : key ? chunk_.k.at(0, 0) : chunk_.q.at(r, 0);
      const int count = value ? s_.value_dim : s_.head_dim, size = value ? s_.columns : s_.key_size;
      const A scale = value ? A(1) : static_cast<A>(p_.scale);
      const A fill = value ? A(0) : key ? Map::key_fill() : Map::query_fill();
#pragma unroll 4
      for (int c = lane(); c < size; c += kWarpSize) {
        to[c] = c < count ? static_cast<A>(Element<T>::load(from[c])) * scale : fill;
      }
    }
  }

  __device__ int first_row() const { return warp() / column_warps_ * kTileRows<kPack>; }
  __device__ int first_column() const { return warp() % column_warps_ * kWarpSize; }

  /// The lane's rows and columns of a tile.
  static __device__ int row_of(int row) { return row + lane() / kLanes * kStepRows; }
  static __device__ int column_of(int column) { return column + lane() % kLanes * kPack; }
  __device__ bool inside(int row, int column) const { return row < s_.rows && column < s_.value_dim; }

  __device__ void load(Part& part, const StateMatrix<Map, A>& s, int row, int column) const {
    part.row = row;
    part.column = column;
    row = row_of(row);
    column = column_of(column);
#pragma unroll
    for (int i = 0; i < kStepRows; ++i) {
      Pack<A, kPack> pack{};
      if (inside(row + i, column)) pack = *reinterpret_cast<const Pack<A, kPack>*>(&s(row + i, column));
#pragma unroll
      for (int j = 0; j < kPack; ++j) part.x[i][j] = pack.elements[j];
    }
  }

  __device__ void save(const Part& part, const StateMatrix<Map, A>& s) const {
    const int row = row_of(part.row), column = column_of(part.column);
#pragma unroll
    for (int i = 0; i < kStepRows; ++i) {
      Pack<A, kPack> pack;
#pragma unroll
      for (int j = 0; j < kPack; ++j) pack.elements[j] = part.x[i][j];
      if (inside(row + i, column)) *reinterpret_cast<Pack<A, kPack>*>(&s(row + i, column)) = pack;
    }
  }

  /// f(i, x) with the number x that the lane's row i has in `from`, a row of shared memory.
  template <class F>
  static __device__ __forceinline__ void for_rows(const A* from, F&& f) {
    constexpr int kCount = 16 / sizeof(A);
#pragma unroll
    for (int i = 0; i < kStepRows; i += kCount) {
      A x[kCount];
      read_row(x, from + i);
#pragma unroll
      for (int e = 0; e < kCount; ++e) f(i + e, x[e]);
    }
  }

  /// S <- factor S + psi v^T.
  __device__ void update(Part& part) const {
    const int row = row_of(part.row), column = column_of(part.column);
    if (scaled_) {
      for_rows(chunk_.scales.at(0, row), [&](int i, A factor) {
#pragma unroll
        for (int j = 0; j < kPack; ++j) part.x[i][j] *= factor;
      });
    }
    A v[kPack];
#pragma unroll
    for (int j = 0; j < kPack; ++j) v[j] = chunk_.v(0, column + j);
    for_rows(chunk_.psi.at(0, row), [&](int i, A psi) {
#pragma unroll
      for (int j = 0; j < kPack; ++j) part.x[i][j] += psi * v[j];
    });
  }

  /// phi S of the tile's rows for one head, of one column per lane.
  __device__ A product(const Part& part, int head) const {
    A sum[kPack] = {};
    for_rows(chunk_.phi.at(head, row_of(part.row)), [&](int i, A phi) {
#pragma unroll
      for (int j = 0; j < kPack; ++j) sum[j] += phi * part.x[i][j];
    });
    return sum_lane_groups(sum);
  }

  /// Results of each row of warps; the first batch of heads also updates S.
  __device__ void multiply(Part& part, const StateMatrix<Map, A>& s, int heads, bool first) {
    for (int column = first_column(); column < s_.columns; column += column_warps_ * kWarpSize) {
      for (int row = first_row(); row < s_.size; row += row_warps_ * kTileRows<kPack>) {
        if (row != part.row || column != part.column) load(part, s, row, column);
        if (first) {
          update(part);
          save(part, s);
        }
        for (int h = 0; h < heads; ++h) {
          const A sum = product(part, h);
          A& result = results_(warp() / column_warps_ * s_.chunk + h, column_of(column) + lane() / kLanes);
          result = row == first_row() ? sum : result + sum;
        }
      }
    }
  }

  __device__ RowBlock outputs(int g, int heads) const {
    return RowBlock(p_.out, sequence_.batch, item_.head * p_.group + g, 0, 0, 1, heads, s_.value_dim);
  }

  __device__ void write(int g, int heads) const {
    const RowBlock out = outputs(g, heads);
#pragma unroll 1
    for (int i = thread(); i < heads * s_.columns; i += threads()) {
      const int h = i / s_.columns, j = i % s_.columns;
      if (j >= s_.value_dim) continue;
      A y = results_(h, j);
      for (int w = 1; w < row_warps_; ++w) y += results_(w * s_.chunk + h, j);
      if constexpr (Map::kHasValueGauge) {
        if (chunk_.inverse[h] != 0) y += map_.value_gauge()[j];  // else it sees no key
      }
      store_element(p_.dtype, p_.out.data, out.row(h) + j, y);
    }
  }

  int row_warps_, column_warps_;
  Tile<A> results_;  // (row warps, rows) by columns
};

}  // namespace elattn::cuda
