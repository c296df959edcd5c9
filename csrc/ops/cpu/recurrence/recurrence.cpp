#include <ATen/Version.h>

#include <string>

#include "ops/cpu/recurrence/params.h"

namespace elattn::cpu {

namespace DEFAULT {
extern const Recurrence kRecurrence;
}
#ifdef __x86_64__
namespace AVX2 {
extern const Recurrence kRecurrence;
}
namespace AVX512 {
extern const Recurrence kRecurrence;
}
#endif

const Recurrence& recurrence() {
  static const Recurrence& chosen = []() -> const Recurrence& {
#ifdef __x86_64__
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") return AVX512::kRecurrence;
    if (capability == "AVX2") return AVX2::kRecurrence;
#endif
    return DEFAULT::kRecurrence;
  }();
  return chosen;
}

}  // namespace elattn::cpu
