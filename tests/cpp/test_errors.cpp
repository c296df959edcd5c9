#include "inputs.h"

namespace elattn::tests {
namespace {

template <class F>
void check_message(const F& call, const std::string& text) {
  CAPTURE(text);
  CHECK_THROWS_WITH(call(), ContainsSubstring(text));
}

struct Call {
  at::Tensor q = at::zeros({2, 4, 9, 8}), k = at::zeros({2, 4, 9, 8}), v = at::zeros({2, 4, 9, 5});
  AttentionOptions options = {.is_causal = true};

  at::Tensor operator()() const { return attention(q, k, v, options); }
};

/// What attention says after `change` was made to a call that is right.
template <class F>
void check(const F& change, const std::string& text) {
  Call call;
  REQUIRE_NOTHROW(call());
  change(call);
  check_message(call, text);
}

struct StepCall {
  at::Tensor q = at::zeros({2, 4, 8}), k = at::zeros({2, 4, 8}), v = at::zeros({2, 4, 5}),
             state = new_state(3, 4, 8, 5);
  AttentionStepOptions options = {};

  at::Tensor operator()() const { return attention_step(q, k, v, state, options); }
};

/// Same for attention_step, which must not have touched the state.
template <class F>
void check_step(const F& change, const std::string& text) {
  StepCall call;
  change(call);
  const at::Tensor before = call.state.clone();
  check_message(call, text);
  CHECK(at::equal(call.state, before));
}

}  // namespace

TEST_CASE("messages name the rule and the value met: shapes", "[errors]") {
  check(
      [](Call& c) {
        c.q = at::zeros({4, 9, 8});
      },
      "elattn::attention: q must have shape (B, H, Lq, D) but has [4, 9, 8]");
  check(
      [](Call& c) {
        c.k = at::zeros({9, 8});
      },
      "elattn::attention: k must have shape (B, Hkv, Lk, D) but has [9, 8]");
  check([](Call& c) { c.v = at::zeros({9}); }, "elattn::attention: v must have shape (B, Hkv, Lk, Dv) but has [9]");
  check([](Call& c) { c.k = at::zeros({2, 4, 9, 32}); }, "elattn::attention: k has head dimension 32 but q has 8");
  check([](Call& c) { c.k = at::zeros({3, 4, 9, 8}); }, "elattn::attention: k has batch size 3 but q has 2");
  check([](Call& c) { c.v = at::zeros({3, 4, 9, 5}); }, "elattn::attention: v has batch size 3 but q has 2");
  check([](Call& c) { c.v = at::zeros({2, 2, 9, 5}); }, "elattn::attention: v has number of heads 2 but k has 4");
  check([](Call& c) { c.v = at::zeros({2, 4, 7, 5}); }, "elattn::attention: v has length 7 but k has 9");
  check([](Call& c) { c.q = at::zeros({2, 8, 9, 8}); }, "enable_gqa=True shares heads");
  check(
      [](Call& c) {
        c.q = at::zeros({2, 6, 9, 8});
        c.options.enable_gqa = true;
      },
      "must be a multiple of that of k, 4, but is 6");
  check(
      [](Call& c) {
        c.q = at::zeros({2, 4, 7, 8});
      },
      "is_causal=True needs as many queries as keys but q has length 7");
  check([](Call& c) { c.q = c.k = at::zeros({2, 4, 9, 0}); }, "the head dimension must be at least 1 but is 0");
  check([](Call& c) { c.v = at::zeros({2, 4, 9, 0}); }, "the value dimension must be at least 1 but is 0");
}

TEST_CASE("messages name the rule and the value met: dtypes and devices", "[errors]") {
  check(
      [](Call& c) {
        c.q = c.k = c.v = at::zeros({2, 4, 9, 8}, at::kLong);
      },
      "q must have dtype Float, Double, BFloat16 or Half but has Long");
  check([](Call& c) { c.k = c.k.to(at::kDouble); }, "k has dtype Double but q has Float");
  check([](Call& c) { c.v = c.v.to(at::kHalf); }, "v has dtype Half but q has Float");
  check([](Call& c) { c.k = at::empty({2, 4, 9, 8}, at::kMeta); }, "k is on meta but q is on cpu");
}

TEST_CASE("messages name the rule and the value met: options", "[errors]") {
  check([](Call& c) { c.options.kernel = "softmax"; }, "softmax");
  check([](Call& c) { c.options.kernel = "features"; }, "features");
  check([](Call& c) { c.options.eps = 0.5; },
        "eps belongs to the kernels sum_sq, sub_sq and directional but the kernel is hadamard_exp");
  check(
      [](Call& c) {
        c.options.kernel = "sum_sq";
        c.options.eps = -1;
      },
      "eps must be finite and not negative but is -1");
  check(
      [](Call& c) {
        c.options.key_padding_mask = at::zeros({2, 9});
      },
      "key_padding_mask must have dtype Bool but has Float");
  check(
      [](Call& c) {
        c.options.key_padding_mask = at::zeros({2, 8}, at::kBool);
      },
      "key_padding_mask must have shape [2, 9] but has [2, 8]");
  check(
      [](Call& c) {
        c.options.state = at::zeros({2, 4, 7});
      },
      "elattn::attention: the last dimension of state must be 64 for kernel hadamard_exp but is 7");
  check([](Call& c) { c.options.state = new_state(2, 4, 8, 5, "elu"); },
        "the last dimension of state must be 64 for kernel hadamard_exp but is 48");
  check([](Call& c) { c.options.state = new_state(2, 4, 8, 5).to(at::kDouble); },
        "state must have dtype Float for inputs of dtype Float but has Double");
}

TEST_CASE("messages name the rule and the value met: decay", "[errors][decay]") {
  check(
      [](Call& c) {
        c.options.decay = at::zeros({4});
        c.options.is_causal = false;
      },
      "decay needs is_causal=True");
  check([](Call& c) { c.options.decay = at::zeros({3}); }, "decay must have shape [4] but has [3]");
  check([](Call& c) { c.options.decay = at::zeros({4, 7}); }, "decay must have shape [4, 8] but has [4, 7]");
  check([](Call& c) { c.options.decay = at::zeros({2, 4, 8}); }, "decay must have shape [2, 4, 9] but has [2, 4, 8]");
  check([](Call& c) { c.options.decay = at::zeros({}); },
        "decay must have shape (Hkv,), (Hkv, D), (B, Hkv, L) or (B, Hkv, L, D)");
  check([](Call& c) { c.options.decay = at::zeros({4}, at::kLong); }, "decay must have dtype Float or that of q");
  check(
      [](Call& c) {
        c.options.decay = at::zeros({4, 8});
        c.options.kernel = "elu";
      },
      "decay per channel belongs to the kernel hadamard_exp but the kernel is elu");
}

TEST_CASE("messages name the rule and the value met: cu_seqlens", "[errors][packing]") {
  const auto packed = [](std::vector<int64_t> ends) {
    return [ends](Call& c) {
      c.q = c.k = at::zeros({1, 4, 9, 8});
      c.v = at::zeros({1, 4, 9, 5});
      c.options.cu_seqlens = at::tensor(ends, at::kLong);
    };
  };
  check(packed({0, 4, 8}), "cu_seqlens");     // does not end at 9
  check(packed({1, 4, 9}), "cu_seqlens");     // does not start at 0
  check(packed({0, 5, 4, 9}), "cu_seqlens");  // falls
  check(packed({}), "cu_seqlens must have at least one element");
  check(
      [](Call& c) {
        c.options.cu_seqlens = at::tensor({0, 9}, at::kLong);
      },
      "cu_seqlens needs batch size 1 but q has batch size 2");
  check([](Call& c) { c.options.cu_seqlens = at::zeros({2}); }, "cu_seqlens must have dtype Int or Long but has Float");
  check(
      [](Call& c) {
        c.options.cu_seqlens = at::zeros({2, 2}, at::kLong);
      },
      "cu_seqlens must have shape (N + 1,) but has [2, 2]");
  check(
      [](Call& c) {
        c.options.cu_seqlens = at::tensor({0, 9}, at::kLong);
        c.options.key_padding_mask = at::zeros({2, 9}, at::kBool);
      },
      "key_padding_mask and cu_seqlens exclude each other");
}

TEST_CASE("a refused step touches nothing", "[errors][slots]") {
  check_step(
      [](StepCall& c) {
        c.q = at::zeros({2, 4, 1, 8});
      },
      "elattn::attention_step: q must have shape (B, H, D) but has [2, 4, 1, 8]");
  check_step(
      [](StepCall& c) {
        c.k = at::zeros({2, 4, 7});
      },
      "elattn::attention_step: k has head dimension 7 but q has 8");
  check_step([](StepCall& c) { c.state = new_state(3, 4, 8, 6); },
             "elattn::attention_step: the last dimension of state must be 64 for kernel hadamard_exp but is 72");
  check_step([](StepCall& c) { c.state = new_state(1, 4, 8, 5); },
             "state must have a row for each of the 2 batch entries but has 1");
  check_step(
      [](StepCall& c) {
        c.state = at::zeros({3, 4, 128}).slice(2, 0, 128, 2);
      },
      "the last dimension of state must be contiguous but has stride 2");
  check_step([](StepCall& c) { c.options.slots = at::tensor({1, 1}, at::kLong); }, "slots");
  check_step([](StepCall& c) { c.options.slots = at::tensor({0, 3}, at::kLong); }, "slots");
  check_step([](StepCall& c) { c.options.slots = at::tensor({0, -2}, at::kLong); }, "slots");
  check_step([](StepCall& c) { c.options.slots = at::tensor({0}, at::kLong); },
             "slots must have shape [2] but has [1]");
  check_step([](StepCall& c) { c.options.slots = at::zeros({2}); }, "slots must have dtype Int or Long but has Float");
  check_step(
      [](StepCall& c) {
        c.options.decay = at::zeros({2, 4, 3});
      },
      "decay must have shape [2, 4, 8] but has [2, 4, 3]");
  check_step([](StepCall& c) { c.q.requires_grad_(); }, "elattn::attention_step");
}

TEST_CASE("a second derivative is refused", "[errors]") {
  const Inputs x = leaves(of_length(9));
  const at::Tensor y = attention(x.q, x.k, x.v, {.is_causal = true});
  check_message([&] { torch::autograd::grad({y}, {x.q}, {at::ones_like(y)}, {}, /*create_graph=*/true); },
                "elattn::attention: a second derivative is not supported");
}

TEST_CASE("states are checked by their operators", "[errors][state]") {
  check_message([] { new_state(1, 1, 8, 5, "softmax"); }, "softmax");
  check_message([] { state_size("softmax", 8, 5); }, "softmax");
  check_message([] { unpack_state(at::zeros({1, 1, 7}), 8, 5); }, "elattn::unpack_state");
  check_message([] { merge_states(new_state(1, 1, 8, 5), new_state(1, 2, 8, 5), 8, 5); }, "elattn::merge_states");
  check_message([] { merge_states(new_state(1, 1, 8, 5), new_state(1, 1, 8, 6), 8, 5); }, "elattn::merge_states");
}

}  // namespace elattn::tests
