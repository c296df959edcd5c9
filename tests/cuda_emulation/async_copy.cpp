#include "tests/cuda_emulation/async_copy.h"

#include <cstring>

#include "tests/cuda_emulation/block.h"
#include "tests/cuda_emulation/checks.h"

namespace elattn::cuda::emulation {
namespace {

void land(Block& block, const PendingCopy& copy) {
  auto* to = static_cast<char*>(copy.to);
  std::memcpy(to, copy.from, static_cast<size_t>(copy.source_bytes));
  std::memset(to + copy.source_bytes, 0, static_cast<size_t>(copy.bytes - copy.source_bytes));
  if constexpr (kChecked) {
    const size_t offset = block.offset_in_shared(to);
    report_shared(block.record().end_copy(offset, static_cast<size_t>(copy.bytes), block.thread().id), copy.pc);
  }
}

}  // namespace

void cp_async(void* to, const void* from, int bytes, int source_bytes) {
  const void* pc = __builtin_return_address(0);
  Block& block = Block::running();
  const auto size = static_cast<size_t>(bytes);
  if (!block.in_shared(to) || block.offset_in_shared(to) + size > block.shared_bytes()) {
    block.fail([&] { return "cp.async to an address outside of shared memory: " + source_of(pc); });
  }
  if (reinterpret_cast<uintptr_t>(to) % size != 0 || reinterpret_cast<uintptr_t>(from) % size != 0) {
    block.fail([&] { return "cp.async of " + std::to_string(bytes) + " bytes that is not aligned: " + source_of(pc); });
  }
  if (source_bytes < 0 || source_bytes > bytes) {
    block.fail([&] {
      return "cp.async of " + std::to_string(source_bytes) + " out of " + std::to_string(bytes) +
             " bytes: " + source_of(pc);
    });
  }
  if (source_bytes > 0) check_global(from, static_cast<size_t>(source_bytes), Touch::kRead, pc);
  Thread& thread = block.thread();
  if constexpr (kChecked) report_shared(block.record().begin_copy(block.offset_in_shared(to), size, thread.id), pc);
  thread.copies.push_back({to, from, bytes, source_bytes, thread.open_group, pc});
}

void cp_async_commit() { ++Block::running().thread().open_group; }

void cp_async_wait(int groups) {
  Block& block = Block::running();
  Thread& thread = block.thread();
  auto first = thread.copies.begin();
  for (; first != thread.copies.end() && first->group < thread.open_group - groups; ++first) land(block, *first);
  thread.copies.erase(thread.copies.begin(), first);
}

}  // namespace elattn::cuda::emulation
