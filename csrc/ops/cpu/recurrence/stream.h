#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace elattn::cpu {
inline namespace CPU_CAPABILITY {

/// Cache lines `step` bytes apart. Addresses are numbers that may wrap: past the last line they point nowhere.
struct Lines {
  uintptr_t first = 0, step = 0;
  int64_t count = 0;
};

/// Rows of the caller's tensors on their way into the second-level cache: those that the next chunk reads and this one
/// writes are asked for line by line in the loops of the products, which leave the memory idle. (Between these loops
/// the same prefetches cost several times as much.)
class Stream {
 public:
  void clear() { lines_.clear(); }

  /// `rows` rows of `bytes` bytes, `step` bytes apart.
  void add(const void* data, int64_t rows, uintptr_t step, int64_t bytes) {
    const auto row = reinterpret_cast<uintptr_t>(data);
    if (step == static_cast<uintptr_t>(bytes))
      return lines_.push_back({row, kLine, (rows * bytes + kLine - 1) / kLine});
    for (int64_t b = 0; b < bytes; b += kLine) lines_.push_back({row + static_cast<uintptr_t>(b), step, rows});
  }

  /// `next` will be called `times` times.
  void begin(int64_t times) {
    int64_t all = 0;
    for (const Lines& lines : lines_) all += lines.count;
    const int64_t whole = std::max<int64_t>(1, times - static_cast<int64_t>(lines_.size()));
    share_ = (all + whole - 1) / whole;
    at_ = 0;
  }

  /// A share of the lines.
  Lines next() {
    if (at_ == lines_.size()) return {};
    Lines& lines = lines_[at_];
    const Lines share{lines.first, lines.step, std::min(share_, lines.count)};
    lines.first += static_cast<uintptr_t>(share.count) * share.step;
    lines.count -= share.count;
    at_ += lines.count == 0;
    return share;
  }

 private:
  static constexpr int64_t kLine = 64;

  std::vector<Lines> lines_;
  size_t at_ = 0;
  int64_t share_ = 0;
};

}  // namespace CPU_CAPABILITY
}  // namespace elattn::cpu
