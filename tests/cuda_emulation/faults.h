#pragma once

#include <driver_types.h>

namespace elattn::cuda::faults {

/// Ways in which a kernel can break the rules of CUDA.
enum class Fault {
  kNone,
  // Seen in every build.
  kDifferentCollectives,
  kMissingLane,
  kMaskWithoutCaller,
  kSourceOutsideMask,
  kReturnBeforeBarrier,
  kDifferentBarriers,
  kCopyNotAwaited,
  kCopyMisaligned,
  kMatrixMisaligned,
  kOutsideTile,
  kArenaTooSmall,
  // Seen in the checked build.
  kReadAfterWrite,
  kWriteAfterRead,
  kWriteAfterWrite,
  kNoSyncwarp,
  kNeverWritten,
  kReadUnderCopy,
  kCopyOverRead,
  kPastShared,
  kOutsideBuffers,
  kWriteToReadOnly,
  kBlocksWriteOneWord,
  kBlockReadsOfAnother,
  kMisaligned,
  kVectorMisaligned,
};

/// Four blocks of two warps on `out` (4 * 64) and `in` (64), which may not be written.
cudaError_t run(Fault fault, float* out, const float* in);

}  // namespace elattn::cuda::faults
