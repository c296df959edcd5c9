#pragma once

namespace elattn::cuda::emulation {

// The instructions of cuda/async_copy.cuh. A copy lands when its thread waits for it, no sooner.
void cp_async(void* to, const void* from, int bytes, int source_bytes);
void cp_async_commit();
void cp_async_wait(int groups);

}  // namespace elattn::cuda::emulation
