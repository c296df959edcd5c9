#pragma once

#include "cuda/async_copy.cuh"
#include "cuda/chunked/plan.h"
#include "cuda/chunked/queries.cuh"
#include "cuda/recurrence/rows.cuh"

namespace elattn::cuda::chunked {

/// One (sequence, kv head) by one block. S^T stays in registers: each warp has 16 value columns, in the layout in which
/// it is the right operand of phi S. Per piece of a chunk (docs/math.md, 1)
///
///     y = (phi S + tril(phi psi^T) v) / (phi . z + rowsum(tril(phi psi^T)));   S += psi^T v;   z += colsum(psi)
///
/// where phi, psi and the scores are those rounded to bfloat16 in all places, so that their errors cancel where v is
/// constant. S is the sum of two bfloat16: one would lose what tells v from its mean.
template <int kSize, int kValues>
class Forward {
 public:
  using Tiles = Storage<kSize, kValues>;

  __device__ __forceinline__ Forward(const AttentionParams& p, const Sequence& sequence, int64_t head, Arena& arena)
      : p_(p),
        sequence_(sequence),
        head_(head),
        group_(static_cast<int>(p.group)),
        scale_(static_cast<float>(p.scale)),
        tiles_(arena),
        keys_(tiles_, static_cast<int>(p.head_dim), scale_) {}

  /// Null: without keys.
  __device__ __forceinline__ void load(const float* state, const StateOffsets& at) {
    if (!state) return;
    keys_.load(state + at.z, state + at.m, state + at.r);
    for_each_of_state([&](float& s, int i) { s = state[at.matrix + i]; });
    rescale();
  }

  __device__ __forceinline__ void save(float* state, const StateOffsets& at) {
    if (!state) return;
    keys_.save(state + at.z, state + at.m, state + at.r);
    for_each_of_state([&](float& s, int i) { state[at.matrix + i] = s; });
  }

  /// Keys and queries of a causal call.
  __device__ __forceinline__ void scan(const Chunks& chunks) {
    if (chunks.begin < chunks.end) {
      fetch_keys(chunks.begin);
      fetch_queries(chunks.begin, 0);
      cp_async_commit();
    }
    for (int chunk = chunks.begin; chunk < chunks.end; ++chunk) {
      receive_keys();
      const int count = tokens(sequence_.key_len, chunk);
      Piece piece{0, 0, true};
      while (piece.end < count) {
        if (piece.end > 0) receive();
        piece = keys_.next(piece.end, count);
        if (keys_.moved()) rescale();
        keys_.map(piece);
        for (int g = 0; g < group_; ++g) {
          if (g > 0) receive();
          if (g + 1 < group_) {
            fetch_queries(chunk, g + 1);
          } else if (piece.end < count) {
            fetch_queries(chunk, 0);
          } else if (chunk + 1 < chunks.end) {
            fetch_keys(chunk + 1);
            fetch_queries(chunk + 1, 0);
          }
          cp_async_commit();
          if (piece.is_all) {
            answer_piece<true, kTiles>(chunk, g, piece);
          } else {
            answer_piece<true, 1>(chunk, g, piece);
          }
        }
        if (piece.is_all) {
          add<kTiles>(piece);
        } else {
          add<1>(piece);
        }
      }
    }
  }

  /// Keys alone.
  __device__ __forceinline__ void absorb(const Chunks& chunks) {
    if (chunks.begin < chunks.end) {
      fetch_keys(chunks.begin);
      cp_async_commit();
    }
    for (int chunk = chunks.begin; chunk < chunks.end; ++chunk) {
      receive_keys();
      if (chunk + 1 < chunks.end) {
        fetch_keys(chunk + 1);
        cp_async_commit();
      }
      const Piece piece = keys_.next_without_queries(tokens(sequence_.key_len, chunk));
      if (keys_.moved()) rescale();
      keys_.map(piece);
      __syncthreads();
      add<kTiles>(piece);
    }
  }

  /// Queries that see all keys so far.
  __device__ __forceinline__ void answer(const Chunks& chunks) {
    __syncthreads();
    keys_.publish();
    if (chunks.begin < chunks.end) {
      fetch_queries(chunks.begin, 0);
      cp_async_commit();
    }
    for (int chunk = chunks.begin; chunk < chunks.end; ++chunk) {
      for (int g = 0; g < group_; ++g) {
        receive();
        if (g + 1 < group_) {
          fetch_queries(chunk, g + 1);
        } else if (chunk + 1 < chunks.end) {
          fetch_queries(chunk + 1, 0);
        }
        cp_async_commit();
        answer_piece<false, kTiles>(chunk, g, {0, tokens(sequence_.query_len, chunk), true});
      }
    }
  }

 private:
  static constexpr int kThreads = Tiles::kThreads;
  static constexpr uint32_t kOnes = 0x3f803f80;  // two bfloat16

  static __device__ __forceinline__ int tokens(int64_t length, int chunk) {
    const int64_t rest = length - int64_t{kChunk} * chunk;
    return rest < kChunk ? static_cast<int>(rest) : kChunk;
  }

  /// The first value column of this warp.
  static __device__ __forceinline__ int column() { return kTile * warp(); }

  /// f(element of S, its place in the matrix).
  template <class F>
  __device__ __forceinline__ void for_each_of_state(F&& f) {
#pragma unroll
    for (int n = 0; n < kSize / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int d = 8 * n + column_of(0) + e % 2, j = column() + row_of(e & 2);
        if (d < p_.head_dim && j < p_.value_dim) f(s_[n][e], d * static_cast<int>(p_.value_dim) + j);
      }
    }
  }

  /// A chunk of rows of a tensor, zero from row `count` on.
  template <int kColumns>
  __device__ __forceinline__ void fetch(const Tile<bf16>& to, const Rows& rows, int64_t head, int64_t token, int count,
                                        int64_t dim) {
    const auto* from =
        static_cast<const bf16*>(rows.data) + sequence_.batch * rows.batch + head * rows.head + token * rows.row;
#pragma unroll 1
    for (int i = thread(); i < kChunk * kColumns / kVector; i += kThreads) {
      const int r = i / (kColumns / kVector), c = i % (kColumns / kVector) * kVector;
      const bool inside = r < count && c < dim;
      cp_async<16>(to.at(r, c), from + (inside ? r * rows.row + c : 0), inside ? 16 : 0);
    }
  }

  __device__ __forceinline__ void fetch_keys(int chunk) {
    const int count = tokens(sequence_.key_len, chunk), stage = key_stage_ ^ 1;
    const int64_t token = sequence_.key_begin + int64_t{kChunk} * chunk;
    fetch<kSize>(chunk_of(tiles_.k, stage), p_.k, head_, token, count, p_.head_dim);
    fetch<kValues>(chunk_of(tiles_.v, stage), p_.v, head_, token, count, p_.value_dim);
    is_valid_ = thread() < count;
    if (is_valid_ && p_.padding) {
      is_valid_ = !p_.padding[sequence_.batch * p_.padding_batch + (token + thread()) * p_.padding_row];
    }
  }

  __device__ __forceinline__ void fetch_queries(int chunk, int g) {
    fetch<kSize>(chunk_of(tiles_.q, query_stage_ ^ 1), p_.q, head_ * group_ + g,
                 sequence_.query_begin + int64_t{kChunk} * chunk, tokens(sequence_.query_len, chunk), p_.head_dim);
  }

  /// Waits for what was fetched. What was used before may then be overwritten.
  __device__ __forceinline__ void receive() {
    cp_async_wait<0>();
    __syncthreads();
    query_stage_ ^= 1;
  }

  __device__ __forceinline__ void receive_keys() {
    if (warp() < 2) {
      const uint32_t bits = __ballot_sync(kFullMask, is_valid_);
      if (lane() == 0) tiles_.valid[warp()] = bits;
    }
    receive();
    key_stage_ ^= 1;
    const uint64_t valid = tiles_.valid[0] | static_cast<uint64_t>(tiles_.valid[1]) << 32;
    keys_.take(k(), valid);
    if (p_.padding) clear_values(valid);
    __syncthreads();
  }

  /// What lies under a mask may be NaN.
  __device__ __forceinline__ void clear_values(uint64_t valid) {
#pragma unroll 1
    for (int i = thread(); i < kChunk * kValues / kVector; i += kThreads) {
      const int r = i / (kValues / kVector), c = i % (kValues / kVector) * kVector;
      if (!(valid >> r & 1)) *reinterpret_cast<uint4*>(v().at(r, c)) = uint4{0, 0, 0, 0};
    }
  }

  __device__ __forceinline__ Tile<bf16> q() const { return chunk_of(tiles_.q, query_stage_); }
  __device__ __forceinline__ Tile<bf16> k() const { return chunk_of(tiles_.k, key_stage_); }
  __device__ __forceinline__ Tile<bf16> v() const { return chunk_of(tiles_.v, key_stage_); }

  /// S into the gauge of the piece.
  __device__ __forceinline__ void rescale() {
#pragma unroll
    for (int n = 0; n < kSize / 8; ++n) {
      const float* factors = tiles_.factors + 8 * n + column_of(0);
#pragma unroll
      for (int e = 0; e < 4; ++e) s_[n][e] *= factors[e % 2];
    }
  }

  // Below, a piece has kCount tiles.

  /// S and z of the piece's keys.
  template <int kCount>
  __device__ __forceinline__ void add(const Piece& piece) {
    const int first = kTile * piece.first_tile();
#pragma unroll
    for (int key = 0; key < kTile * kCount; key += kTile) {
      Fragment values;
      load_transposed(values, v(), first + key, column());
#pragma unroll
      for (int d = 0; d < kSize; d += kTile) {
        Fragment psi;
        load_transposed(psi, tiles_.psi, first + key, d);
        mma_m16n8k16<bf16>(s_[d / 8], values, psi[0], psi[2]);
        mma_m16n8k16<bf16>(s_[d / 8 + 1], values, psi[1], psi[3]);
      }
    }
    keys_.add(piece);
  }

  /// Outputs of the queries of a piece, which are in q(): of one head of the group.
  template <bool kSeesPiece, int kCount>
  __device__ __forceinline__ void answer_piece(int chunk, int g, const Piece& piece) {
    const int first = kTile * piece.first_tile();
    map_queries(tiles_, q(), piece, scale_);
    __syncthreads();
    Accumulator sums[kCount] = {};
    multiply_past<kCount>(sums, first);
    if constexpr (kSeesPiece) score<kCount>(first);
    __syncthreads();
    finish<kSeesPiece, kCount>(sums, first);
    __syncthreads();
    store(chunk, g, piece);
  }

  /// phi S.
  template <int kCount>
  __device__ __forceinline__ void multiply_past(Accumulator (&sums)[kCount], int first) {
#pragma unroll
    for (int d = 0; d < kSize; d += kTile) {
      const float(&left)[4] = s_[d / 8], (&right)[4] = s_[d / 8 + 1];
      const float pairs[4][2] = {{left[0], left[1]}, {left[2], left[3]}, {right[0], right[1]}, {right[2], right[3]}};
      Fragment rounded, rest;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        rounded[i] = pack(pairs[i][0], pairs[i][1]);
        rest[i] = pack(pairs[i][0] - low(rounded[i]), pairs[i][1] - high(rounded[i]));
      }
#pragma unroll
      for (int tile = 0; tile < kCount; ++tile) {
        Fragment phi;
        load_fragment(phi, q(), first + kTile * tile, d);
        multiply(sums[tile], phi, rounded);
        multiply(sums[tile], phi, rest);
      }
    }
  }

  /// Scores tril(phi psi^T): the blocks on and below the diagonal are shared out among the warps.
  template <int kCount>
  __device__ __forceinline__ void score(int first) {
#pragma unroll 1
    for (int block = warp(); block < kCount * (kCount + 1) / 2; block += Tiles::kWarps) {
      const int row = block < 1 ? 0 : block < 3 ? 1 : block < 6 ? 2 : 3, column = block - row * (row + 1) / 2;
      Accumulator scores = {};
#pragma unroll
      for (int d = 0; d < kSize; d += kTile) {
        Fragment phi, psi;
        load_fragment(phi, q(), first + kTile * row, d);
        load_fragment(psi, tiles_.psi, first + kTile * column, d);
        multiply(scores, phi, psi);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
          const int i = row_of(e), j = column_of(half);
          const bool all = column < row;
          pair(tiles_.scores, kTile * row, kTile * column, half, e) =
              pack(all || j <= i ? scores[half][e] : 0.f, all || j + 1 <= i ? scores[half][e + 1] : 0.f);
        }
      }
    }
  }

  /// Adds the scores times v, divides by the normaliser, and leaves y in q().
  template <bool kSeesPiece, int kCount>
  __device__ __forceinline__ void finish(Accumulator (&sums)[kCount], int first) {
    [[maybe_unused]] Fragment values[kCount];
#pragma unroll
    for (int row = 0; row < kCount; ++row) {
      const float* past = tiles_.past + first + kTile * row;
      float normaliser[4] = {past[row_of(0)], 0, past[row_of(2)], 0};
      if constexpr (kSeesPiece) {
        load_transposed(values[row], v(), first + kTile * row, column());
#pragma unroll
        for (int key = 0; key <= row; ++key) {
          Fragment scores;
          load_fragment(scores, tiles_.scores, kTile * row, kTile * key);
          multiply(sums[row], scores, values[key]);
          mma_m16n8k16<bf16>(normaliser, scores, kOnes, kOnes);
        }
      }
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const float inverse = normaliser[e] == 0 ? 0.f : 1 / normaliser[e];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          pair(q(), first + kTile * row, column(), half, e) =
              pack(sums[row][half][e] * inverse, sums[row][half][e + 1] * inverse);
        }
      }
    }
  }

  __device__ __forceinline__ void store(int chunk, int g, const Piece& piece) {
    auto* to = static_cast<bf16*>(p_.out.data) + sequence_.batch * p_.out.batch + (head_ * group_ + g) * p_.out.head +
               (sequence_.query_begin + int64_t{kChunk} * chunk) * p_.out.row;
    constexpr int kVectors = kValues / kVector;
#pragma unroll 1
    for (int i = piece.begin * kVectors + thread(); i < piece.end * kVectors; i += kThreads) {
      const int r = i / kVectors, c = i % kVectors * kVector;
      if (c < p_.value_dim) {
        *reinterpret_cast<uint4*>(to + r * p_.out.row + c) = *reinterpret_cast<const uint4*>(q().at(r, c));
      }
    }
  }

  const AttentionParams& p_;
  Sequence sequence_;
  int64_t head_;
  int group_;
  float scale_;
  Tiles tiles_;
  Keys<kSize, kValues> keys_;
  float s_[kSize / 8][4] = {};  // S^T of this warp's columns, in blocks of eight channels
  int query_stage_ = 0, key_stage_ = 0;
  bool is_valid_ = false;  // whether this thread's token of the fetched chunk is no padding
};

}  // namespace elattn::cuda::chunked
