#pragma once

#include "ops/cpu/recurrence/params.h"
#include "ops/cpu/recurrence/products.h"
#include "ops/cpu/recurrence/rows.h"

/// What forward and backward share: where the sequences lie, and rows of the caller's tensors as operands.
namespace elattn::cpu {
inline namespace CPU_CAPABILITY {

/// Tokens whose features are held at a time. 96 rows of 64 floats for each of q, k, v, the features and the results
/// stay in the second-level cache beside the rows of the next chunk. It is a multiple of the 3 tokens of a block.
inline constexpr int64_t kChunk = 96;

/// Reads and writes rows of one dtype.
template <typename A>
struct Format {
  int64_t bytes;
  bool direct;  // the dtype is A: rows can be used where they are
  void (*load)(A* to, int64_t to_stride, const void* from, int64_t from_stride, int64_t rows, int64_t count, A scale,
               A fill);
  void (*store)(void* to, int64_t to_stride, const A* from, int64_t from_stride, int64_t rows, int64_t count, A scale);

  template <typename T>
  static const Format& of() {
    static constexpr Format format{
        sizeof(T), std::is_same_v<A, T>,
        [](A* to, int64_t to_stride, const void* from, int64_t from_stride, int64_t rows, int64_t count, A scale,
           A fill) {
          const T* row = static_cast<const T*>(from);
          for (int64_t i = 0; i < rows; ++i) load_row(to + i * to_stride, row + i * from_stride, count, scale, fill);
        },
        [](void* to, int64_t to_stride, const A* from, int64_t from_stride, int64_t rows, int64_t count, A scale) {
          T* row = static_cast<T*>(to);
          for (int64_t i = 0; i < rows; ++i) store_row(row + i * to_stride, from + i * from_stride, count, scale);
        }};
    return format;
  }
};

/// Columns [first, first + count) of padded rows, whole vectors.
struct Columns {
  int64_t first, count;

  /// How many of them lie within the first `size`.
  int64_t within(int64_t size) const { return std::min(first + count, size) - first; }
};

/// Rows [query_begin, query_begin + query_len) and [key_begin, key_begin + key_len) of one batch entry.
struct Sequence {
  int64_t batch, query_begin, query_len, key_begin, key_len;
};

inline Sequence sequence(const AttentionParams& p, int64_t index) {
  if (!p.cu_seqlens) return {index, 0, p.query_len, 0, p.key_len};
  const int64_t begin = p.cu_seqlens[index], len = p.cu_seqlens[index + 1] - begin;
  return {0, begin, len, begin, len};
}

/// The longest sequence decides how large the buffers of a work item must be.
inline int64_t chunk_size(const AttentionParams& p) {
  if (p.cu_seqlens) return kChunk;
  return std::clamp<int64_t>(std::max(p.query_len, p.key_len), 1, kChunk);
}

/// Columns [first, first + count) of one tensor for one (sequence, kv head), `heads` rows per token.
template <typename A>
class TensorRows {
 public:
  /// `begin` and `head`: the first token's row and the first head.
  void open(int64_t batch, int64_t head, int64_t begin) {
    offset_ = batch * rows_.batch + head * rows_.head + begin * rows_.row + first_;
  }

  /// Tokens [t, t + n), if any, will be used soon.
  void announce(int64_t t, int64_t n, Stream& stream) const {
    if (n <= 0) return;
    for (int64_t h = 0; h < heads_; ++h) {
      stream.add(at(t, h), n, static_cast<uintptr_t>(rows_.row) * static_cast<uintptr_t>(format_.bytes),
                 count_ * format_.bytes);
    }
  }

 protected:
  TensorRows(const Format<A>& format, const Rows& rows, int64_t heads, int64_t first, int64_t count)
      : format_(format), rows_(rows), heads_(heads), count_(count), first_(first) {}

  char* at(int64_t t, int64_t h) const {
    return static_cast<char*>(rows_.data) + (offset_ + t * rows_.row + h * rows_.head) * format_.bytes;
  }

  const Format<A>& format_;
  Rows rows_;
  int64_t heads_, count_;

 private:
  int64_t first_, offset_ = 0;
};

/// Rows read chunk by chunk.
template <typename A>
class Reader : public TensorRows<A> {
  using TensorRows<A>::format_, TensorRows<A>::rows_, TensorRows<A>::heads_, TensorRows<A>::count_;

 public:
  /// As rows of `size` >= count numbers, times `scale`, filled up with `fill`.
  Reader(const Format<A>& format, const Rows& rows, int64_t heads, int64_t first, int64_t count, int64_t size, A scale,
         A fill, int64_t chunk, Buffers<A>& buffers)
      : TensorRows<A>(format, rows, heads, first, count), size_(size), scale_(scale), fill_(fill) {
    buffer_ = buffers.take(chunk * heads * size);
  }

  /// (tokens, heads, size) of tokens [t, t + n). Tokens marked in `skip` are not read: their rows are zero.
  Operand<const A> read(int64_t t, int64_t n, const bool* skip = nullptr) {
    const char* from = this->at(t, 0);
    if (format_.direct && scale_ == A(1) && count_ == size_ && !skip) {
      return {reinterpret_cast<const A*>(from), rows_.row, rows_.head};
    }
    const int64_t step = heads_ * size_;
    for (int64_t h = 0; h < heads_; ++h, from += rows_.head * format_.bytes) {
      A* to = buffer_ + h * size_;
      if (!skip) {
        format_.load(to, step, from, rows_.row, n, count_, scale_, fill_);
        continue;
      }
      for (int64_t i = 0; i < n; ++i) {
        if (skip[i]) {
          fill(to + i * step, size_, A(0));
        } else {
          format_.load(to + i * step, step, from + i * rows_.row * format_.bytes, rows_.row, 1, count_, scale_, fill_);
        }
      }
    }
    return {buffer_, step, size_};
  }

  /// A copy that may be changed.
  Operand<A> read_copy(int64_t t, int64_t n, const bool* skip = nullptr) {
    const Operand<const A> rows = read(t, n, skip);
    if (rows.data == buffer_) return {buffer_, rows.step, rows.stride};
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t h = 0; h < heads_; ++h) std::copy_n(rows.at(i, h), size_, buffer_ + (i * heads_ + h) * size_);
    }
    return {buffer_, heads_ * size_, size_};
  }

 private:
  int64_t size_;
  A scale_, fill_;
  A* buffer_;
};

/// The counterpart of Reader. Results always pass through a buffer: written to the tensor in two-vector columns, as the
/// products make them, they miss the cache at every row (1.25 times slower at 64 MiB); whole rows do not.
template <typename A>
class Writer : public TensorRows<A> {
  using TensorRows<A>::format_, TensorRows<A>::rows_, TensorRows<A>::heads_, TensorRows<A>::count_;

 public:
  Writer(const Format<A>& format, const Rows& rows, int64_t heads, int64_t first, int64_t count, int64_t size, A scale,
         int64_t chunk, Buffers<A>& buffers)
      : TensorRows<A>(format, rows, heads, first, count), size_(size), scale_(scale) {
    buffer_ = buffers.take(chunk * heads * size);
  }

  /// A buffer (tokens, heads, size) for `write`.
  Operand<A> buffer() const { return {buffer_, heads_ * size_, size_}; }

  /// The buffer to rows [t, t + n) of the tensor.
  void write(int64_t t, int64_t n) const {
    for (int64_t h = 0; h < heads_; ++h) {
      format_.store(this->at(t, h), rows_.row, buffer_ + h * size_, heads_ * size_, n, count_, scale_);
    }
  }

 private:
  int64_t size_;
  A scale_;
  A* buffer_;
};

/// Forgetting rates of one kv head, as rows of whole vectors (zero beyond the channels).
template <typename A>
class DecayReader {
 public:
  DecayReader(const Decay& decay, int64_t channels, Buffers<A>& buffers)
      : decay_(decay), channels_(channels), size_(padded<A>(channels)) {
    if (decay.data) row_ = buffers.take(size_);
  }

  void open(int64_t batch, int64_t head, int64_t begin) {
    if (!decay_.data) return;
    from_ = static_cast<const A*>(decay_.data) + batch * decay_.batch + head * decay_.head + begin * decay_.row;
    copy(0);
  }

  /// The rates of token t, or null without decay.
  const A* row(int64_t t) {
    if (!decay_.data) return nullptr;
    if (decay_.row == 0) return row_;
    if (decay_.channel == 1 && channels_ == size_) return from_ + t * decay_.row;
    copy(t);
    return row_;
  }

 private:
  void copy(int64_t t) {
    const A* from = from_ + t * decay_.row;
    for (int64_t d = 0; d < channels_; ++d) row_[d] = from[d * decay_.channel];
  }

  Decay decay_;
  int64_t channels_, size_;
  A* row_ = nullptr;
  const A* from_ = nullptr;
};

/// Which tokens of a chunk are padding.
class Padding {
 public:
  explicit Padding(const AttentionParams& p) : p_(p) {}
  /// Null if none can be.
  const bool* read(const Sequence& s, int64_t t, int64_t n) {
    if (!p_.padding) return nullptr;
    for (int64_t i = 0; i < n; ++i)
      chunk_[i] = p_.padding[s.batch * p_.padding_batch + (s.key_begin + t + i) * p_.padding_row];
    return chunk_;
  }

 private:
  const AttentionParams& p_;
  bool chunk_[kChunk];
};

/// S between a state and a (rows, columns) matrix in either memory order; columns [first, first + count) of the state.
template <typename Map, typename A = typename Map::Scalar>
void load_matrix(const Map& map, const A* state, int64_t value_dim, int64_t first, int64_t count, const Matrix<A>& to) {
  const A* from = state + map.matrix_offset() + first;
  for (int64_t r = 0; r < map.rows(); ++r) {
    for (int64_t j = 0; j < count; ++j) to(map.row_of_state(r), j) = from[r * value_dim + j];
  }
}

template <typename Map, typename A = typename Map::Scalar>
void save_matrix(const Map& map, const Matrix<A>& from, int64_t value_dim, int64_t first, int64_t count, A* state) {
  A* to = state + map.matrix_offset() + first;
  for (int64_t r = 0; r < map.rows(); ++r) {
    for (int64_t j = 0; j < count; ++j) to[r * value_dim + j] = from(map.row_of_state(r), j);
  }
}

template <typename A>
A* state_row(const State& state, int64_t row, int64_t head) {
  return state.data ? static_cast<A*>(state.data) + row * state.batch + head * state.head : nullptr;
}

}  // namespace CPU_CAPABILITY
}  // namespace elattn::cpu
