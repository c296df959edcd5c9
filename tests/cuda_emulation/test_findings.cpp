// What the emulation reports, and that it runs on afterwards.

#include <string>
#include <thread>
#include <vector>

#include "tests/catch2/catch.h"
#include "tests/cuda_emulation/device_array.h"
#include "tests/cuda_emulation/emulation.h"
#include "tests/cuda_emulation/faults.h"
#include "tests/cuda_emulation/primitives.h"

namespace elattn::cuda {
namespace {

using emulation::Order;
using faults::Fault;

struct Expected {
  Fault fault;
  std::string text;
};

class OptionsScope {
 public:
  OptionsScope() : before_(emulation::options()) {}
  ~OptionsScope() { emulation::options() = before_; }

 private:
  emulation::Options before_;
};

std::string all_findings() {
  std::string result;
  for (const std::string& text : emulation::findings()) result += text + "\n";
  return result;
}

/// In every order of the warps.
void check_findings(const std::vector<Expected>& table) {
  const OptionsScope scope;
  for (const Order order : {Order::kForward, Order::kReverse, Order::kRandom}) {
    emulation::options().order = order;
    for (const Expected& expected : table) {
      DeviceArray<float> out(std::vector<float>(4 * 64), "out");
      DeviceArray<float> in(std::vector<float>(64, 1.0f), "in", false);
      const cudaError_t error = faults::run(expected.fault, out.data(), in.data());
      const std::string findings = all_findings();
      CAPTURE(static_cast<int>(order), expected.text, findings);
      CHECK(error == cudaErrorLaunchFailure);
      CHECK(findings.find(expected.text) != std::string::npos);
    }
    DeviceArray<float> out(std::vector<float>(4 * 64), "out");
    DeviceArray<float> in(std::vector<float>(64, 1.0f), "in", false);
    const cudaError_t error = faults::run(Fault::kNone, out.data(), in.data());
    CAPTURE(all_findings());
    CHECK(error == cudaSuccess);
    CHECK(out.values() == std::vector<float>(4 * 64, 1.0f));
  }
}

TEST_CASE("Broken rules of warps, barriers, copies and tiles are reported") {
  check_findings({
      {Fault::kDifferentCollectives, "different collectives or masks"},
      {Fault::kMissingLane, "31 lanes of warp 0 wait for 1 others in a collective"},
      {Fault::kMaskWithoutCaller, "a mask that lacks its lane"},
      {Fault::kSourceOutsideMask, "a shuffle reads a lane that its mask lacks"},
      {Fault::kReturnBeforeBarrier, "32 wait in __syncthreads"},
      {Fault::kDifferentBarriers, "while others wait in that of"},
      {Fault::kCopyNotAwaited, "returns without waiting for its cp.async"},
      {Fault::kCopyMisaligned, "cp.async of 16 bytes that is not aligned"},
      {Fault::kMatrixMisaligned, "not aligned to 16 bytes"},
      {Fault::kOutsideTile, "does not hold: r >= 0 && r < rows && c >= 0 && c < cols"},
      {Fault::kArenaTooSmall, "does not hold: !base_ || bytes_ <= emulation::shared_memory_size()"},
  });
}

TEST_CASE("Broken rules of memory are reported in the checked build") {
  if (!emulation::checked()) return;
  check_findings({
      {Fault::kReadAfterWrite, "read after write without a barrier between"},
      {Fault::kWriteAfterRead, "write after read without a barrier between"},
      {Fault::kWriteAfterWrite, "write after write without a barrier between"},
      {Fault::kNoSyncwarp, "read after write without a barrier between"},
      {Fault::kNeverWritten, "read of shared memory that was never written"},
      {Fault::kReadUnderCopy, "read while a cp.async is under way"},
      {Fault::kCopyOverRead, "write after read without a barrier between"},
      {Fault::kPastShared, "past the end of shared memory"},
      {Fault::kOutsideBuffers, "read outside of every exposed buffer, 0 bytes past the end of in"},
      {Fault::kWriteToReadOnly, "write to in, which is read-only"},
      {Fault::kBlocksWriteOneWord, "wrote in the same launch"},
      {Fault::kBlockReadsOfAnother, "in the same launch"},
      {Fault::kMisaligned, "access of 8 bytes that is not aligned"},
      {Fault::kVectorMisaligned, "access of 16 bytes that is not aligned"},
  });
}

TEST_CASE("A finding names its source line") {
  DeviceArray<float> out(std::vector<float>(4 * 64), "out");
  DeviceArray<float> in(std::vector<float>(64, 1.0f), "in", false);
  REQUIRE(faults::run(Fault::kOutsideTile, out.data(), in.data()) == cudaErrorLaunchFailure);
  CHECK(all_findings().find(std::system("command -v addr2line > /dev/null") == 0 ? "faults.cu:" : "+0x") !=
        std::string::npos);
}

TEST_CASE("Without exposed buffers global memory is not checked") {
  std::vector<float> out(4 * 64), in(65, 1.0f);
  CHECK(faults::run(Fault::kOutsideBuffers, out.data(), in.data()) == cudaSuccess);
}

TEST_CASE("What a GPU cannot launch is refused") {
  DeviceArray words(std::vector<unsigned>(8));
  CHECK(primitives::atomics(words.data(), 1, 1056) == cudaErrorInvalidConfiguration);
  for (const int64_t blocks : {int64_t{0}, int64_t{1} << 31, (int64_t{1} << 32) + 1}) {
    CHECK(primitives::atomics(words.data(), blocks, 32) == cudaErrorInvalidConfiguration);
  }
  CHECK(primitives::copy_rows(nullptr, nullptr, 20000, 16, 16) == cudaErrorInvalidValue);
  CHECK(primitives::atomics(words.data(), 1, 48) == cudaErrorLaunchFailure);
  CHECK(all_findings() == "a block of 48 threads is not a number of whole warps\n");
}

TEST_CASE("Several host threads launch at once, and see their own findings") {
  std::vector<std::thread> threads;
  std::vector<int> wrong(4);
  for (size_t t = 0; t < wrong.size(); ++t) {
    threads.emplace_back([t, &wrong] {
      DeviceArray<float> out(std::vector<float>(4 * 64), "out");
      DeviceArray<float> in(std::vector<float>(64, 1.0f), "in", false);
      for (int i = 0; i < 20; ++i) {
        const bool fails = t % 2 == 0;
        const cudaError_t error = faults::run(fails ? Fault::kMissingLane : Fault::kNone, out.data(), in.data());
        wrong[t] += (error != cudaSuccess) != fails || emulation::findings().empty() == fails;
      }
    });
  }
  for (std::thread& t : threads) t.join();
  CHECK(wrong == std::vector<int>(4));
}

}  // namespace
}  // namespace elattn::cuda
