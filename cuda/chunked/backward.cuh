#pragma once

#include "cuda/chunked/carried.cuh"
#include "cuda/chunked/chunk_rows.cuh"
#include "cuda/chunked/queries.cuh"
#include "cuda/chunked/scores.cuh"

/// Gradients of one (sequence, kv head), docs/math.md, 2, by three kernels. A forward scan has S and gives delta = g .
/// y and dq; two reverse scans, which do not wait for each other, have R = sum phi g^T, one of them transposed, and
/// give dk and dv. Each is one block, or one for each piece of the plan. Chunks, their pieces and gauges are those of
/// the forward. Features and scores are operands, rounded to bfloat16; g . v - delta is formed in float first, or what
/// v has in common would drown the rest. S and R are the sum of two bfloat16.
namespace elattn::cuda::chunked {

/// What one query row leaves for the reverse scans.
struct alignas(16) SavedRow {
  float shift, shift_low;  // subtracted from the exponents of phi
  float inverse;           // 1 / normaliser; 0 where the row sees no key
  float delta;
};

/// What the kernels leave for one another in global memory.
struct Workspace {
  SavedRow* rows = nullptr;       // (batch, head, query)
  float* gauges = nullptr;        // (slot, size): before each chunk of a kv head, and after the last
  uint32_t* divisions = nullptr;  // (slot)
  int64_t slots = 0;              // of one kv head
  float* states = nullptr;        // of the plan: states of its pieces, later gradients of states
};

/// The first slot of a packed sequence. It has one for each chunk and one more, and begins where the tokens before it
/// leave at least these free.
inline __host__ __device__ int64_t first_slot(int64_t key_begin, int64_t index) {
  return key_begin / kChunk + 2 * index;
}

/// Which tiles of a chunk were gone through token by token, if the chunk was not taken as a whole.
class Division {
 public:
  __device__ __forceinline__ explicit Division(uint32_t bits = 0) : bits_(bits) {}
  __device__ __forceinline__ uint32_t bits() const { return bits_; }
  __device__ __forceinline__ bool is_whole() const { return !(bits_ & kDivided); }

  __device__ __forceinline__ void note(const Piece& piece) {
    if (piece.is_all) return;
    bits_ |= kDivided;
    if (piece.end - piece.begin == 1) bits_ |= 1u << piece.first_tile();
  }

  /// The piece of a divided chunk that ends at token `end`.
  __device__ __forceinline__ Piece before(int end) const {
    const int tile = (end - 1) / kTile;
    return {bits_ >> tile & 1 ? end - 1 : kTile * tile, end, false};
  }

 private:
  static constexpr uint32_t kDivided = 1u << kTiles;
  uint32_t bits_;
};

/// The shared memory of a block.
template <int kSize, int kValues, int kWarps_>
struct BackwardStorage : KeyStorage<kSize, kWarps_> {
  static constexpr int kWarps = kWarps_;

  Tile<bf16> q, k;    // (tokens, size); queries become phi
  Tile<bf16> v, g;    // (tokens, values); g: gradients of outputs
  Tile<bf16> scores;  // (queries, keys)
  SavedRow* rows;     // (tokens)

  __host__ __device__ explicit BackwardStorage(Arena& arena) : KeyStorage<kSize, kWarps>(arena) {
    q = arena.tile<bf16>(kChunk, kSize);
    k = arena.tile<bf16>(kChunk, kSize);
    v = arena.tile<bf16>(kChunk, kValues);
    g = arena.tile<bf16>(kChunk, kValues);
    scores = arena.tile<bf16>(kChunk, kChunk);
    rows = arena.take<SavedRow>(kChunk);
  }
};

/// What the three scans have in common. A warp has 16 rows of what the block carries: channels or value columns.
template <int kSize_, int kValues_, int kRows>
class BackwardScan {
 public:
  static constexpr int kSize = kSize_, kValues = kValues_;
  using Tiles = BackwardStorage<kSize, kValues, kRows / kTile>;

  /// Block number `block`, of as many pieces of each head.
  __device__ __forceinline__ BackwardScan(const AttentionBackwardParams& p, const Plan& plan, int64_t pieces,
                                          const Workspace& workspace, int64_t block, Arena& arena)
      : p_(p),
        plan_(plan),
        at_(plan.state),
        w_(workspace),
        group_(static_cast<int>(p.group)),
        scale_(static_cast<float>(p.scale)),
        tiles_(arena),
        place_(find_place(tiles_.place, p, plan, pieces, block)),
        keys_(tiles_, static_cast<int>(p.head_dim), scale_) {}

 protected:
  static constexpr int kThreads = Tiles::kThreads;

  __device__ __forceinline__ int key_chunks() const { return static_cast<int>(chunks_of(place_.sequence.key_len)); }
  __device__ __forceinline__ bool has_channel() const { return thread() < p_.head_dim; }

  template <class T = const float>
  __device__ __forceinline__ T* state(const State& state) const {
    return state_row<T>(state, place_.index, place_.head);
  }

  /// Of the plan.
  __device__ __forceinline__ float* plan_slot(int64_t i) const { return plan_.slot(w_.states, place_.row, i); }

  /// f(element of what is carried, its place in the matrix of a state).
  template <int kColumns, class F>
  __device__ __forceinline__ void for_each_of_state(Carried<kColumns>& carried, bool is_transposed, F&& f) const {
    carried.for_each([&](float& x, int row, int column) {
      const int d = is_transposed ? column : row, j = is_transposed ? row : column;
      if (d < p_.head_dim && j < p_.value_dim) f(x, d * static_cast<int>(p_.value_dim) + j);
    });
  }

  /// In the workspace, of chunk i of the keys.
  __device__ __forceinline__ int64_t slot(int64_t i) const {
    const int64_t row = p_.cu_seqlens ? place_.head : place_.row;
    const int64_t first = p_.cu_seqlens ? first_slot(place_.sequence.key_begin, place_.index) : 0;
    return row * w_.slots + first + i;
  }

  __device__ __forceinline__ SavedRow* saved_rows(int64_t g, int chunk) const {
    const int64_t head = (place_.sequence.batch * p_.kv_heads + place_.head) * group_ + g;
    return w_.rows + head * p_.query_len + place_.sequence.query_begin + int64_t{kChunk} * chunk;
  }

  __device__ __forceinline__ int64_t key_token(int chunk) const {
    return place_.sequence.key_begin + int64_t{kChunk} * chunk;
  }
  __device__ __forceinline__ int64_t query_token(int chunk) const {
    return place_.sequence.query_begin + int64_t{kChunk} * chunk;
  }

  template <int kColumns>
  __device__ __forceinline__ void fetch(const Tile<bf16>& to, const Rows& rows, int64_t head, int64_t token, int count,
                                        int64_t dim) const {
    chunked::fetch<kThreads, kColumns>(to, row_at(rows, place_.sequence.batch, head, token), rows.row, count, dim);
  }

  /// Waits until nobody reads the last chunk of keys, and for this one. A barrier must follow. Only where `divides` can
  /// it be divided.
  __device__ __forceinline__ void load_keys(int chunk, bool has_values, bool divides) {
    const int count = tokens_of(place_.sequence.key_len, chunk);
    __syncthreads();
    fetch<kSize>(tiles_.k, p_.k, place_.head, key_token(chunk), count, p_.head_dim);
    if (has_values) fetch<kValues>(tiles_.v, p_.v, place_.head, key_token(chunk), count, p_.value_dim);
    share_valid(is_key(p_, place_.sequence, key_token(chunk), count), tiles_.valid);
    wait();
    const uint64_t valid = shared_valid(tiles_.valid);
    keys_.take(tiles_.k, valid);
    if (divides) keys_.find_largest();
    if (has_values && p_.padding) clear_padding<kThreads, kValues>(tiles_.v, valid);
  }

  /// Waits until nobody reads the last chunk of queries, and for q and g of this one up to token `count` and, if they
  /// are known, its rows.
  __device__ __forceinline__ void load_queries(int chunk, int count, int g, bool has_rows) const {
    const int64_t head = place_.head * group_ + g;
    __syncthreads();
    fetch<kSize>(tiles_.q, p_.q, head, query_token(chunk), count, p_.head_dim);
    fetch<kValues>(tiles_.g, p_.grad_out, head, query_token(chunk), count, p_.value_dim);
    if (has_rows && thread() < kChunk) {
      const bool inside = thread() < count;
      cp_async<16>(tiles_.rows + thread(), saved_rows(g, chunk) + (inside ? thread() : 0), inside ? 16 : 0);
    }
    wait();
  }

  static __device__ __forceinline__ void wait() {
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
  }

  const AttentionBackwardParams& p_;
  const Plan& plan_;
  const StateOffsets& at_;
  const Workspace& w_;
  int group_;
  float scale_;
  Tiles tiles_;
  const Place& place_;
  Keys<kSize, Tiles::kWarps> keys_;
};

}  // namespace elattn::cuda::chunked
