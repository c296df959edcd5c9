#include "tests/cuda_emulation/exposed_buffers.h"

#include <cstdlib>
#include <new>

#include "tests/cuda_emulation/emulation.h"

namespace elattn::cuda::emulation {
namespace {

constexpr size_t kGrain = 2;
constexpr uint64_t kManyBlocks = 0xffffffff;

}  // namespace

thread_local std::vector<std::shared_ptr<ExposedBuffers::Buffer>> ExposedBuffers::of_thread_;

void ExposedBuffers::Free::operator()(Owner* p) const { std::free(p); }

ExposedBuffers ExposedBuffers::of_this_thread() {
  static std::atomic<uint32_t> launches{0};
  ExposedBuffers result;
  result.buffers_ = of_thread_;
  result.launch_ = uint64_t{++launches} << 32;
  return result;
}

const void* ExposedBuffers::add(const void* data, size_t bytes, bool writable, std::string name) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  auto buffer = std::make_shared<Buffer>(Buffer{begin, begin + bytes, writable, std::move(name), nullptr});
  if (writable) {
    // Zeros that cost nothing until they are touched.
    void* owners = std::calloc(bytes / kGrain + 1, sizeof(Owner));
    if (owners == nullptr) throw std::bad_alloc();
    buffer->owners.reset(static_cast<Owner*>(owners));
  }
  of_thread_.push_back(buffer);
  return buffer.get();
}

void ExposedBuffers::remove(const void* buffer) {
  std::erase_if(of_thread_, [&](const auto& b) { return b.get() == buffer; });
}

std::optional<std::string> ExposedBuffers::access(const void* address, size_t bytes, bool write, bool atomic,
                                                  uint32_t block) const {
  const auto a = reinterpret_cast<uintptr_t>(address);
  const Buffer* read_only = nullptr;
  for (const auto& buffer : buffers_) {
    if (a < buffer->begin || a + bytes > buffer->end) continue;
    if (buffer->writable) return atomic ? std::nullopt : share(*buffer, a, bytes, write, block);
    read_only = buffer.get();
  }
  if (read_only == nullptr) return outside(a, write);
  if (write) return "write to " + read_only->name + ", which is read-only";
  return std::nullopt;
}

std::optional<std::string> ExposedBuffers::share(Buffer& buffer, uintptr_t address, size_t bytes, bool write,
                                                 uint32_t block) const {
  const uint64_t me = launch_ | (uint64_t{block} + 1), many = launch_ | kManyBlocks;
  const auto other = [&](uint64_t owner) { return owner > launch_ && owner != me; };
  for (size_t i = (address - buffer.begin) / kGrain; i <= (address + bytes - 1 - buffer.begin) / kGrain; ++i) {
    Owner& owner = buffer.owners[i];
    const uint64_t writer = write ? owner.writer.exchange(me) : owner.writer.load();
    const uint64_t reader = owner.reader.load();
    if (!write && reader != me && reader != many) owner.reader.store(other(reader) ? many : me);
    const bool read_by_other = write && other(reader);
    if (!other(writer) && !read_by_other) continue;
    const uint64_t who = other(writer) ? writer : reader;
    return (write ? "write to " : "read of ") + buffer.name + ", byte " + std::to_string(kGrain * i) + ", that " +
           (who == many ? "other blocks" : "block " + std::to_string((who & kManyBlocks) - 1)) +
           (other(writer) ? " wrote" : " read") + " in the same launch";
  }
  return std::nullopt;
}

std::string ExposedBuffers::outside(uintptr_t address, bool write) const {
  std::string text = write ? "write outside of every exposed buffer" : "read outside of every exposed buffer";
  size_t nearest = 1 << 20;
  std::string near;
  for (const auto& buffer : buffers_) {
    const bool before = address < buffer->begin;
    const size_t distance = before ? buffer->begin - address : address - buffer->end;
    if (distance >= nearest) continue;
    nearest = distance;
    near = ", " + std::to_string(distance) + " bytes " + (before ? "before " : "past the end of ") + buffer->name;
  }
  return text + near;
}

Expose::Expose(const void* data, size_t bytes, bool writable, std::string name)
    : buffer_(ExposedBuffers::add(data, bytes, writable, std::move(name))) {}
Expose::~Expose() { ExposedBuffers::remove(buffer_); }

}  // namespace elattn::cuda::emulation
