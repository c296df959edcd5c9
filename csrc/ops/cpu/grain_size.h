#pragma once

#include <algorithm>
#include <cstdint>

namespace elattn::cpu {

/// Multiply-adds that are worth waking another thread for, about two microseconds.
constexpr int64_t kWorkPerThread = 1 << 16;

/// The least number of work items a thread is given.
inline int64_t grain_size(int64_t work_per_item) {
  return std::max<int64_t>(1, kWorkPerThread / std::max<int64_t>(1, work_per_item));
}

}  // namespace elattn::cpu
