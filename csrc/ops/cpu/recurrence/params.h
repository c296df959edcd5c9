#pragma once

#include <functional>

#include "ops/params.h"

namespace elattn::cpu {

/// Runs f(0) .. f(parts - 1), at the same time if there are threads.
using Parallel = std::function<void(int64_t parts, const std::function<void(int64_t part)>& f)>;

/// The kernels of one instruction set. Work items are (sequence, kv head, column block) in row-major order for forward,
/// (sequence, kv head) for backward and step; any partition into ranges gives the same bits.
struct Recurrence {
  void (*forward)(const AttentionParams&, int64_t begin, int64_t end);
  /// A causal forward of one head by several threads, for the kernels whose gauge is that of the keys alone (not the
  /// squared ones).
  void (*team)(const AttentionParams&, int64_t sequence, int64_t kv_head, int64_t members, const Parallel&);
  void (*backward)(const AttentionBackwardParams&, int64_t begin, int64_t end);
  void (*step)(const AttentionParams&, int64_t begin, int64_t end);
  int64_t (*max_column_blocks)(DType, int64_t value_dim);
};

/// The kernels for this machine; honours ATEN_CPU_CAPABILITY.
const Recurrence& recurrence();

}  // namespace elattn::cpu
