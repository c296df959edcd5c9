#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace elattn::cuda::emulation {

/// A rule of shared memory that an access breaks.
struct SharedProblem {
  const char* what = nullptr;  // null: none
  size_t offset = 0;           // in bytes
  int other = -1;              // the thread of the other access, if it is known
};

/// What the checked build remembers of a block's shared memory, two bytes at a time: the last writer, a summary of the
/// readers since, and whether a cp.async is under way. Good, not complete: of many readers it knows only whether they
/// were of one warp.
class SharedRecord {
 public:
  void start(size_t bytes);

  // Barriers: accesses before and after are ordered, among all threads or among the lanes of a warp.
  void order_block() { ++block_epoch_; }
  void order_warp(int warp) { ++warp_epochs_[warp]; }

  SharedProblem read(size_t offset, size_t bytes, int thread);
  SharedProblem write(size_t offset, size_t bytes, int thread);
  SharedProblem begin_copy(size_t offset, size_t bytes, int thread);
  SharedProblem end_copy(size_t offset, size_t bytes, int thread);
  /// An atomic operation is ordered with all others; only that there is something to work on can be checked.
  SharedProblem atomic(size_t offset, size_t bytes) const;

 private:
  struct Access {
    uint32_t block_epoch = 0;  // 0: none since the block began
    uint32_t warp_epoch = 0;
    int thread = kNobody;
  };
  struct Cell {
    Access write;
    Access read;
    int copier = kNobody;
  };

  static constexpr int kNobody = -1;
  static constexpr int kManyOfOneWarp = 1 << 16;  // + warp
  static constexpr int kMany = 1 << 17;
  static constexpr size_t kGrain = 2;

  bool ordered(const Access& earlier, int warp) const;
  Access now(int thread) const;
  template <class F>
  static SharedProblem for_each_cell(size_t offset, size_t bytes, F&& problem);

  std::vector<Cell> cells_;
  uint32_t block_epoch_ = 1;
  uint32_t warp_epochs_[32] = {};
};

}  // namespace elattn::cuda::emulation
