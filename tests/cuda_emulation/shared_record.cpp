#include "tests/cuda_emulation/shared_record.h"

namespace elattn::cuda::emulation {

void SharedRecord::start(size_t bytes) {
  cells_.assign(bytes / kGrain + 1, Cell{});
  block_epoch_ = 1;
}

SharedRecord::Access SharedRecord::now(int thread) const { return {block_epoch_, warp_epochs_[thread / 32], thread}; }

bool SharedRecord::ordered(const Access& earlier, int warp) const {
  if (earlier.block_epoch != block_epoch_) return true;
  const bool of_this_warp =
      earlier.thread >= kManyOfOneWarp ? earlier.thread == kManyOfOneWarp + warp : earlier.thread / 32 == warp;
  return of_this_warp && earlier.warp_epoch != warp_epochs_[warp];
}

template <class F>
SharedProblem SharedRecord::for_each_cell(size_t offset, size_t bytes, F&& problem) {
  SharedProblem first;
  for (size_t i = offset / kGrain; i <= (offset + bytes - 1) / kGrain; ++i) {
    const SharedProblem found = problem(i);
    if (first.what == nullptr && found.what != nullptr) first = found;
  }
  first.offset *= kGrain;
  return first;
}

SharedProblem SharedRecord::read(size_t offset, size_t bytes, int thread) {
  const int warp = thread / 32;
  return for_each_cell(offset, bytes, [&](size_t i) -> SharedProblem {
    Cell& cell = cells_[i];
    const bool ordered_write = cell.write.thread == thread || ordered(cell.write, warp);
    const Access earlier = cell.read;
    cell.read = now(thread);
    if (earlier.thread != kNobody && earlier.thread != thread && !ordered(earlier, warp)) {
      const int other = earlier.thread >= kManyOfOneWarp ? earlier.thread - kManyOfOneWarp : earlier.thread / 32;
      cell.read.thread = other == warp ? kManyOfOneWarp + warp : kMany;
    }
    if (cell.copier != kNobody) return {"read while a cp.async is under way", i, cell.copier};
    if (cell.write.thread == kNobody) return {"read of shared memory that was never written", i, kNobody};
    if (!ordered_write) return {"read after write without a barrier between", i, cell.write.thread};
    return {};
  });
}

SharedProblem SharedRecord::write(size_t offset, size_t bytes, int thread) {
  const int warp = thread / 32;
  return for_each_cell(offset, bytes, [&](size_t i) -> SharedProblem {
    Cell& cell = cells_[i];
    const Access written = cell.write, read = cell.read;
    cell.write = now(thread);
    cell.read = {};
    if (cell.copier != kNobody) return {"write while a cp.async is under way", i, cell.copier};
    if (written.thread != kNobody && written.thread != thread && !ordered(written, warp)) {
      return {"write after write without a barrier between", i, written.thread};
    }
    if (read.thread != kNobody && read.thread != thread && !ordered(read, warp)) {
      return {"write after read without a barrier between", i, read.thread < kManyOfOneWarp ? read.thread : kNobody};
    }
    return {};
  });
}

SharedProblem SharedRecord::begin_copy(size_t offset, size_t bytes, int thread) {
  const SharedProblem problem = write(offset, bytes, thread);
  for_each_cell(offset, bytes, [&](size_t i) -> SharedProblem {
    cells_[i].copier = thread;
    return {};
  });
  return problem;
}

SharedProblem SharedRecord::end_copy(size_t offset, size_t bytes, int thread) {
  for_each_cell(offset, bytes, [&](size_t i) -> SharedProblem {
    cells_[i].copier = kNobody;
    return {};
  });
  return write(offset, bytes, thread);
}

SharedProblem SharedRecord::atomic(size_t offset, size_t bytes) const {
  return for_each_cell(offset, bytes, [&](size_t i) -> SharedProblem {
    const Cell& cell = cells_[i];
    if (cell.copier != kNobody) return {"atomic while a cp.async is under way", i, cell.copier};
    if (cell.write.thread == kNobody) return {"atomic on shared memory that was never written", i, kNobody};
    return {};
  });
}

}  // namespace elattn::cuda::emulation
