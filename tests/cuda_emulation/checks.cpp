#include "tests/cuda_emulation/checks.h"

#include <link.h>

#include "tests/cuda_emulation/block.h"

namespace elattn::cuda::emulation {
namespace {

bool within(const void* p, const void* begin, size_t bytes) {
  return static_cast<size_t>(static_cast<const char*>(p) - static_cast<const char*>(begin)) < bytes;
}

/// Constants of the kernels: segments that nobody can write to, and those that only the loader could.
bool in_constants(const void* p) {
  struct Search {
    uintptr_t address;
    bool found;
  } search{reinterpret_cast<uintptr_t>(p), false};
  dl_iterate_phdr(
      [](dl_phdr_info* object, size_t, void* data) {
        auto* s = static_cast<Search*>(data);
        for (int i = 0; i < object->dlpi_phnum; ++i) {
          const auto& segment = object->dlpi_phdr[i];
          const bool constant =
              (segment.p_type == PT_LOAD && (segment.p_flags & PF_W) == 0) || segment.p_type == PT_GNU_RELRO;
          if (constant && s->address - (object->dlpi_addr + segment.p_vaddr) < segment.p_memsz) s->found = true;
        }
        return static_cast<int>(s->found);
      },
      &search);
  return search.found;
}

/// What a kernel reads besides buffers: its arguments and the built-in variables.
bool is_builtin(const Block& block, const Launch& launch, const void* p) {
  return block.in_stacks(p) || within(p, launch.arguments, launch.argument_bytes) ||
         within(p, &threadIdx, sizeof(threadIdx)) || within(p, &blockIdx, sizeof(blockIdx)) ||
         within(p, &blockDim, sizeof(blockDim)) || within(p, &gridDim, sizeof(gridDim));
}

}  // namespace

void report_shared(const SharedProblem& problem, const void* pc) {
  if (problem.what == nullptr) return;
  Block& block = Block::running();
  std::string key = problem.what;
  key.append(reinterpret_cast<const char*>(&pc), sizeof(pc));
  block.report(key, [&] {
    std::string text = problem.what + (", shared byte " + std::to_string(problem.offset));
    if (problem.other >= 0) text += ", the other by thread " + std::to_string(problem.other);
    return text + ": " + source_of(pc);
  });
}

void check_global(const void* address, size_t bytes, Touch touch, const void* pc) {
  Block& block = Block::running();
  const ExposedBuffers& buffers = block.launch().buffers;
  if (!kChecked || buffers.empty()) return;
  {
    const auto problem = buffers.access(address, bytes, touch != Touch::kRead, touch == Touch::kAtomic, block.index());
    if (!problem || (touch == Touch::kRead && in_constants(address))) return;
    block.report(*problem + ": " + source_of(pc));
  }
  block.abandon();
}

void check_access(const void* address, size_t bytes, size_t alignment, Touch touch, const void* pc) {
  Block& block = Block::running();
  if (block.in_stacks(address)) return;
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0) {
    block.fail([&] { return "access of " + std::to_string(bytes) + " bytes that is not aligned: " + source_of(pc); });
  }
  if (!block.in_shared(address)) {
    if (touch != Touch::kRead || !is_builtin(block, block.launch(), address)) check_global(address, bytes, touch, pc);
    return;
  }
  if constexpr (kChecked) {
    const size_t offset = block.offset_in_shared(address);
    if (offset + bytes > block.shared_bytes())
      block.fail([&] { return "access past the end of shared memory: " + source_of(pc); });
    SharedRecord& record = block.record();
    const int thread = block.thread().id;
    report_shared(touch == Touch::kRead    ? record.read(offset, bytes, thread)
                  : touch == Touch::kWrite ? record.write(offset, bytes, thread)
                                           : record.atomic(offset, bytes),
                  pc);
  }
}

}  // namespace elattn::cuda::emulation
