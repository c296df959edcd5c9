#include "ops/cpu/recurrence/backward.h"
#include "ops/cpu/recurrence/features.h"
#include "ops/cpu/recurrence/forward.h"
#include "ops/cpu/recurrence/hadamard_exp.h"
#include "ops/cpu/recurrence/squared.h"
#include "ops/cpu/recurrence/team.h"

/// The kernels of one instruction set. This file is compiled once for each, with CPU_CAPABILITY naming it.
namespace elattn::cpu {
inline namespace CPU_CAPABILITY {
namespace {

/// Calls f with the map of the kernel as a template argument.
template <typename A, typename F>
void with_map(const AttentionParams& p, F&& f) {
  if (is_squared(p.kernel)) return f.template operator()<Squared<A>>();
  if (p.kernel != KernelKind::HadamardExp) return f.template operator()<Features<A>>();
  // Rows of 64 and 128 floats (of 16 lanes), the usual head sizes, are unrolled.
  switch (padded<A>(p.head_dim) / kLanes<A>) {
    case 4: return f.template operator()<HadamardExp<A, 4>>();
    case 8: return f.template operator()<HadamardExp<A, 8>>();
    default: return f.template operator()<HadamardExp<A, 0>>();
  }
}

/// Calls f with the accumulation type as a template argument and the format of the dtype.
template <typename F>
void with_format(DType dtype, F&& f) {
  switch (dtype) {
    case DType::Float: return f(Format<float>::of<float>());
    case DType::Double: return f(Format<double>::of<double>());
    case DType::BFloat16: return f(Format<float>::of<c10::BFloat16>());
    case DType::Half: return f(Format<float>::of<c10::Half>());
  }
}

template <typename A>
int64_t block_begin(const AttentionParams& p, int64_t block) {
  const int64_t vectors = padded<A>(p.value_dim) / kLanes<A>;
  return std::min(vectors * block / p.column_blocks * kLanes<A>, p.value_dim);
}

void forward(const AttentionParams& p, int64_t begin, int64_t end) {
  with_format(p.dtype, [&]<typename A>(const Format<A>& format) {
    with_map<A>(p, [&]<typename Map>() {
      for (int64_t item = begin; item < end;) {
        // Adjacent column blocks of one head are one run, whose features are computed once.
        const int64_t head = item / p.column_blocks, block = item % p.column_blocks;
        const int64_t blocks = std::min(p.column_blocks - block, end - item);
        const int64_t first = block_begin<A>(p, block), count = block_begin<A>(p, block + blocks) - first;
        // Whole heads that follow one another share one set of buffers.
        const int64_t heads = blocks == p.column_blocks ? (end - item) / p.column_blocks : 1;
        if (count > 0) {
          Forward<Map> work(p, format, first, count);
          for (int64_t i = head; i < head + heads; ++i) work.run(i / p.kv_heads, i % p.kv_heads);
        }
        item += blocks * heads;
      }
    });
  });
}

void forward_by_team(const AttentionParams& p, int64_t members, const Parallel& parallel) {
  with_format(p.dtype, [&]<typename A>(const Format<A>& format) {
    with_map<A>(p, [&]<typename Map>() {
      if constexpr (!Map::kHasValueGauge) forward_team<Map>(p, format, members, parallel);
    });
  });
}

void backward(const AttentionBackwardParams& p, int64_t begin, int64_t end) {
  with_format(p.dtype, [&]<typename A>(const Format<A>& format) {
    with_map<A>(p, [&]<typename Map>() {
      Scans<Map> scans(p, chunk_size(p));
      Backward<Map> work(p, format, scans);
      for (int64_t item = begin; item < end; ++item) work.run(item / p.kv_heads, item % p.kv_heads);
    });
  });
}

void backward_by_team(const AttentionBackwardParams& p, int64_t members, const Parallel& parallel) {
  with_format(p.dtype, [&]<typename A>(const Format<A>& format) {
    with_map<A>(p, [&]<typename Map>() {
      if constexpr (!Map::kHasValueGauge) backward_team<Map>(p, format, members, parallel);
    });
  });
}

void step(const AttentionParams& p, int64_t begin, int64_t end) {
  with_format(p.dtype, [&]<typename A>(const Format<A>& format) {
    with_map<A>(p, [&]<typename Map>() {
      Forward<Map> work(p, format, 0, p.value_dim);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t index = item / p.kv_heads, head = item % p.kv_heads;
        const int64_t slot = p.slots ? p.slots[index] : index;
        if (slot >= 0) {
          work.step(index, head, state_row<A>(p.state_in, slot, head));
        } else {
          work.skip(index, head);
        }
      }
    });
  });
}

int64_t max_column_blocks(DType dtype, int64_t value_dim) {
  const int64_t lanes = dtype == DType::Double ? kLanes<double> : kLanes<float>;
  return (value_dim + lanes - 1) / lanes;
}

int64_t max_members(DType dtype, int64_t head_dim, int64_t value_dim) {
  const int64_t narrowest = std::min(head_dim, value_dim);
  return dtype == DType::Double ? lines_of<double>(narrowest) : lines_of<float>(narrowest);
}

}  // namespace

extern const Recurrence kRecurrence = {forward, forward_by_team,   backward,   backward_by_team,
                                       step,    max_column_blocks, max_members};

}  // namespace CPU_CAPABILITY
}  // namespace elattn::cpu
