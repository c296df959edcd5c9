#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace elattn::cuda::emulation {

/// A thread of execution with a stack of its own that runs when another fiber of the same host thread switches to it.
class Fiber {
 public:
  /// The next switch to this fiber calls `entry`, which calls entered() first and never returns.
  void prepare(char* stack, size_t bytes, void (*entry)());

  /// Makes this the fiber of the calling host thread, on the stack that it has.
  void adopt_host_thread();

  /// Returns when another fiber switches back to this one, which must be the running one. With `for_ever` it does not.
  void switch_to(Fiber& next, bool for_ever = false);

  static void entered();

 private:
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
#if defined(__SANITIZE_ADDRESS__)
  const void* stack_ = nullptr;
  size_t bytes_ = 0;
  void* fake_stack_ = nullptr;
#endif
};

}  // namespace elattn::cuda::emulation
