#include "tests/cuda_emulation/findings.h"

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>

namespace elattn::cuda::emulation {

void Findings::add(const std::string& key, const std::function<std::string()>& text) {
  std::lock_guard lock(mutex_);
  if (texts_.size() < kMost && keys_.insert(key).second) texts_.push_back(text());
}

bool Findings::full() {
  std::lock_guard lock(mutex_);
  return texts_.size() >= kMost;
}

std::string source_of(const void* return_address) {
  Dl_info object;
  if (dladdr(return_address, &object) == 0) return "unknown code";
  // The call ends before the address that it returns to.
  const uintptr_t offset =
      reinterpret_cast<uintptr_t>(return_address) - reinterpret_cast<uintptr_t>(object.dli_fbase) - 1;
  char command[4096];
  std::snprintf(command, sizeof(command), "addr2line -i -e '%s' %#zx 2>/dev/null", object.dli_fname,
                static_cast<size_t>(offset));
  std::string chain;
  if (FILE* lines = popen(command, "r")) {
    char buffer[4096];
    while (std::fgets(buffer, sizeof(buffer), lines) != nullptr) {
      std::string line = buffer;
      line.resize(line.find_first_of(" \n"));
      if (line.front() == '?') continue;
      chain += (chain.empty() ? "" : " < ") + line.substr(line.rfind('/') + 1);
    }
    pclose(lines);
  }
  if (!chain.empty()) return chain;
  std::snprintf(command, sizeof(command), "%s+%#zx", object.dli_fname, static_cast<size_t>(offset));
  return command;
}

}  // namespace elattn::cuda::emulation
