#pragma once

#include "cuda/chunked/backward.cuh"

namespace elattn::cuda::chunked {

/// From left to right, with S: a warp has 16 channels. Per piece of a chunk, phi not yet divided by the normaliser n,
///
///     u = g S^T - a z + E psi,   E = tril(g v^T - a)           n = phi . c,   c = z + tril(1) psi
///     delta - a = (phi . u - loss) / n                         dq = phi / n * (u - (phi . u / n) c)
///
/// where S and z are those before the piece, and a = g . (the chunk's first value) keeps what values have in common out
/// of E. E is rounded, and loss = rowsum(tril(phi psi^T) * rounding of E) is what that makes of phi . u. dq has delta
/// with it, so that dq sums to 0 over the channels and is as exact where they hardly differ; the reverse scans, which
/// round other numbers, get delta without.
template <int kSize, int kValues>
class QueryScan : public BackwardScan<kSize, kValues, kSize> {
  using Base = BackwardScan<kSize, kValues, kSize>;
  using Base::p_, Base::at_, Base::w_, Base::place_, Base::group_, Base::scale_, Base::tiles_, Base::keys_, Base::plan_;

 public:
  // Of a multiprocessor. Three would have too few registers.
  static constexpr int kBlocks = kSize + kValues <= 128 ? 2 : 1;
  using Tiles = typename Base::Tiles;
  using Base::Base;

  /// The state of a piece's keys.
  __device__ __forceinline__ void make_state() {
    absorb(place_.keys);
    float* state = this->plan_slot(place_.piece);
    keys_.save(state + at_.z, state + at_.m, state + at_.r);
    this->for_each_of_state(s_, false, [&](float& s, int i) { state[at_.matrix + i] = s; });
  }

  template <bool kIsCausal>
  __device__ __forceinline__ void run() {
    const int64_t before = kIsCausal ? place_.piece - 1 : plan_.slots - 1;
    load(before < 0 ? this->state(p_.state_in) : this->plan_slot(before));
    if constexpr (kIsCausal) {
      scan(place_.keys);
      if (place_.piece == plan_.pieces - 1) save_gauge(this->key_chunks(), keys_.gauge());
    } else {
      if (plan_.slots == 0) absorb(place_.keys);
      if (place_.piece == 0) {
        save_gauge(0, initial_gauge());
        save_gauge(this->key_chunks(), keys_.gauge());
      }
      __syncthreads();
      keys_.publish();
      answer_all(plan_.piece(place_.sequence.query_len, place_.piece));
    }
  }

 private:
  /// Null: without keys.
  __device__ __forceinline__ void load(const float* state) {
    if (!state) return;
    keys_.load(state + at_.z, state + at_.m, state + at_.r);
    this->for_each_of_state(s_, false, [&](float& s, int i) { s = state[at_.matrix + i]; });
    s_.scale_rows(tiles_.factors);
  }

  __device__ __forceinline__ void scan(const Chunks& chunks) {
    for (int chunk = chunks.begin; chunk < chunks.end; ++chunk) {
      const int count = tokens_of(place_.sequence.key_len, chunk);
      save_gauge(chunk, keys_.gauge());
      this->load_keys(chunk, true, true);
      __syncthreads();
      Division division;
      Piece piece{0, 0, true};
      while (piece.end < count) {
        piece = keys_.next(piece.end, count);
        if (keys_.moved()) s_.scale_rows(tiles_.factors);
        keys_.map(piece);
        division.note(piece);
        if (piece.is_all) {
          answer_group<kTiles>(chunk, piece);
        } else {
          answer_group<1>(chunk, piece);
        }
      }
      if (thread() == 0) w_.divisions[this->slot(chunk)] = division.bits();
    }
  }

  template <int kCount>
  __device__ __forceinline__ void answer_group(int chunk, const Piece& piece) {
    for (int g = 0; g < group_; ++g) answer<true, kCount>(chunk, g, piece);
    add<kCount>(piece);
  }

  /// Keys alone, in the order of the forward's.
  __device__ __forceinline__ void absorb(const Chunks& chunks) {
    for (int chunk = chunks.end - 1; chunk >= chunks.begin; --chunk) {
      this->load_keys(chunk, true, true);
      __syncthreads();
      const Piece piece = keys_.next_without_queries(tokens_of(place_.sequence.key_len, chunk));
      if (keys_.moved()) s_.scale_rows(tiles_.factors);
      keys_.map(piece);
      __syncthreads();
      add<kTiles>(piece);
    }
  }

  /// Queries that see all keys.
  __device__ __forceinline__ void answer_all(const Chunks& chunks) {
    for (int chunk = chunks.begin; chunk < chunks.end; ++chunk) {
      const Piece piece{0, tokens_of(place_.sequence.query_len, chunk), true};
      for (int g = 0; g < group_; ++g) answer<false, kTiles>(chunk, g, piece);
    }
  }

  /// The gauge of the initial state.
  __device__ __forceinline__ float initial_gauge() const {
    const float* state = this->state(p_.state_in);
    return state && this->has_channel() && state[at_.z + thread()] != 0 ? state[at_.m + thread()] : kNone;
  }

  __device__ __forceinline__ void save_gauge(int chunk, float gauge) const {
    if (thread() < kSize) w_.gauges[this->slot(chunk) * kSize + thread()] = gauge;
  }

  // Below, a piece has kCount tiles.

  /// S and z of the piece's keys.
  template <int kCount>
  __device__ __forceinline__ void add(const Piece& piece) {
    s_.template add<kCount>(tiles_.psi, tiles_.v, kTile * piece.first_tile());
    keys_.add(piece);
  }

  /// dq of the queries of a piece, of one head of the group.
  template <bool kSeesPiece, int kCount>
  __device__ __forceinline__ void answer(int chunk, int g, const Piece& piece) {
    const int first = kTile * piece.first_tile();
    this->load_queries(chunk, piece.end, g, false);
    map_queries<kSeesPiece>(piece);
    __syncthreads();
    Accumulator u[kCount] = {};
    s_.multiply(u, tiles_.g, first);
    if constexpr (kSeesPiece) score<kCount>(first);
    __syncthreads();
    if constexpr (kSeesPiece) add_piece(u, first);
    sum_channels<kSeesPiece>(u, first);
    __syncthreads();
    finish_rows<kSeesPiece>(chunk, g, piece);
    __syncthreads();
    finish<kSeesPiece>(u, first);
    __syncthreads();
    store<Tiles::kThreads, kSize>(
        row_at(p_.grad_q, place_.sequence.batch, place_.head * group_ + g, this->query_token(chunk)), p_.grad_q.row,
        tiles_.q, piece, p_.head_dim);
  }

  /// phi, its exponents' shift, and a in the place of delta.
  template <bool kSeesPiece>
  __device__ __forceinline__ void map_queries(const Piece& piece) const {
    using Row = QueryRow<kSize, Tiles::kWarps>;
    const int r = Row::row();
    if (!piece.has_tile(r / kTile)) return;
    const Row row(tiles_.q, tiles_.gauge, scale_);
    const Exponent shift = row.shift();
    row.map(shift, 1);
    const float a = kSeesPiece ? Row::template dot<kValues>(tiles_.g, tiles_.v, keys_.first()) : 0.f;
    if (Row::is_first_lane()) tiles_.rows[r] = {shift.high, shift.low, 0, a};
  }

  // Some warps share the scores of a tile of queries, each with a part of the keys. Their parts of the loss lie in the
  // place of the factors, which S has got.
  static constexpr int kSharing = Tiles::kWarps / kTiles;
  __device__ __forceinline__ float& loss(int part, int row) const { return tiles_.factors[part * kChunk + row]; }
  static_assert(kSharing * kChunk <= kSize);

  /// E and the loss.
  template <int kCount>
  __device__ __forceinline__ void score(int first) const {
    const int row = warp() % kTiles, part = warp() / kTiles;
    if (row >= kCount) return;
    const int at = first + kTile * row;
    float losses[2] = {};
#pragma unroll 1
    for (int column = part; column <= row; column += kSharing) {
      const int keys = first + kTile * column;
      Accumulator scores = {}, weights = {};
      multiply_rows<kValues>(scores, tiles_.g, at, tiles_.v, keys);
      for_each_element(scores, [&](float& x, int r, int) { x -= tiles_.rows[at + r].delta; });
      save_scores(tiles_.scores, scores, row, column);
      for_each_element(scores, [&](float& x, int r, int c) {
        x = column < row || c <= r ? low(pack(x, 0)) - x : 0.f;  // the rounding
      });
      multiply_rows<kSize>(weights, tiles_.q, at, tiles_.psi, keys);
#pragma unroll
      for (int e = 0; e < 4; ++e) losses[e / 2] += scores[0][e] * weights[0][e] + scores[1][e] * weights[1][e];
    }
    for (int i = 0; i < 2; ++i) {
      const float sum = sum_of_row(losses[i]);
      if (speaks_for_row()) loss(part, at + row_of(2 * i)) = sum;
    }
  }

  /// The sum over the lanes that have a row of an accumulator.
  static __device__ __forceinline__ float sum_of_row(float x) {
    x += __shfl_xor_sync(kFullMask, x, 1);
    return x + __shfl_xor_sync(kFullMask, x, 2);
  }
  static __device__ __forceinline__ bool speaks_for_row() { return lane() % 4 == 0; }

  /// u += E psi - a z.
  template <int kCount>
  __device__ __forceinline__ void add_piece(Accumulator (&u)[kCount], int first) const {
#pragma unroll
    for (int row = 0; row < kCount; ++row) {
      const SavedRow* rows = tiles_.rows + first + kTile * row;
      for_each_element(u[row], [&](float& x, int r, int column) { x -= rows[r].delta * tiles_.z[s_.row() + column]; });
    }
#pragma unroll
    for (int key = 0; key < kCount; ++key) {
      Right psi;
      load_block(psi, tiles_.psi, first + kTile * key, s_.row());
#pragma unroll
      for (int row = key; row < kCount; ++row) {
        Left scores;
        load_block(scores, tiles_.scores, kTile * row, kTile * key);
        multiply(u[row], scores, psi);
      }
    }
  }

  /// f(tile, c of its queries and this warp's channels).
  template <bool kSeesPiece, int kCount, class F>
  __device__ __forceinline__ void for_each_normaliser(int first, F&& f) const {
    constexpr uint32_t kOnes = 0x3f803f80;  // two bfloat16
    const int row = row_of(0), column = column_of(0);
    const uint32_t corner = (column <= row ? kOnes & 0xffff : 0) | (column < row ? kOnes & 0xffff0000 : 0);
    const Left lower{{corner, kOnes, 0, corner}}, whole{{kOnes, kOnes, kOnes, kOnes}};
    Accumulator z;
    for_each_element(z, [&](float& x, int, int column) { x = tiles_.z[s_.row() + column]; });
#pragma unroll
    for (int tile = 0; tile < kCount; ++tile) {
      Accumulator c = {{z[0][0], z[0][1], z[0][2], z[0][3]}, {z[1][0], z[1][1], z[1][2], z[1][3]}};
      if constexpr (kSeesPiece) {
        Right psi;
        load_block(psi, tiles_.psi, first + kTile * tile, s_.row());
        multiply(c, lower, psi);
        if (tile + 1 < kCount) multiply(z, whole, psi);
      }
      f(tile, c);
    }
  }

  /// Of a row, by one warp: its channels' parts of phi . u and of the normaliser. They lie in the place of g, which is
  /// not needed any more.
  __device__ __forceinline__ float2& part(int warp, int row) const {
    return reinterpret_cast<float2*>(tiles_.g.data)[warp * kChunk + row];
  }
  static_assert(Tiles::kWarps * kChunk * sizeof(float2) <= kChunk * kValues * sizeof(bf16));

  template <bool kSeesPiece, int kCount>
  __device__ __forceinline__ void sum_channels(const Accumulator (&u)[kCount], int first) const {
    for_each_normaliser<kSeesPiece, kCount>(first, [&](int tile, const Accumulator& c) {
      const int row = first + kTile * tile;
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        float2 sum{0, 0};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t phi = pair(tiles_.q, row, s_.row(), half, e);
          sum.x += low(phi) * u[tile][half][e] + high(phi) * u[tile][half][e + 1];
          sum.y += low(phi) * c[half][e] + high(phi) * c[half][e + 1];
        }
        sum = {sum_of_row(sum.x), sum_of_row(sum.y)};
        if (speaks_for_row()) part(warp(), row + row_of(e)) = sum;
      }
    });
  }

  /// The normaliser of every row, and phi . u / n in the place of a.
  template <bool kSeesPiece>
  __device__ __forceinline__ void finish_rows(int chunk, int g, const Piece& piece) const {
    const int r = thread();
    if (r >= kChunk || !piece.has_tile(r / kTile)) return;
    float2 sum{0, 0};
    for (int i = 0; i < Tiles::kWarps; ++i) {
      sum.x += part(i, r).x;
      sum.y += part(i, r).y;
    }
    float lost = 0;
    for (int i = 0; kSeesPiece && i < kSharing; ++i) lost += loss(i, r);
    SavedRow row = tiles_.rows[r];
    row.inverse = sum.y == 0 ? 0.f : 1 / sum.y;
    row.delta += (sum.x - lost) * row.inverse;
    if (r >= piece.begin && r < piece.end) this->saved_rows(g, chunk)[r] = row;
    row.delta = sum.x * row.inverse;
    tiles_.rows[r] = row;
  }

  /// dq in place of phi.
  template <bool kSeesPiece, int kCount>
  __device__ __forceinline__ void finish(const Accumulator (&u)[kCount], int first) const {
    for_each_normaliser<kSeesPiece, kCount>(first, [&](int tile, const Accumulator& c) {
      const int at = first + kTile * tile;
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const SavedRow& row = tiles_.rows[at + row_of(e)];
        const float factor = row.inverse * scale_;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t& words = pair(tiles_.q, at, s_.row(), half, e);
          words = pack(low(words) * factor * (u[tile][half][e] - row.delta * c[half][e]),
                       high(words) * factor * (u[tile][half][e + 1] - row.delta * c[half][e + 1]));
        }
      }
    });
  }

  Carried<kValues> s_;
};

}  // namespace elattn::cuda::chunked
