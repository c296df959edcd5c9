#pragma once

#include <string>

#define ELATTN_API __attribute__((visibility("default")))

namespace elattn {

/// The version of the library, for example "0.1.0".
ELATTN_API std::string version();

namespace detail {
// Operators are found by their registration, so a program may call no function of the library; this reference keeps the
// linker from dropping it.
[[gnu::used]] inline std::string (*const keep_linked)() = &version;
}  // namespace detail

}  // namespace elattn
