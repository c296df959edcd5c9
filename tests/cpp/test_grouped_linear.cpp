#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include "inputs.h"

namespace elattn::tests {
namespace {

at::Tensor ends(std::vector<int> values) { return at::tensor(values, at::kInt); }

at::Tensor random(at::IntArrayRef sizes) { return at::randn(sizes, at::kDouble).requires_grad_(); }

/// One linear layer after the other.
at::Tensor loop(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& offsets) {
  std::vector<at::Tensor> parts;
  int64_t begin = 0;
  for (int64_t e = 0; e < weight.size(0); ++e) {
    const int64_t end = offsets[e].item<int64_t>();
    parts.push_back(at::linear(x.slice(0, begin, end), weight[e]));
    begin = end;
  }
  return at::cat(parts);
}

}  // namespace

TEST_CASE("grouped_linear is a loop of linear layers, with its gradients", "[grouped_linear]") {
  at::manual_seed(0);
  for (const auto& offsets : {ends({0}), ends({1}), ends({0, 63, 63, 192}), ends({65, 66, 66})}) {
    const int64_t groups = offsets.size(0), rows = offsets[-1].item<int64_t>();
    CAPTURE(groups, rows);
    const at::Tensor x = random({rows, 20}), weight = random({groups, 11, 20}), g = at::randn({rows, 11}, at::kDouble);
    const at::Tensor y = grouped_linear(x, weight, offsets), expected = loop(x, weight, offsets);
    CHECK(at::allclose(y, expected, 1e-12, 1e-12));
    const auto found = torch::autograd::grad({y}, {x, weight}, {g});
    const auto wanted = torch::autograd::grad({expected}, {x, weight}, {g});
    for (size_t i = 0; i < found.size(); ++i) CHECK(at::allclose(found[i], wanted[i], 1e-12, 1e-12));
  }
}

TEST_CASE("grouped_linear has a second derivative", "[grouped_linear]") {
  at::manual_seed(0);
  const at::Tensor x = random({5, 3}), weight = random({2, 4, 3}), offsets = ends({2, 5});
  std::vector<std::vector<at::Tensor>> results;
  for (const auto& fn : {grouped_linear, loop}) {
    const at::Tensor loss = fn(x, weight, offsets).pow(3).sum();
    const auto first = torch::autograd::grad({loss}, {x, weight}, {}, true, true);
    results.push_back(torch::autograd::grad({first[0].pow(2).sum() + first[1].pow(2).sum()}, {x, weight}));
  }
  for (size_t i = 0; i < 2; ++i) CHECK(at::allclose(results[0][i], results[1][i], 1e-10, 1e-10));
}

TEST_CASE("grouped_linear and its gradient are registered", "[grouped_linear]") {
  using c10::DispatchKey;
  for (const char* name : {"elattn::grouped_linear", "elattn::_grouped_outer"}) {
    CAPTURE(name);
    const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
    CHECK_FALSE(op.schema().is_mutable());
    for (const auto key : {DispatchKey::CPU, DispatchKey::CUDA, DispatchKey::Meta, DispatchKey::Autograd}) {
      CAPTURE(c10::toString(key));
      CHECK(op.hasKernelForDispatchKey(key));
    }
  }
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("elattn::grouped_linear", "");
  CHECK(op.hasKernelForDispatchKey(DispatchKey::AutocastCPU));
  CHECK(op.hasKernelForDispatchKey(DispatchKey::AutocastCUDA));
}

TEST_CASE("grouped_linear: Meta, autocast, the boxed call", "[grouped_linear]") {
  at::manual_seed(0);
  const at::Tensor x = at::randn({5, 3}), weight = at::randn({2, 4, 3}), offsets = ends({2, 5});
  const at::Tensor y = grouped_linear(x, weight, offsets);

  const at::Tensor meta = grouped_linear(x.to(at::kMeta), weight.to(at::kMeta), offsets.to(at::kMeta));
  CHECK(meta.is_meta());
  CHECK(meta.sizes() == y.sizes());
  CHECK(meta.strides() == y.strides());

  torch::jit::Stack stack = {x, weight, offsets};
  c10::Dispatcher::singleton().findSchemaOrThrow("elattn::grouped_linear", "").callBoxed(stack);
  CHECK(at::equal(stack.at(0).toTensor(), y));

  at::autocast::set_autocast_enabled(at::kCPU, true);
  const at::Tensor low = grouped_linear(x, weight, offsets);
  at::autocast::set_autocast_enabled(at::kCPU, false);
  at::autocast::clear_cache();
  CHECK(low.scalar_type() == at::kBFloat16);
  CHECK(at::equal(low, grouped_linear(x.to(at::kBFloat16), weight.to(at::kBFloat16), offsets)));
}

TEST_CASE("grouped_linear: messages name the rule and the value met", "[grouped_linear][errors]") {
  const at::Tensor x = at::zeros({5, 3}), weight = at::zeros({2, 4, 3});
  CHECK_THROWS_WITH(grouped_linear(x, at::zeros({2, 4, 6}), ends({2, 5})),
                    ContainsSubstring("elattn::grouped_linear: weight has input size 6 but x has 3"));
  CHECK_THROWS_WITH(grouped_linear(x, weight, at::tensor({2, 5}, at::kLong)),
                    ContainsSubstring("elattn::grouped_linear: offsets must have dtype Int but has Long"));
  CHECK_THROWS_WITH(grouped_linear(x, weight, ends({2, 4})),
                    ContainsSubstring("offsets must end at the number of rows, 5, but ends at 4"));
  CHECK_THROWS_WITH(grouped_linear(x, weight, ends({6, 5})),
                    ContainsSubstring("offsets must not decrease, starting from 0, but offsets[1] is 5 after 6"));
}

}  // namespace elattn::tests
