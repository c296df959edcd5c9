#pragma once

#include "cuda/chunked/backward.cuh"

namespace elattn::cuda::chunked {

/// Whose gradient a reverse scan gives.
enum class Of { kKeys, kValues };

/// From right to left, with R: a warp has 16 channels for dk, or, R being transposed, 16 value columns for dv. Per
/// piece of a chunk, phi divided by the normaliser,
///
///     dv = psi R + tril(phi psi^T)^T g
///     dk = psi * (v R^T + rho + tril(g v^T - delta)^T phi)
///     R += phi^T g;   rho -= colsum(delta phi)
///
/// where R and rho on the right are those of the queries after the piece.
template <int kSize, int kValues, Of kOf>
class ReverseScan : public BackwardScan<kSize, kValues, kOf == Of::kKeys ? kSize : kValues> {
  static constexpr bool kOfKeys = kOf == Of::kKeys;
  using Base = BackwardScan<kSize, kValues, kOfKeys ? kSize : kValues>;
  using Base::p_, Base::at_, Base::w_, Base::place_, Base::group_, Base::scale_, Base::tiles_, Base::keys_, Base::plan_;

 public:
  static constexpr int kBlocks = chunked::kBlocks<kSize, kValues>;
  using Tiles = typename Base::Tiles;
  using Base::Base;

  /// R and rho of a piece's queries, at the gauge before its keys; in the place of m the factor that takes a gradient
  /// there from behind them. What queries of the first piece of a causal call add concerns no other: slots begin with
  /// the second.
  __device__ __forceinline__ void make_state() {
    const Chunks queries = plan_.piece(place_.sequence.query_len, place_.piece + plan_.pieces - plan_.slots);
    const int end = p_.is_causal ? queries.end : this->key_chunks(), begin = p_.is_causal ? queries.begin : end;
    keys_.begin_back(gauge_before(begin));
    keys_.back_to(keys_.gauge());
    collect(queries);
    float* state = this->plan_slot(place_.piece);
    share_rho();
    __syncthreads();
    if (this->has_channel()) {
      state[at_.z + thread()] = rho();
      state[at_.m + thread()] = expf(keys_.gauge() - gauge_before(end));
    }
    save_matrix(state);
  }

  template <bool kIsCausal>
  __device__ __forceinline__ void run() {
    if constexpr (kIsCausal) {
      keys_.begin_back(gauge_before(place_.keys.end));
      load(place_.piece);
      scan(place_.keys);
      __syncthreads();
      share_rho();
    } else {
      keys_.begin_back(gauge_before(this->key_chunks()));
      keys_.back_to(keys_.gauge());
      load(0);
      if (plan_.slots == 0) collect(plan_.piece(place_.sequence.query_len, 0));
      share_out(place_.keys);
    }
    if (kOfKeys && place_.piece == 0) save_initial();
  }

 private:
  /// R and rho of all queries after a piece of the plan.
  __device__ __forceinline__ void load(int64_t piece) {
    const float* state = piece < plan_.slots ? this->plan_slot(piece) : this->state(p_.grad_state_out);
    if (!state) return;
    this->for_each_of_state(r_, !kOfKeys, [&](float& r, int i) { r = state[at_.matrix + i]; });
    for (int i = 0; i < 2; ++i) {
      if (kOfKeys && tile() == 0 && column() + i < p_.head_dim) rho_[i] = state[at_.z + column() + i];
    }
  }

  /// The gradient of the initial state, at its own gauge. The parts of rho are those shared last.
  __device__ __forceinline__ void save_initial() {
    auto* state = this->template state<float>(p_.grad_state_in);
    if (!state) return;
    __syncthreads();
    float factor = keys_.back_to(gauge_before(0));
    if (this->has_channel()) {
      if (gauge_before(0) != kNone) factor *= expf(this->state(p_.state_in)[at_.r + thread()]);
      tiles_.factors[thread()] = factor;
      state[at_.z + thread()] = rho() * factor;
      state[at_.m + thread()] = 0;
      state[at_.r + thread()] = 0;
    }
    __syncthreads();
    r_.scale_rows(tiles_.factors);
    save_matrix(state);
  }

  __device__ __forceinline__ void save_matrix(float* state) {
    this->for_each_of_state(r_, false, [&](float& r, int i) { state[at_.matrix + i] = r; });
  }

  __device__ __forceinline__ float gauge_before(int chunk) const {
    return thread() < kSize ? w_.gauges[this->slot(chunk) * kSize + thread()] : kNone;
  }

  /// Keys and queries of a causal call.
  __device__ __forceinline__ void scan(const Chunks& chunks) {
    for (int chunk = chunks.end - 1; chunk >= chunks.begin; --chunk) {
      const Division division(w_.divisions[this->slot(chunk)]);
      const float after = gauge_before(chunk + 1);
      const int count = tokens_of(place_.sequence.key_len, chunk);
      this->load_keys(chunk, kOfKeys, !division.is_whole());
      if (division.is_whole()) {
        scan_piece<kTiles>(chunk, {0, count, true}, after);
        continue;
      }
      const float before = gauge_before(chunk);
      for (int end = count; end > 0;) {
        const Piece piece = division.before(end);
        end = piece.begin;
        __syncthreads();
        scan_piece<1>(chunk, piece, keys_.gauge_of(piece, before));
      }
    }
  }

  /// R and rho of queries, at the present gauge.
  __device__ __forceinline__ void collect(const Chunks& chunks) {
    for (int chunk = chunks.begin; chunk < chunks.end; ++chunk) {
      const Piece piece{0, tokens_of(place_.sequence.query_len, chunk), true};
      for (int g = 0; g < group_; ++g) {
        receive_queries(chunk, g, piece);
        add<kTiles>(piece);
      }
    }
  }

  /// Keys, which are seen by all queries.
  __device__ __forceinline__ void share_out(const Chunks& chunks) {
    share_rho();
    __syncthreads();
    publish_rho();
    for (int chunk = chunks.begin; chunk < chunks.end; ++chunk) {
      const Piece piece{0, tokens_of(place_.sequence.key_len, chunk), true};
      this->load_keys(chunk, kOfKeys, false);
      __syncthreads();
      keys_.map(piece);
      __syncthreads();
      gradients<false, kTiles>(chunk, piece);
    }
  }

  __device__ __forceinline__ void scale(const float* factors) {
    if constexpr (kOfKeys) {
      r_.scale_rows(factors);
      for (int i = 0; i < 2; ++i) rho_[i] *= factors[column() + i];
    } else {
      r_.scale_columns(factors);
    }
  }

  // Of rho a warp has the part of its unit's queries, a lane that of two channels.
  using KeysOf = Keys<kSize, Tiles::kWarps>;
  static_assert(!kOfKeys || KeysOf::kUnits == Tiles::kWarps);
  static __device__ __forceinline__ int tile() { return KeysOf::tile_of_unit(warp()); }
  static __device__ __forceinline__ int column() { return KeysOf::column_of_unit(warp()); }

  /// The parts lie in the place of scores, between two uses of these.
  __device__ __forceinline__ float* parts() const { return reinterpret_cast<float*>(tiles_.scores.data); }
  static_assert(kTiles * kSize * sizeof(float) <= kChunk * kChunk * sizeof(bf16));

  /// A barrier must follow.
  __device__ __forceinline__ void share_rho() const {
    for (int i = 0; kOfKeys && i < 2; ++i) parts()[tile() * kSize + column() + i] = rho_[i];
  }

  /// Of the channel of this thread.
  __device__ __forceinline__ float rho() const {
    float sum = 0;
    for (int i = 0; i < kTiles; ++i) sum += parts()[i * kSize + thread()];
    return sum;
  }

  /// In the place of the normaliser, which is not needed on the way back. A barrier must follow.
  __device__ __forceinline__ void publish_rho() const {
    if (kOfKeys && thread() < kSize) tiles_.z[thread()] = rho();
  }

  __device__ __forceinline__ void receive_queries(int chunk, int g, const Piece& piece) const {
    using Row = QueryRow<kSize, Tiles::kWarps>;
    this->load_queries(chunk, piece.end, g, true);
    if (piece.has_tile(Row::row() / kTile)) {
      const SavedRow& saved = tiles_.rows[Row::row()];
      const bool is_inside = Row::row() >= piece.begin && Row::row() < piece.end;
      Row(tiles_.q, tiles_.gauge, scale_).map({saved.shift, saved.shift_low}, is_inside ? saved.inverse : 0.f);
    }
    __syncthreads();
  }

  // Below, a piece has kCount tiles.

  /// Brings R and rho to the gauge of a piece, for its keys and queries.
  template <int kCount>
  __device__ __forceinline__ void scan_piece(int chunk, const Piece& piece, float gauge) {
    __syncthreads();
    keys_.back_to(gauge);
    __syncthreads();
    scale(tiles_.factors);
    share_rho();
    keys_.map(piece);
    __syncthreads();
    publish_rho();
    gradients<true, kCount>(chunk, piece);
  }

  /// R and rho of the piece's queries.
  template <int kCount>
  __device__ __forceinline__ void add(const Piece& piece) {
    const int first = kTile * piece.first_tile();
    if constexpr (kOfKeys) {
      r_.template add<kCount>(tiles_.q, tiles_.g, first);
      if (!piece.has_tile(tile())) return;
#pragma unroll 4
      for (int i = kTile * tile(); i < kTile * (tile() + 1); ++i) {
        const uint32_t phi = pair(tiles_.q, i, column());
        rho_[0] -= tiles_.rows[i].delta * low(phi);
        rho_[1] -= tiles_.rows[i].delta * high(phi);
      }
    } else {
      r_.template add<kCount>(tiles_.g, tiles_.q, first);
    }
  }

  /// Gradients of the keys or values of a piece.
  template <bool kSeesPiece, int kCount>
  __device__ __forceinline__ void gradients(int chunk, const Piece& piece) {
    const int first = kTile * piece.first_tile();
    Accumulator sums[kCount] = {};
    r_.multiply(sums, kOfKeys ? tiles_.v : tiles_.psi, first);
    if constexpr (kSeesPiece) {
      for (int g = 0; g < group_; ++g) {
        receive_queries(chunk, g, piece);
        score<kCount>(first);
        __syncthreads();
        add_piece(sums, first);
        add<kCount>(piece);
      }
    }
    const Rows& to = kOfKeys ? p_.grad_k : p_.grad_v;
    const Tile<bf16>& results = finish(sums, first);
    __syncthreads();
    store<Tiles::kThreads, kOfKeys ? kSize : kValues>(
        row_at(to, place_.sequence.batch, place_.head, this->key_token(chunk)), to.row, results, piece,
        kOfKeys ? p_.head_dim : p_.value_dim);
  }

  /// tril(phi psi^T) for dv, tril(g v^T - delta) for dk.
  template <int kCount>
  __device__ __forceinline__ void score(int first) const {
    for_each_block<Tiles::kWarps, kCount>([&](int row, int column) {
      const int at = first + kTile * row, keys = first + kTile * column;
      Accumulator scores = {};
      if constexpr (kOfKeys) {
        multiply_rows<kValues>(scores, tiles_.g, at, tiles_.v, keys);
        for_each_element(scores, [&](float& x, int r, int) { x -= tiles_.rows[at + r].delta; });
      } else {
        multiply_rows<kSize>(scores, tiles_.q, at, tiles_.psi, keys);
      }
      save_scores(tiles_.scores, scores, row, column);
    });
  }

  /// Adds the transposed scores times phi or g.
  template <int kCount>
  __device__ __forceinline__ void add_piece(Accumulator (&sums)[kCount], int first) const {
#pragma unroll
    for (int row = 0; row < kCount; ++row) {
      Right queries;
      load_block(queries, kOfKeys ? tiles_.q : tiles_.g, first + kTile * row, r_.row());
#pragma unroll
      for (int key = 0; key <= row; ++key) {
        Left scores;
        load_transposed(scores, tiles_.scores, kTile * row, kTile * key);
        multiply(sums[key], scores, queries);
      }
    }
  }

  /// Leaves dk in the place of psi, or dv in that of g, of which no other warp needs these columns.
  template <int kCount>
  __device__ __forceinline__ const Tile<bf16>& finish(const Accumulator (&sums)[kCount], int first) const {
    const Tile<bf16>& results = kOfKeys ? tiles_.psi : tiles_.g;
    if constexpr (!kOfKeys) __syncwarp();  // lanes have loaded g for one another
#pragma unroll
    for (int tile = 0; tile < kCount; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
          float a = sums[tile][half][e], b = sums[tile][half][e + 1];
          uint32_t& words = pair(results, first + kTile * tile, r_.row(), half, e);
          if constexpr (kOfKeys) {
            const float* rho = tiles_.z + r_.row() + column_of(half);
            a = low(words) * scale_ * (a + rho[0]);
            b = high(words) * scale_ * (b + rho[1]);
          }
          words = pack(a, b);
        }
      }
    }
    return results;
  }

  Carried<kOfKeys ? kValues : kSize> r_;  // R or the transposed
  float rho_[2] = {};
};

}  // namespace elattn::cuda::chunked
