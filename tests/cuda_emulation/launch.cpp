#include "tests/cuda_emulation/launch.h"

#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <thread>

#include "tests/cuda_emulation/block.h"

namespace elattn::cuda::emulation {
namespace {

thread_local std::vector<std::string> findings_of_thread;

Options from_environment() {
  Options result;
  result.workers = std::clamp(static_cast<int>(std::thread::hardware_concurrency()), 1, 8);
  if (const char* order = std::getenv("ELATTN_EMULATION_ORDER")) {
    const std::string name = order;
    if (name == "forward") {
      result.order = Order::kForward;
    } else if (name == "reverse") {
      result.order = Order::kReverse;
    } else if (name != "random") {
      throw std::invalid_argument("ELATTN_EMULATION_ORDER must be random, forward or reverse (got " + name + ")");
    }
  }
  if (const char* seed = std::getenv("ELATTN_EMULATION_SEED")) result.seed = std::stoull(seed);
  if (const char* workers = std::getenv("ELATTN_EMULATION_WORKERS")) result.workers = std::max(1, std::stoi(workers));
  return result;
}

/// Hands out the blocks of a launch, in the order of the options.
class Blocks {
 public:
  explicit Blocks(Launch& launch) : launch_(launch), count_(launch.blocks()) {
    // Random: every stride-th block, from somewhere on. A stride without a common factor meets all of them.
    if (launch.options.order != Order::kRandom) return;
    const uint64_t mixed = (launch.options.seed + 1) * 0x9e3779b97f4a7c15u;
    first_ = mixed % count_;
    stride_ = (mixed >> 32) % count_;
    while (std::gcd(stride_, count_) != 1) ++stride_;
  }

  /// Executes blocks until none is left; for several host threads at once.
  void run() {
    static thread_local Block block;
    for (uint64_t i; (i = next_.fetch_add(1)) < count_ && !launch_.findings.full();) {
      const uint64_t index =
          launch_.options.order == Order::kReverse ? count_ - 1 - i : (first_ + i * stride_) % count_;
      block.run(launch_, index);
    }
  }

 private:
  Launch& launch_;
  const uint64_t count_;
  uint64_t first_ = 0;
  uint64_t stride_ = 1;
  std::atomic<uint64_t> next_{0};
};

/// Host threads that help with the blocks of a launch, one launch at a time. They live as long as the program.
class Workers {
 public:
  static Workers& get() {
    static Workers& workers = *new Workers;
    return workers;
  }

  void run(Blocks& blocks, int helpers) {
    std::lock_guard one_launch(launches_);
    if (helpers > 0) {
      std::lock_guard lock(mutex_);
      for (; threads_ < helpers; ++threads_) std::thread(&Workers::serve, this).detach();
      blocks_ = &blocks;
      seats_ = helpers;
      wake_.notify_all();
    }
    blocks.run();
    std::unique_lock lock(mutex_);
    // Helpers that have not woken up by now are not waited for.
    blocks_ = nullptr;
    seats_ = 0;
    idle_.wait(lock, [&] { return busy_ == 0; });
  }

 private:
  void serve() {
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return seats_ > 0; });
      Blocks& blocks = *blocks_;
      --seats_;
      ++busy_;
      lock.unlock();
      blocks.run();
      lock.lock();
      if (--busy_ == 0) idle_.notify_one();
    }
  }

  std::mutex launches_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable idle_;
  Blocks* blocks_ = nullptr;
  int threads_ = 0;
  int seats_ = 0;  // helpers that may still join
  int busy_ = 0;
};

bool valid_extent(const dim3& grid, const dim3& block) {
  constexpr unsigned kMaxX = 0x7fffffff, kMaxYZ = 65535, kMaxBlockZ = 64;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  return grid.x >= 1 && grid.x <= kMaxX && grid.y >= 1 && grid.y <= kMaxYZ && grid.z >= 1 && grid.z <= kMaxYZ &&
         threads >= 1 && block.x <= kMaxThreads && block.y <= kMaxThreads && block.z <= kMaxBlockZ &&
         threads <= kMaxThreads && uint64_t{grid.x} * grid.y * grid.z <= 0xfffffffe;
}

}  // namespace

Options& options() {
  static Options options = from_environment();
  return options;
}

bool checked() { return kChecked; }

const std::vector<std::string>& findings() { return findings_of_thread; }

cudaError_t launch(dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)(const void*), const void* arguments,
                   size_t argument_bytes) {
  findings_of_thread.clear();
  if (!valid_extent(grid, block)) return cudaErrorInvalidConfiguration;
  if (shared_bytes > kMaxSharedBytes) return cudaErrorInvalidValue;
  Launch launch;
  launch.grid = grid;
  launch.block = block;
  launch.shared_bytes = shared_bytes;
  launch.kernel = kernel;
  launch.arguments = arguments;
  launch.argument_bytes = argument_bytes;
  launch.buffers = ExposedBuffers::of_this_thread();
  launch.options = options();
  if (launch.threads() % kWarpLanes != 0) {
    findings_of_thread = {"a block of " + std::to_string(launch.threads()) + " threads is not a number of whole warps"};
    return cudaErrorLaunchFailure;
  }
  Blocks blocks(launch);
  const uint64_t workers = std::min<uint64_t>(static_cast<uint64_t>(launch.options.workers), launch.blocks());
  Workers::get().run(blocks, static_cast<int>(workers) - 1);
  findings_of_thread = launch.findings.take();
  return findings_of_thread.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace elattn::cuda::emulation
