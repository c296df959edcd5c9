#pragma once

#include "cuda/chunked/carried.cuh"
#include "cuda/chunked/chunk_rows.cuh"
#include "cuda/chunked/queries.cuh"
#include "cuda/chunked/scores.cuh"

namespace elattn::cuda::chunked {

/// One (sequence, kv head) by one block. S^T stays in registers: each warp has 16 value columns. Per piece of a chunk
/// (docs/math.md, 1)
///
///     y = (phi S + tril(phi psi^T) v) / (phi . z + rowsum(tril(phi psi^T)));   S += psi^T v;   z += colsum(psi)
///
/// where phi, psi and the scores are those rounded to bfloat16 in all places, so that their errors cancel where v is
/// constant. S is the sum of two bfloat16: one would lose what tells v from its mean.
template <int kSize, int kValues>
class Forward {
 public:
  using Tiles = Storage<kSize, kValues>;

  /// Block number blockIdx.x, of as many pieces of each head; `states`: those of the plan.
  __device__ __forceinline__ Forward(const AttentionParams& p, const Plan& plan, int64_t pieces, float* states,
                                     Arena& arena)
      : p_(p),
        plan_(plan),
        states_(states),
        group_(static_cast<int>(p.group)),
        scale_(static_cast<float>(p.scale)),
        tiles_(arena),
        place_(find_place(tiles_.place, p, plan, pieces, blockIdx.x)),
        keys_(tiles_, static_cast<int>(p.head_dim), scale_) {}

  /// The state of a piece's keys.
  __device__ __forceinline__ void make_state() {
    absorb(place_.keys);
    save(slot(place_.piece));
  }

  __device__ __forceinline__ void run() {
    const int64_t before = p_.is_causal ? place_.piece - 1 : plan_.slots - 1;
    load(before < 0 ? state_row<float>(p_.state_in, place_.index, place_.head) : slot(before));
    if (p_.is_causal) {
      scan(place_.keys);
    } else {
      if (plan_.slots == 0) absorb(place_.keys);
      answer(plan_.piece(place_.sequence.query_len, place_.piece));
    }
    if (place_.piece == plan_.pieces - 1) save(state_row<float>(p_.state_out, place_.index, place_.head));
  }

 private:
  static constexpr int kThreads = Tiles::kThreads;
  static constexpr uint32_t kOnes = 0x3f803f80;  // two bfloat16

  __device__ __forceinline__ float* slot(int64_t i) const { return plan_.slot(states_, place_.row, i); }

  /// Null: without keys.
  __device__ __forceinline__ void load(const float* state) {
    if (!state) return;
    const StateOffsets& at = plan_.state;
    keys_.load(state + at.z, state + at.m, state + at.r);
    for_each_of_state([&](float& s, int i) { s = state[at.matrix + i]; });
    s_.scale_columns(tiles_.factors);
  }

  __device__ __forceinline__ void save(float* state) {
    if (!state) return;
    const StateOffsets& at = plan_.state;
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
      const int count = tokens_of(place_.sequence.key_len, chunk);
      Piece piece{0, 0, true};
      while (piece.end < count) {
        if (piece.end > 0) receive();
        piece = keys_.next(piece.end, count);
        if (keys_.moved()) s_.scale_columns(tiles_.factors);
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

  /// Keys alone, from right to left: the last that are read, which a GPU's cache still holds, are the first to be read
  /// again.
  __device__ __forceinline__ void absorb(const Chunks& chunks) {
    if (chunks.begin < chunks.end) {
      fetch_keys(chunks.end - 1);
      cp_async_commit();
    }
    for (int chunk = chunks.end - 1; chunk >= chunks.begin; --chunk) {
      receive_keys();
      if (chunk > chunks.begin) {
        fetch_keys(chunk - 1);
        cp_async_commit();
      }
      const Piece piece = keys_.next_without_queries(tokens_of(place_.sequence.key_len, chunk));
      if (keys_.moved()) s_.scale_columns(tiles_.factors);
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
        answer_piece<false, kTiles>(chunk, g, {0, tokens_of(place_.sequence.query_len, chunk), true});
      }
    }
  }

  /// f(element of S, its place in the matrix).
  template <class F>
  __device__ __forceinline__ void for_each_of_state(F&& f) {
    s_.for_each([&](float& x, int j, int d) {
      if (d < p_.head_dim && j < p_.value_dim) f(x, d * static_cast<int>(p_.value_dim) + j);
    });
  }

  /// A chunk of rows of a tensor.
  template <int kColumns>
  __device__ __forceinline__ void fetch(const Tile<bf16>& to, const Rows& rows, int64_t head, int64_t token, int count,
                                        int64_t dim) {
    chunked::fetch<kThreads, kColumns>(to, row_at(rows, place_.sequence.batch, head, token), rows.row, count, dim);
  }

  __device__ __forceinline__ void fetch_keys(int chunk) {
    const int count = tokens_of(place_.sequence.key_len, chunk), stage = key_stage_ ^ 1;
    const int64_t token = place_.sequence.key_begin + int64_t{kChunk} * chunk;
    fetch<kSize>(chunk_of(tiles_.k, stage), p_.k, place_.head, token, count, p_.head_dim);
    fetch<kValues>(chunk_of(tiles_.v, stage), p_.v, place_.head, token, count, p_.value_dim);
    is_valid_ = is_key(p_, place_.sequence, token, count);
  }

  __device__ __forceinline__ void fetch_queries(int chunk, int g) {
    fetch<kSize>(chunk_of(tiles_.q, query_stage_ ^ 1), p_.q, place_.head * group_ + g,
                 place_.sequence.query_begin + int64_t{kChunk} * chunk, tokens_of(place_.sequence.query_len, chunk),
                 p_.head_dim);
  }

  /// Waits for what was fetched. What was used before may then be overwritten.
  __device__ __forceinline__ void receive() {
    cp_async_wait<0>();
    __syncthreads();
    query_stage_ ^= 1;
  }

  __device__ __forceinline__ void receive_keys() {
    share_valid(is_valid_, tiles_.valid);
    receive();
    key_stage_ ^= 1;
    const uint64_t valid = shared_valid(tiles_.valid);
    keys_.take(k(), valid);
    keys_.find_largest();
    if (p_.padding) clear_padding<kThreads, kValues>(v(), valid);
    __syncthreads();
  }

  __device__ __forceinline__ Tile<bf16> q() const { return chunk_of(tiles_.q, query_stage_); }
  __device__ __forceinline__ Tile<bf16> k() const { return chunk_of(tiles_.k, key_stage_); }
  __device__ __forceinline__ Tile<bf16> v() const { return chunk_of(tiles_.v, key_stage_); }

  // Below, a piece has kCount tiles.

  /// S and z of the piece's keys.
  template <int kCount>
  __device__ __forceinline__ void add(const Piece& piece) {
    s_.template add<kCount>(v(), tiles_.psi, kTile * piece.first_tile());
    keys_.add(piece);
  }

  /// Outputs of the queries of a piece, which are in q(): of one head of the group.
  template <bool kSeesPiece, int kCount>
  __device__ __forceinline__ void answer_piece(int chunk, int g, const Piece& piece) {
    const int first = kTile * piece.first_tile();
    map_queries(piece);
    __syncthreads();
    Accumulator sums[kCount] = {};
    s_.multiply(sums, q(), first);
    if constexpr (kSeesPiece) score<kCount>(first);
    __syncthreads();
    finish<kSeesPiece, kCount>(sums, first);
    __syncthreads();
    store(chunk, g, piece);
  }

  /// phi of the queries, and phi . z.
  __device__ __forceinline__ void map_queries(const Piece& piece) const {
    using Row = QueryRow<kSize, Tiles::kWarps>;
    if (!piece.has_tile(Row::row() / kTile)) return;
    const Row row(q(), tiles_.gauge, scale_);
    const float past = row.map_and_dot(row.shift(), tiles_.z);
    if (Row::is_first_lane()) tiles_.past[Row::row()] = past;
  }

  /// Scores tril(phi psi^T).
  template <int kCount>
  __device__ __forceinline__ void score(int first) {
    for_each_block<Tiles::kWarps, kCount>([&](int row, int column) {
      Accumulator scores = {};
      multiply_rows<kSize>(scores, q(), first + kTile * row, tiles_.psi, first + kTile * column);
      save_scores(tiles_.scores, scores, row, column);
    });
  }

  /// Adds the scores times v, divides by the normaliser, and leaves y in q().
  template <bool kSeesPiece, int kCount>
  __device__ __forceinline__ void finish(Accumulator (&sums)[kCount], int first) {
    [[maybe_unused]] Right values[kCount];
#pragma unroll
    for (int row = 0; row < kCount; ++row) {
      const float* past = tiles_.past + first + kTile * row;
      float normaliser[4] = {past[row_of(0)], 0, past[row_of(2)], 0};
      if constexpr (kSeesPiece) {
        load_block(values[row], v(), first + kTile * row, s_.row());
#pragma unroll
        for (int key = 0; key <= row; ++key) {
          Left scores;
          load_block(scores, tiles_.scores, kTile * row, kTile * key);
          multiply(sums[row], scores, values[key]);
          mma_m16n8k16<bf16>(normaliser, scores.x, kOnes, kOnes);
        }
      }
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const float inverse = normaliser[e] == 0 ? 0.f : 1 / normaliser[e];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          pair(q(), first + kTile * row, s_.row(), half, e) =
              pack(sums[row][half][e] * inverse, sums[row][half][e + 1] * inverse);
        }
      }
    }
  }

  __device__ __forceinline__ void store(int chunk, int g, const Piece& piece) {
    bf16* to = row_at(p_.out, place_.sequence.batch, place_.head * group_ + g,
                      place_.sequence.query_begin + int64_t{kChunk} * chunk);
    chunked::store<kThreads, kValues>(to, p_.out.row, q(), piece, p_.value_dim);
  }

  const AttentionParams& p_;
  const Plan& plan_;
  float* states_;
  int group_;
  float scale_;
  Tiles tiles_;
  const Place& place_;
  Keys<kSize, Tiles::kWarps> keys_;
  Carried<kSize> s_;  // S^T
  int query_stage_ = 0, key_stage_ = 0;
  bool is_valid_ = false;  // whether this thread's token of the fetched chunk is no padding
};

}  // namespace elattn::cuda::chunked
