#include "tests/cuda_emulation/fiber.h"

#if defined(__SANITIZE_ADDRESS__)
#include <pthread.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace elattn::cuda::emulation {

#if defined(__x86_64__)
namespace {

/// Saves the registers that a callee has to preserve and continues on the other stack. ucontext would do, but makes a
/// system call on every switch.
__attribute__((naked, noinline)) void switch_stacks(void** /*from*/, void* /*to*/) {
  asm("push %rbp\n\t"
      "push %rbx\n\t"
      "push %r12\n\t"
      "push %r13\n\t"
      "push %r14\n\t"
      "push %r15\n\t"
      "mov %rsp, (%rdi)\n\t"
      "mov %rsi, %rsp\n\t"
      "pop %r15\n\t"
      "pop %r14\n\t"
      "pop %r13\n\t"
      "pop %r12\n\t"
      "pop %rbx\n\t"
      "pop %rbp\n\t"
      "ret");
}

}  // namespace
#endif

void Fiber::prepare(char* stack, size_t bytes, void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack, bytes);
  stack_ = stack;
  bytes_ = bytes;
#endif
#if defined(__x86_64__)
  // What switch_stacks pops: six registers and where to return to. The word above keeps the alignment of a call.
  constexpr int kRegisters = 6;
  void** top = reinterpret_cast<void**>(stack + bytes);
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kRegisters; ++i) top[-3 - i] = nullptr;
  stack_pointer_ = top - 2 - kRegisters;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = bytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#endif
}

void Fiber::adopt_host_thread() {
#if defined(__SANITIZE_ADDRESS__)
  if (stack_ != nullptr) return;
  pthread_attr_t attributes;
  void* stack = nullptr;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &stack, &bytes_);
  pthread_attr_destroy(&attributes);
  stack_ = stack;
#endif
}

void Fiber::switch_to(Fiber& next, [[maybe_unused]] bool for_ever) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_ever ? nullptr : &fake_stack_, next.stack_, next.bytes_);
#endif
#if defined(__x86_64__)
  switch_stacks(&stack_pointer_, next.stack_pointer_);
#else
  swapcontext(&context_, &next.context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
}

void Fiber::entered() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

}  // namespace elattn::cuda::emulation
