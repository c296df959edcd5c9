#pragma once

#include <driver_types.h>
#include <vector_types.h>

#include <atomic>
#include <bit>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "tests/cuda_emulation/emulation.h"
#include "tests/cuda_emulation/exposed_buffers.h"
#include "tests/cuda_emulation/fiber.h"
#include "tests/cuda_emulation/findings.h"
#include "tests/cuda_emulation/shared_record.h"
#include "tests/cuda_emulation/warp.h"

namespace elattn::cuda::emulation {

/// Whether the loads and stores of kernels are reported to this library (hooks.cpp).
#ifdef CUDA_EMULATION_CHECKED
constexpr bool kChecked = true;
#else
constexpr bool kChecked = false;
#endif

constexpr int kMaxThreads = 1024;
constexpr int kWarpLanes = 32;
constexpr size_t kMaxSharedBytes = 227 * 1024;  // of sm_90

/// What the blocks of one launch have in common.
struct Launch {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;
  void (*kernel)(const void*) = nullptr;
  const void* arguments = nullptr;
  size_t argument_bytes = 0;
  ExposedBuffers buffers;
  Options options;
  Findings findings;

  int threads() const { return static_cast<int>(block.x * block.y * block.z); }
  uint64_t blocks() const { return uint64_t{grid.x} * grid.y * grid.z; }
};

/// A cp.async that has been issued and has not landed.
struct PendingCopy {
  void* to;
  const void* from;
  int bytes;
  int source_bytes;
  int group;
  const void* pc;
};

struct Thread {
  Fiber fiber;
  uint3 index;
  int id;  // in the block
  std::vector<PendingCopy> copies;
  int open_group;  // the number of groups that are closed

  int warp() const { return id / kWarpLanes; }
  int lane() const { return id % kWarpLanes; }
};

/// Lanes that wait for the others of their mask.
struct Rendezvous {
  Collective run;
  const void* pc;
  uint32_t mask;
  uint32_t arrived;
  void* lane_data[kWarpLanes];
};

struct Warp {
  uint32_t ready;  // lanes that can run
  uint32_t named;  // lanes in the masks of all collectives that somebody waits in
  /// A collective is kept under the lowest lane of its mask: masks that do not overlap have different ones.
  Rendezvous collectives[kWarpLanes];
};

/// Executes blocks, one after another, on one host thread. Every thread of the block is a fiber; one runs until it has
/// to wait for others.
class Block {
 public:
  Block() = default;
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  void run(Launch& launch, uint64_t index);

  /// The block that the calling host thread executes, which must be one.
  static Block& running();
  /// The same, or null if the host thread is not inside a kernel's own code.
  static Block* in_kernel() { return running_ != nullptr && !running_->in_collective_ ? running_ : nullptr; }

  // What the running thread asks for.
  int sync(bool predicate, const char* file, int line);
  void collective(Collective run, void* lane_data, uint32_t mask, const void* pc);
  void sync_warp_memory() { record_.order_warp(thread().warp()); }

  /// Ends the block with a finding. Neither this nor abandon() unwinds the stacks of the threads: whoever calls them
  /// must not hold what has to be freed.
  template <class F>
  [[noreturn]] void fail(const F& text) {
    report(text());
    abandon();
  }
  [[noreturn]] void abandon();

  Thread& thread() { return *current_; }
  /// Adds "block 1, thread 2: " and the text to the findings, if nothing was added under `key` before.
  void report(const std::string& key, const std::function<std::string()>& text);
  void report(const std::string& text) {
    report(text, [&] { return text; });
  }

  unsigned char* shared() { return shared_.get(); }
  size_t shared_bytes() const { return launch_->shared_bytes; }
  bool in_shared(const void* p) const { return offset_in_shared(p) < shared_capacity_; }
  size_t offset_in_shared(const void* p) const { return static_cast<const unsigned char*>(p) - shared_.get(); }
  bool in_stacks(const void* p) const {
    return static_cast<size_t>(static_cast<const char*>(p) - stacks_) < kAllStacks;
  }

  Launch& launch() { return *launch_; }
  uint32_t index() const { return index_; }
  SharedRecord& record() { return record_; }

 private:
  static constexpr size_t kStack = 256 * 1024;
  static constexpr size_t kAllStacks = kMaxThreads * kStack;

  struct Free {
    void operator()(unsigned char* p) const;
  };

  void start(Launch& launch, uint64_t index);
  void allocate_shared(size_t bytes);
  void prepare(Thread& thread);
  Thread* next_ready();
  void yield();
  void shuffle_warps();
  void report_deadlock();
  static void thread_main();
  uint64_t random();

  static thread_local Block* running_;

  Launch* launch_ = nullptr;
  uint32_t index_ = 0;
  Fiber host_;
  Thread* current_ = nullptr;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<int> order_;  // of the warps
  int live_ = 0;
  bool failed_ = false;
  bool in_collective_ = false;  // what lanes do for one another is not the kernel's own code

  int waiting_ = 0;  // in the barrier
  int holds_ = 0;    // of those that wait, how many with a predicate that holds
  int result_ = 0;   // of the last barrier
  const char* file_ = nullptr;
  int line_ = 0;

  std::unique_ptr<unsigned char, Free> shared_;
  size_t shared_capacity_ = 0;
  SharedRecord record_;
  char* stacks_ = nullptr;
  int stacks_with_guard_ = 0;
  uint64_t random_state_ = 0;
};

}  // namespace elattn::cuda::emulation
