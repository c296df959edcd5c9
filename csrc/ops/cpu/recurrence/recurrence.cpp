#include <ATen/Version.h>

#include <string>

#include "ops/cpu/recurrence/params.h"

namespace elattn::cpu {

namespace DEFAULT {
extern const Recurrence kRecurrence;
}
#ifdef ELATTN_HAS_AVX2
namespace AVX2 {
extern const Recurrence kRecurrence;
}
#endif
#ifdef ELATTN_HAS_AVX512
namespace AVX512 {
extern const Recurrence kRecurrence;
}
#endif

const Recurrence& recurrence() {
  static const Recurrence& chosen = []() -> const Recurrence& {
    [[maybe_unused]] const std::string capability = at::get_cpu_capability();
#ifdef ELATTN_HAS_AVX512
    if (capability == "AVX512") return AVX512::kRecurrence;
#endif
#ifdef ELATTN_HAS_AVX2
    if (capability == "AVX2") return AVX2::kRecurrence;
#endif
    return DEFAULT::kRecurrence;
  }();
  return chosen;
}

}  // namespace elattn::cpu
