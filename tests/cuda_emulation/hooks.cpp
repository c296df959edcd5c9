// The checked build compiles kernels with -fsanitize=thread and links these functions instead of the sanitizer's
// library, so that every load and store that the compiler emits is seen here, with nothing said in the source.

#include <cstddef>

#include "tests/cuda_emulation/block.h"
#include "tests/cuda_emulation/checks.h"

namespace {

using elattn::cuda::emulation::Touch;

inline void seen(const void* address, size_t bytes, size_t alignment, Touch touch, const void* pc) {
  if (elattn::cuda::emulation::Block::in_kernel() == nullptr) return;
  elattn::cuda::emulation::check_access(address, bytes, alignment, touch, pc);
}

}  // namespace

#define ELATTN_HOOK(name, bytes, alignment, touch) \
  void name(void* address) { seen(address, bytes, alignment, touch, __builtin_return_address(0)); }
#define ELATTN_HOOKS(bytes)                                         \
  ELATTN_HOOK(__tsan_read##bytes, bytes, bytes, Touch::kRead)       \
  ELATTN_HOOK(__tsan_write##bytes, bytes, bytes, Touch::kWrite)     \
  ELATTN_HOOK(__tsan_unaligned_read##bytes, bytes, 1, Touch::kRead) \
  ELATTN_HOOK(__tsan_unaligned_write##bytes, bytes, 1, Touch::kWrite)

extern "C" {

ELATTN_HOOKS(1)
ELATTN_HOOKS(2)
ELATTN_HOOKS(4)
ELATTN_HOOKS(8)
ELATTN_HOOKS(16)

void __tsan_read_range(void* address, size_t bytes) {
  seen(address, bytes, 1, Touch::kRead, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
  seen(address, bytes, 1, Touch::kWrite, __builtin_return_address(0));
}

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
