#pragma once

#include <cstddef>

namespace elattn::cuda::emulation {

enum class Touch { kRead, kWrite, kAtomic };

/// Checks an access to shared or global memory by the running thread, as far as this build can, and reports what is
/// wrong with it; ends the block where the access itself would do harm.
void check_access(const void* address, size_t bytes, size_t alignment, Touch touch, const void* pc);

/// Only the part that concerns global memory.
void check_global(const void* address, size_t bytes, Touch touch, const void* pc);

/// Reports what `problem` says of an access to shared memory.
struct SharedProblem;
void report_shared(const SharedProblem& problem, const void* pc);

}  // namespace elattn::cuda::emulation
