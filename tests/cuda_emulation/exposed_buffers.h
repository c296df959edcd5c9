#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace elattn::cuda::emulation {

/// The buffers in global memory that one host thread has exposed, and which block of which launch last read and wrote
/// each two bytes of those that can be written.
class ExposedBuffers {
 public:
  /// Those of the calling thread now, for a launch.
  static ExposedBuffers of_this_thread();

  static const void* add(const void* data, size_t bytes, bool writable, std::string name);
  static void remove(const void* buffer);

  bool empty() const { return buffers_.empty(); }

  /// What is wrong with an access by a block.
  std::optional<std::string> access(const void* address, size_t bytes, bool write, bool atomic, uint32_t block) const;

 private:
  struct Owner {
    std::atomic<uint64_t> writer;
    std::atomic<uint64_t> reader;
  };
  struct Free {
    void operator()(Owner* p) const;
  };
  struct Buffer {
    uintptr_t begin;
    uintptr_t end;
    bool writable;
    std::string name;
    std::unique_ptr<Owner[], Free> owners;
  };

  static thread_local std::vector<std::shared_ptr<Buffer>> of_thread_;

  std::optional<std::string> share(Buffer& buffer, uintptr_t address, size_t bytes, bool write, uint32_t block) const;
  std::string outside(uintptr_t address, bool write) const;

  std::vector<std::shared_ptr<Buffer>> buffers_;
  uint64_t launch_ = 0;
};

}  // namespace elattn::cuda::emulation
