#include "tests/cuda_emulation/block.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <numeric>
#include <sstream>

namespace elattn::cuda::emulation {
namespace {

std::string position(const std::string& file, int line) {
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(line);
}

}  // namespace

thread_local Block* Block::running_ = nullptr;

void Block::Free::operator()(unsigned char* p) const { std::free(p); }

Block::~Block() {
  if (stacks_ != nullptr) munmap(stacks_, kAllStacks);
}

Block& Block::running() {
  if (running_ == nullptr) {
    std::fputs("CUDA emulation: device code was called outside of a kernel\n", stderr);
    std::abort();
  }
  return *running_;
}

void Block::allocate_shared(size_t bytes) {
  // Exactly as large as it is, so that the address sanitizer sees where it ends. The checked build sees that by itself
  // and knows what goes too far by the space behind.
  if (kChecked) bytes = kMaxSharedBytes + kMaxSharedBytes / 4;
  if (shared_ && shared_capacity_ == bytes) return;
  constexpr size_t kAlignment = 128;
  void* p = nullptr;
  if (posix_memalign(&p, kAlignment, std::max<size_t>(bytes, 1)) != 0) throw std::bad_alloc();
  shared_.reset(static_cast<unsigned char*>(p));
  shared_capacity_ = bytes;
}

void Block::prepare(Thread& thread) {
  if (stacks_ == nullptr) {
    void* p = mmap(nullptr, kAllStacks, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    stacks_ = static_cast<char*>(p);
  }
  char* low = stacks_ + static_cast<size_t>(thread.id) * kStack;
  // A page that ends the program when the stack grows into it.
  static const auto page = static_cast<size_t>(getpagesize());
  if (thread.id >= stacks_with_guard_) {
    mprotect(low, page, PROT_NONE);
    stacks_with_guard_ = thread.id + 1;
  }
  thread.fiber.prepare(low + page, kStack - page, thread_main);
}

uint64_t Block::random() {
  random_state_ ^= random_state_ << 13;
  random_state_ ^= random_state_ >> 7;
  random_state_ ^= random_state_ << 17;
  return random_state_;
}

void Block::start(Launch& launch, uint64_t index) {
  launch_ = &launch;
  index_ = static_cast<uint32_t>(index);
  const dim3 &grid = launch.grid, &block = launch.block;
  const int count = launch.threads();
  gridDim = grid;
  blockDim = block;
  blockIdx = uint3{index_ % grid.x, index_ / grid.x % grid.y, index_ / grid.x / grid.y};
  random_state_ = (launch.options.seed + 1) * 0x9e3779b97f4a7c15u + index * 0xbf58476d1ce4e5b9u + 1;
  live_ = count;
  failed_ = in_collective_ = false;
  waiting_ = holds_ = 0;

  allocate_shared(launch.shared_bytes);
  std::memset(shared_.get(), 0xff, launch.shared_bytes);  // NaN in every format
  if constexpr (kChecked) record_.start(launch.shared_bytes);

  threads_.resize(std::max(threads_.size(), static_cast<size_t>(count)));
  for (int i = 0; i < count; ++i) {
    Thread& t = threads_[static_cast<size_t>(i)];
    const auto id = static_cast<unsigned>(i);
    t.id = i;
    t.index = uint3{id % block.x, id / block.x % block.y, id / block.x / block.y};
    t.copies.clear();
    t.open_group = 0;
    prepare(t);
  }
  warps_.resize(static_cast<size_t>(count / kWarpLanes));
  for (Warp& w : warps_) {
    w.ready = ~0u;
    w.named = 0;
    for (Rendezvous& r : w.collectives) r.arrived = 0;
  }
  order_.resize(warps_.size());
  std::iota(order_.begin(), order_.end(), 0);
  if (launch.options.order == Order::kReverse) std::reverse(order_.begin(), order_.end());
  shuffle_warps();
}

void Block::run(Launch& launch, uint64_t index) {
  start(launch, index);
  running_ = this;
  host_.adopt_host_thread();
  current_ = next_ready();
  threadIdx = current_->index;
  host_.switch_to(current_->fiber);
  // Nobody is left that can run.
  if (live_ > 0 && !failed_) report_deadlock();
  running_ = nullptr;
}

void Block::thread_main() {
  Fiber::entered();
  Block& block = *running_;
  block.launch_->kernel(block.launch_->arguments);
  if (!block.thread().copies.empty()) {
    const PendingCopy& copy = block.thread().copies.front();
    block.report("unwaited", [&] { return "returns without waiting for its cp.async: " + source_of(copy.pc); });
  }
  --block.live_;
  block.yield();
}

void Block::shuffle_warps() {
  if (launch_->options.order != Order::kRandom) return;
  for (size_t i = order_.size(); i > 1; --i) std::swap(order_[i - 1], order_[random() % i]);
}

Thread* Block::next_ready() {
  for (const int w : order_) {
    uint32_t& ready = warps_[static_cast<size_t>(w)].ready;
    if (ready == 0) continue;
    int lane = std::countr_zero(ready);
    if (launch_->options.order == Order::kReverse) {
      lane = kWarpLanes - 1 - std::countl_zero(ready);
    } else if (launch_->options.order == Order::kRandom) {
      // The first from a random lane on, which is cheaper than a fair draw.
      const int from = static_cast<int>(random() >> 59);
      lane = (std::countr_zero(std::rotr(ready, from)) + from) % kWarpLanes;
    }
    ready &= ~(1u << lane);
    return &threads_[static_cast<size_t>(w * kWarpLanes + lane)];
  }
  return nullptr;
}

void Block::yield() {
  Thread& from = *current_;
  Thread* to = next_ready();
  if (to == &from) return;
  if (to != nullptr) {
    current_ = to;
    threadIdx = to->index;
  }
  from.fiber.switch_to(to != nullptr ? to->fiber : host_);
}

void Block::report(const std::string& key, const std::function<std::string()>& text) {
  launch_->findings.add(key, [&] {
    return "block " + std::to_string(index_) + ", thread " + std::to_string(current_->id) + ": " + text();
  });
}

void Block::abandon() {
  failed_ = true;
  current_->fiber.switch_to(host_, true);
  std::abort();
}

int Block::sync(bool predicate, const char* file, int line) {
  if (waiting_ == 0) {
    file_ = file;
    line_ = line;
  } else if (line != line_ || std::strcmp(file, file_) != 0) {
    fail([&] {
      return "comes to __syncthreads in " + position(file, line) + " while others wait in that of " +
             position(file_, line_);
    });
  }
  holds_ += predicate;
  if (++waiting_ == launch_->threads()) {
    result_ = holds_;
    waiting_ = holds_ = 0;
    for (Warp& w : warps_) w.ready = ~0u;
    shuffle_warps();
    if constexpr (kChecked) record_.order_block();
  }
  yield();
  return result_;
}

void Block::collective(Collective run, void* lane_data, uint32_t mask, const void* pc) {
  const int lane = current_->lane();
  Warp& warp = warps_[static_cast<size_t>(current_->warp())];
  if ((mask >> lane & 1) == 0)
    fail([&] { return "calls a warp collective with a mask that lacks its lane: " + source_of(pc); });
  Rendezvous& r = warp.collectives[std::countr_zero(mask) % kWarpLanes];
  const bool first = r.arrived == 0;
  if (first ? (warp.named & mask) != 0 : r.run != run || r.mask != mask) {
    fail([&] {
      std::string text = "lanes of one warp meet in different collectives or masks: " + source_of(pc);
      for (const Rendezvous& other : warp.collectives) {
        if (other.arrived != 0 && (other.mask & mask) != 0) text += "; others wait in that of " + source_of(other.pc);
      }
      return text;
    });
  }
  if (first) {
    r.run = run;
    r.mask = mask;
    r.pc = pc;
    warp.named |= mask;
  }
  r.lane_data[lane] = lane_data;
  r.arrived |= 1u << lane;
  if (r.arrived != mask) return yield();
  in_collective_ = true;
  run(r.lane_data, mask);
  in_collective_ = false;
  r.arrived = 0;
  warp.named &= ~mask;
  warp.ready |= mask & ~(1u << lane);
}

void Block::report_deadlock() {
  std::ostringstream text;
  text << "threads wait for others that never come";
  if (waiting_ > 0) text << "; " << waiting_ << " wait in __syncthreads, " << position(file_, line_);
  for (size_t w = 0; w < warps_.size(); ++w) {
    for (const Rendezvous& r : warps_[w].collectives) {
      if (r.arrived == 0) continue;
      text << "; " << std::popcount(r.arrived) << " lanes of warp " << w << " wait for "
           << std::popcount(r.mask & ~r.arrived) << " others in a collective, " << source_of(r.pc);
    }
  }
  if (live_ < launch_->threads()) text << "; " << launch_->threads() - live_ << " threads have returned";
  launch_->findings.add("deadlock", [&] { return "block " + std::to_string(index_) + ": " + text.str(); });
}

// What kernels call.

unsigned char* shared_memory() { return Block::running().shared(); }
size_t shared_memory_size() { return Block::running().shared_bytes(); }

int sync_block(bool predicate, const char* file, int line) { return Block::running().sync(predicate, file, line); }

void collective(Collective run, void* lane_data, uint32_t mask) {
  Block::running().collective(run, lane_data, mask, __builtin_return_address(0));
}

void sync_warp(uint32_t mask) {
  const auto order = [](void* const*, uint32_t all) {
    // Lanes of a part of the warp are not recorded as ordered.
    if (kChecked && all == ~0u) Block::running().sync_warp_memory();
  };
  Block::running().collective(order, nullptr, mask, __builtin_return_address(0));
}

void fail(const char* what) {
  const void* pc = __builtin_return_address(0);
  Block::running().fail([&] { return what + (": " + source_of(pc)); });
}

}  // namespace elattn::cuda::emulation
