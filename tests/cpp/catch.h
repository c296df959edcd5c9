#pragma once

// PyTorch comes first and its CHECK, a macro of its logging, goes: CHECK is Catch2's here.
#include <torch/autograd.h>
#include <torch/types.h>
#undef CHECK

#include "tests/catch2/catch.h"

#if CATCH_VERSION_MAJOR < 3
namespace Catch::Matchers {
inline auto ContainsSubstring(const std::string& text) { return Contains(text); }
}  // namespace Catch::Matchers
#endif

using Catch::Matchers::ContainsSubstring;
