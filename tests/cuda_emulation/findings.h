#pragma once

#include <functional>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace elattn::cuda::emulation {

/// What the blocks of one launch found wrong: each kind once, and not more than a person reads.
class Findings {
 public:
  /// `text` is made only if nothing was added under `key` before.
  void add(const std::string& key, const std::function<std::string()>& text);

  bool full();
  std::vector<std::string> take() { return std::move(texts_); }

 private:
  static constexpr size_t kMost = 20;

  std::mutex mutex_;
  std::set<std::string> keys_;
  std::vector<std::string> texts_;
};

/// The source lines of a return address, innermost first: "tile.cuh:20 < forward.cuh:70". Where the program addr2line
/// is missing, the object file and an offset in it.
std::string source_of(const void* return_address);

}  // namespace elattn::cuda::emulation
