#pragma once

// PyTorch comes first and its CHECK, a macro of its logging, goes: CHECK is Catch2's here.
#include <torch/autograd.h>
#include <torch/types.h>
#undef CHECK

// Catch2 3, or the single header of Catch2 2.13.
#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>
#else
#include <catch2/catch.hpp>
namespace Catch::Matchers {
inline auto ContainsSubstring(const std::string& text) { return Contains(text); }
}  // namespace Catch::Matchers
#endif

using Catch::Matchers::ContainsSubstring;
