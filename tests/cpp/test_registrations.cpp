#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/jit/runtime/operator.h>

#include "catch.h"

// Includes no header of elattn: a program that only links the library must find everything here.
namespace elattn::tests {
namespace {

c10::OperatorHandle find(const std::string& name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(("elattn::" + name).c_str(), "");
}

const std::vector<std::string> kPlain = {"attention", "attention_with_state", "feature_attention",
                                         "feature_attention_with_state"};
const std::vector<std::string> kBackward = {"_attention_backward", "_feature_attention_backward"};
const std::vector<std::string> kSteps = {"attention_step", "feature_attention_step"};
const std::vector<std::string> kOthers = {"merge_states", "new_state",    "state_size",
                                          "state_fields", "unpack_state", "kernels"};

/// Calls an operator through its boxed form with keyword arguments; the others take their defaults.
torch::jit::Stack call_boxed(const std::string& name, std::vector<c10::IValue> positional,
                             const std::map<std::string, c10::IValue>& named = {}) {
  const auto op = find(name);
  torch::jit::Stack stack = std::move(positional);
  const auto& arguments = op.schema().arguments();
  for (size_t i = stack.size(); i < arguments.size(); ++i) {
    const auto given = named.find(arguments[i].name());
    stack.push_back(given != named.end() ? given->second : arguments[i].default_value().value());
  }
  op.callBoxed(stack);
  return stack;
}

}  // namespace

TEST_CASE("the JIT sees every operator", "[registrations]") {
  for (const auto& names : {kPlain, kBackward, kSteps, kOthers}) {
    for (const auto& name : names) {
      CAPTURE(name);
      CHECK(torch::jit::getAllOperatorsFor(c10::Symbol::fromQualString("elattn::" + name)).size() == 1);
    }
  }
}

TEST_CASE("every backend has its kernels", "[registrations]") {
  using c10::DispatchKey;
  const auto check = [](const std::vector<std::string>& names, std::initializer_list<DispatchKey> keys) {
    for (const auto& name : names) {
      for (const DispatchKey key : keys) {
        CAPTURE(name, c10::toString(key));
        CHECK(find(name).hasKernelForDispatchKey(key));
      }
    }
  };
  check(kPlain, {DispatchKey::CPU, DispatchKey::Meta, DispatchKey::Autograd, DispatchKey::AutocastCPU,
                 DispatchKey::AutocastCUDA});
  check(kBackward, {DispatchKey::CPU, DispatchKey::Meta});
  check(kSteps, {DispatchKey::CPU, DispatchKey::Meta, DispatchKey::Autograd});
}

TEST_CASE("schemas declare what is written and what is shared", "[registrations]") {
  for (const auto& name : kSteps) {
    const auto op = find(name);
    for (const auto& argument : op.schema().arguments()) {
      const bool written = argument.alias_info() != nullptr && argument.alias_info()->isWrite();
      CHECK(written == (argument.name() == "state"));
    }
  }
  for (const auto& name : kPlain) CHECK_FALSE(find(name).schema().is_mutable());
  const auto unpack = find("unpack_state");
  CHECK(unpack.schema().arguments()[0].alias_info() != nullptr);
  CHECK_FALSE(unpack.schema().arguments()[0].alias_info()->isWrite());
}

TEST_CASE("the boxed call runs the operator", "[registrations]") {
  at::manual_seed(0);
  const at::Tensor q = at::randn({1, 2, 9, 4}), k = at::randn({1, 2, 9, 4}), v = at::randn({1, 2, 9, 3});
  const at::Tensor y = call_boxed("attention", {q, k, v}, {{"is_causal", true}}).at(0).toTensor();
  const auto both = call_boxed("attention_with_state", {q, k, v}, {{"is_causal", true}});
  REQUIRE(both.size() == 2);
  CHECK(at::equal(both[0].toTensor(), y));

  at::Tensor state = call_boxed("new_state", {1, 2, 4, 3}).at(0).toTensor();
  for (int64_t t = 0; t < 9; ++t) {
    const at::Tensor row =
        call_boxed("attention_step", {q.select(2, t), k.select(2, t), v.select(2, t), state}).at(0).toTensor();
    CHECK(at::equal(row, y.select(2, t)));
  }
  CHECK(at::equal(state, both[1].toTensor()));
}

TEST_CASE("Meta tensors give shapes without data", "[registrations]") {
  const auto meta = [](at::IntArrayRef sizes) {
    return at::empty(sizes, at::TensorOptions().device(at::kMeta).dtype(at::kBFloat16));
  };
  const auto results = call_boxed("attention_with_state", {meta({2, 4, 9, 8}), meta({2, 2, 9, 8}), meta({2, 2, 9, 3})},
                                  {{"enable_gqa", true}});
  CHECK(results.at(0).toTensor().sizes() == at::IntArrayRef{2, 4, 9, 3});
  CHECK(results.at(0).toTensor().scalar_type() == at::kBFloat16);
  CHECK(results.at(1).toTensor().sizes() == at::IntArrayRef{2, 2, 8 * 3 + 3 * 8});
  CHECK(results.at(1).toTensor().scalar_type() == at::kFloat);
  CHECK(results.at(1).toTensor().is_meta());
}

TEST_CASE("autocast casts as scaled_dot_product_attention does", "[registrations]") {
  at::manual_seed(0);
  const at::Tensor q = at::randn({1, 2, 9, 4});
  at::autocast::set_autocast_enabled(at::kCPU, true);
  const at::Tensor y = call_boxed("attention", {q, q, q}).at(0).toTensor();
  const at::Tensor peer = at::scaled_dot_product_attention(q, q, q);
  at::autocast::set_autocast_enabled(at::kCPU, false);
  at::autocast::clear_cache();
  CHECK(y.scalar_type() == peer.scalar_type());
  CHECK(at::equal(
      y, call_boxed("attention", {q.to(at::kBFloat16), q.to(at::kBFloat16), q.to(at::kBFloat16)}).at(0).toTensor()));
}

}  // namespace elattn::tests
