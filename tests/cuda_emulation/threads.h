#pragma once

#include <vector_types.h>

#include <cstddef>

// Loaded with the program, so that an access is one instruction and not a call; they take 48 bytes of the space for it.
#define ELATTN_EMULATION_BUILTIN inline constinit thread_local __attribute__((tls_model("initial-exec")))
ELATTN_EMULATION_BUILTIN uint3 threadIdx{};
ELATTN_EMULATION_BUILTIN uint3 blockIdx{};
ELATTN_EMULATION_BUILTIN dim3 blockDim{};
ELATTN_EMULATION_BUILTIN dim3 gridDim{};
#undef ELATTN_EMULATION_BUILTIN

namespace elattn::cuda::emulation {

unsigned char* shared_memory();
size_t shared_memory_size();

/// Ends the block with a finding.
[[noreturn]] void fail(const char* what);

/// The number of threads whose predicate holds, when all have come.
int sync_block(bool predicate, const char* file, int line);

}  // namespace elattn::cuda::emulation

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  elattn::cuda::emulation::sync_block(false, file, line);
}
inline int __syncthreads_count(int predicate, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return elattn::cuda::emulation::sync_block(predicate != 0, file, line);
}
inline int __syncthreads_or(int predicate, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return elattn::cuda::emulation::sync_block(predicate != 0, file, line) > 0;
}
inline int __syncthreads_and(int predicate, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return elattn::cuda::emulation::sync_block(predicate == 0, file, line) == 0;
}
