#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace elattn::cuda::emulation {

/// In which order the warps of a block run between barriers: the first as far as it can, then the next.
enum class Order { kRandom, kForward, kReverse };

/// How launches run. The environment gives the first values: ELATTN_EMULATION_ORDER (random, forward or reverse),
/// ELATTN_EMULATION_SEED and ELATTN_EMULATION_WORKERS.
struct Options {
  Order order = Order::kRandom;
  uint64_t seed = 1;
  int workers = 1;  // host threads that share out the blocks of a launch
};
Options& options();

/// Whether this is the checked build.
bool checked();

/// What was wrong in the last launch of the calling thread. Empty if that returned cudaSuccess.
const std::vector<std::string>& findings();

/// A buffer that kernels may touch. While a thread of the host has at least one, the checked build reports every access
/// of its launches to global memory outside them, and words that several blocks share without atomics. Without any, and
/// in the other builds, global memory is not checked.
class Expose {
 public:
  Expose(const void* data, size_t bytes, bool writable, std::string name);
  ~Expose();
  Expose(const Expose&) = delete;
  Expose& operator=(const Expose&) = delete;

 private:
  const void* buffer_;
};

}  // namespace elattn::cuda::emulation
