#pragma once

#include "cuda/chunked/storage.cuh"

namespace elattn::cuda::chunked {

/// Tokens [begin, end) of a chunk that share a gauge: all that it has, or some of one tile.
struct Piece {
  int begin, end;
  bool is_all;
  __device__ __forceinline__ int first_tile() const { return is_all ? 0 : begin / kTile; }
  __device__ __forceinline__ int last_tile() const { return is_all ? kTiles : begin / kTile + 1; }
  __device__ __forceinline__ bool has_tile(int tile) const { return tile >= first_tile() && tile < last_tile(); }
};

/// The gauge and the normaliser of one (sequence, kv head), and psi = exp(k - gauge) of its chunks. Thread d has
/// channel d. The gauge of a piece is the largest key so far in each channel. For queries that see only the first of
/// the piece's keys this must not be too far up (kGap), or their features vanish: then the piece is made smaller.
template <int kSize, int kWarps>
class Keys {
 public:
  /// A chunk in the shares of warps: a tile by two columns for each lane.
  static constexpr int kUnits = kTiles * kSize / (2 * kWarpSize);
  static __device__ __forceinline__ int tile_of_unit(int unit) { return unit % kTiles; }
  static __device__ __forceinline__ int column_of_unit(int unit) { return 2 * (unit / kTiles * kWarpSize + lane()); }

  __device__ __forceinline__ Keys(const KeyStorage<kSize, kWarps>& storage, int head_dim, float scale)
      : s_(storage), head_dim_(head_dim), scale_(scale) {}

  /// z and m + r of a state. S has factors afterwards: r becomes 0.
  __device__ __forceinline__ void load(const float* z, const float* m, const float* r) {
    float factor = 1;
    if (has_channel() && z[thread()] != 0) {
      factor = expf(r[thread()]);
      z_ = z[thread()] * factor;
      m_ = m[thread()];
    }
    if (thread() < kSize) s_.factors[thread()] = factor;
    any_ = block_or(z_ != 0, s_.words) != 0;
  }

  __device__ __forceinline__ void save(float* z, float* m, float* r) const {
    if (!has_channel()) return;
    z[thread()] = z_;
    m[thread()] = z_ == 0 ? -INFINITY : m_;
    r[thread()] = 0;
  }

  /// Shows the present gauge and normaliser to queries. A barrier must follow.
  __device__ __forceinline__ void publish() const {
    if (thread() >= kSize) return;
    show_gauge(m_);
    s_.z[thread()] = z_;
  }

  /// Takes up a chunk.
  __device__ __forceinline__ void take(const Tile<bf16>& k, uint64_t valid) {
    k_ = k;
    valid_ = valid;
  }

  /// The largest keys of every tile, by which a chunk is divided. A barrier must follow.
  __device__ __forceinline__ void find_largest() const {
    for (int unit = warp(); unit < kUnits; unit += kWarps) {
      const int tile = tile_of_unit(unit), column = column_of_unit(unit);
      const unsigned valid = of_tile(valid_, tile);
      __nv_bfloat162 top = __float2bfloat162_rn(-INFINITY);
#pragma unroll
      for (int t = 0; t < kTile; ++t) {
        const auto keys = *reinterpret_cast<const __nv_bfloat162*>(k_.at(kTile * tile, column) + t * k_.ld);
        if (valid & 1u << t) top = __hmax2(top, keys);
      }
      s_.by_tile[tile * kSize + column] = __fmul_rn(__low2float(top), scale_);
      s_.by_tile[tile * kSize + column + 1] = __fmul_rn(__high2float(top), scale_);
    }
  }

  /// Moves the gauge to the next piece from token `begin` of the `count` of the chunk on, as large as possible: all of
  /// the chunk, a tile or a token.
  __device__ __forceinline__ Piece next(int begin, int count) {
    for (int size = begin == 0 ? kChunk : begin % kTile == 0 ? kTile : 1;; size = size == kChunk ? kTile : 1) {
      const Piece piece{begin, begin + size < count ? begin + size : count, size == kChunk};
      found_ = propose(piece, size);
      if (size == 1 || !(found_ & kTooFar)) {
        accept(piece);
        return piece;
      }
      __syncthreads();
    }
  }

  /// The same for keys that no query of the chunk sees: always all `count` of them.
  __device__ __forceinline__ Piece next_without_queries(int count) {
    const Piece piece{0, count, true};
    found_ = propose(piece, kChunk);
    accept(piece);
    return piece;
  }

  /// The first token of the chunk that is no padding; any, if there is none.
  __device__ __forceinline__ int first() const { return first_of(valid_); }

  /// The gauge of the channel of this thread.
  __device__ __forceinline__ float gauge() const { return m_; }

  /// For the way back through the pieces: the gauge after them.
  __device__ __forceinline__ void begin_back(float gauge) { m_ = gauge; }

  /// The gauge of a piece of a divided chunk, before which it was `entry`.
  __device__ __forceinline__ float gauge_of(const Piece& piece, float entry) const {
    float m = entry;
    if (has_channel()) {
      const int whole = piece.begin / kTile;
      for (int tile = 0; tile < whole; ++tile) m = fmaxf(m, s_.by_tile[tile * kSize + thread()]);
      for (int t = kTile * whole; t < piece.end; ++t) {
        if (valid_ >> t & 1) m = fmaxf(m, key(t));
      }
    }
    return m;
  }

  /// Moves the gauge back; shows it and the factors of the gradient of S to all. Returns the factor of this thread's
  /// channel. A barrier must follow.
  __device__ __forceinline__ float back_to(float gauge) {
    const float factor = expf(gauge - m_);
    m_ = gauge;
    if (thread() < kSize) {
      show_gauge(gauge);
      s_.factors[thread()] = factor;
    }
    return factor;
  }

  /// Whether S has factors since the last piece.
  __device__ __forceinline__ bool moved() const { return found_ & kMoved; }

  /// psi of the tiles that `piece` lies in, zero outside of it, and their sums. A barrier must follow.
  __device__ __forceinline__ void map(const Piece& piece) const {
    const uint64_t active = valid_ & mask(piece);
    for (int unit = warp(); unit < kUnits; unit += kWarps) {
      const int tile = tile_of_unit(unit), column = column_of_unit(unit);
      if (!piece.has_tile(tile)) continue;
      const unsigned tokens = column < head_dim_ ? of_tile(active, tile) : 0;
      const float m0 = fmaxf(s_.gauge[column], kNone), m1 = fmaxf(s_.gauge[column + 1], kNone);
      const uint32_t* keys = &pair(k_, kTile * tile, column);
      uint32_t* psi = &pair(s_.psi, kTile * tile, column);
      float sum0 = 0, sum1 = 0;
      constexpr int kBatch = 8;  // read before any is written: the compiler does not know that psi lies elsewhere
#pragma unroll
      for (int t = 0; t < kTile; t += kBatch) {
        uint32_t x[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) x[i] = keys[(t + i) * k_.ld / 2];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          x[i] = pack(feature(fmaf(low(x[i]), scale_, -m0)), feature(fmaf(high(x[i]), scale_, -m1)));
          x[i] = tokens & 1u << (t + i) ? x[i] : 0;  // without a branch
          sum0 += low(x[i]);
          sum1 += high(x[i]);
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) psi[(t + i) * s_.psi.ld / 2] = x[i];
      }
      s_.by_tile[tile * kSize + column] = sum0;
      s_.by_tile[tile * kSize + column + 1] = sum1;
    }
  }

  /// Adds the piece to the normaliser, after the barrier that follows `map`.
  __device__ __forceinline__ void add(const Piece& piece) {
    if (thread() >= kSize) return;
    for (int tile = piece.first_tile(); tile < piece.last_tile(); ++tile) z_ += s_.by_tile[tile * kSize + thread()];
  }

 private:
  static_assert(kSize <= kWarps * kWarpSize);

  // A query that sees only the first key loses terms below e^(kGap - 87) of its weight: below 2^-24 of it all together.
  static constexpr float kGap = 48;
  static constexpr unsigned kTooFar = 1, kMoved = 2;

  static __device__ __forceinline__ uint64_t mask(const Piece& piece) {
    return ~uint64_t{0} << piece.begin & ~uint64_t{0} >> (kChunk - piece.end);
  }

  static __device__ __forceinline__ unsigned of_tile(uint64_t tokens, int tile) {
    return static_cast<unsigned>(tokens >> kTile * tile) & 0xffff;
  }

  static __device__ __forceinline__ int first_of(uint64_t bits) {
    const int low = __ffs(static_cast<int>(bits)), high = __ffs(static_cast<int>(bits >> 32));
    return low ? low - 1 : high + 31;
  }

  __device__ __forceinline__ void show_gauge(float m) const { s_.gauge[thread()] = m == kNone ? -INFINITY : m; }
  __device__ __forceinline__ bool has_channel() const { return thread() < head_dim_; }
  __device__ __forceinline__ float key(int t) const { return __fmul_rn(__bfloat162float(k_(t, thread())), scale_); }

  __device__ __forceinline__ unsigned propose(const Piece& piece, int size) {
    unsigned found = 0;
    if (has_channel()) {
      const uint64_t active = valid_ & mask(piece);
      float top = m_;
      if (size == 1) {
        if (active) top = fmaxf(top, key(piece.begin));
      } else {
        for (int tile = piece.first_tile(); tile < piece.last_tile(); ++tile) {
          top = fmaxf(top, s_.by_tile[tile * kSize + thread()]);
        }
      }
      // Without any key before, queries before the first key see none and have y = 0.
      const int first = any_ || !active ? piece.begin : first_of(active);
      float least = m_;
      if (active >> first & 1) least = fmaxf(least, key(first));
      if (top - least > kGap) found |= kTooFar;
      if (top != m_) found |= kMoved;
      factor_ = expf(m_ - top);
      top_ = top;
    }
    if (thread() < kSize) {
      show_gauge(top_);
      s_.z[thread()] = z_ * factor_;
      s_.factors[thread()] = factor_;
    }
    return block_or(found, s_.words);
  }

  __device__ __forceinline__ void accept(const Piece& piece) {
    m_ = top_;
    z_ *= factor_;
    any_ |= (valid_ & mask(piece)) != 0;
  }

  KeyStorage<kSize, kWarps> s_;
  int head_dim_;
  float scale_;
  Tile<bf16> k_;
  uint64_t valid_ = 0;
  bool any_ = false;    // whether there was a key
  unsigned found_ = 0;  // about the last piece
  float m_ = kNone, z_ = 0;
  float top_ = kNone, factor_ = 1;  // proposed: the gauge, and the factor of z and S
};

}  // namespace elattn::cuda::chunked
