#include "ops/attention_shape.h"

#include <ATen/core/Formatting.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/transpose.h>
#include <c10/core/SymBool.h>

#include <cmath>

#include "ops/checks.h"

namespace elattn {
namespace {

void check_same(const char* op, const char* what, const char* name, const c10::SymInt& size, const char* other,
                const c10::SymInt& other_size) {
  TORCH_SYM_CHECK(size.sym_eq(other_size), op, ": ", name, " has ", what, " ", size, " but ", other, " has ",
                  other_size);
}

void check_shape(const char* op, const char* name, const at::Tensor& tensor, std::initializer_list<c10::SymInt> shape) {
  const auto sizes = tensor.sym_sizes();
  const auto same = [&](size_t i) { return sizes[i].sym_eq(shape.begin()[i]); };
  TORCH_CHECK(sizes.size() == shape.size(), op, ": ", name, " must have shape ", c10::SymIntArrayRef(shape),
              " but has ", sizes);
  for (size_t i = 0; i < shape.size(); ++i) {
    TORCH_SYM_CHECK(same(i), op, ": ", name, " must have shape ", c10::SymIntArrayRef(shape), " but has ", sizes);
  }
}

void check_integer(const char* op, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK(tensor.scalar_type() == at::kInt || tensor.scalar_type() == at::kLong, op, ": ", name,
              " must have dtype Int or Long but has ", tensor.scalar_type());
}

void check_eps(const char* op, KernelKind kernel, double eps) {
  TORCH_CHECK(std::isfinite(eps) && eps >= 0, op, ": eps must be finite and not negative but is ", eps);
  TORCH_CHECK(eps == 0 || is_squared(kernel), op,
              ": eps belongs to the kernels sum_sq, sub_sq and directional but the kernel is ", kernel_name(kernel));
}

void check_decay(const char* op, KernelKind kernel, const at::Tensor& decay, bool per_channel) {
  TORCH_CHECK(!per_channel || kernel == KernelKind::HadamardExp, op,
              ": decay per channel belongs to the kernel hadamard_exp but the kernel is ", kernel_name(kernel),
              "; decay has shape ", decay.sym_sizes());
}

void check_decay_dtype(const char* op, const at::Tensor& decay, const at::Tensor& q) {
  TORCH_CHECK(decay.scalar_type() == at::kFloat || decay.scalar_type() == q.scalar_type(), op,
              ": decay must have dtype Float or that of q (", q.scalar_type(), ") but has ", decay.scalar_type());
}

/// Rows of the pool, or sequences, are left to the caller.
void check_state(const char* op, KernelKind kernel, const at::Tensor& state, const AttentionShape& shape,
                 const char* q_name, const at::Tensor& q) {
  TORCH_CHECK(state.scalar_type() == accumulation_type(q), op, ": state must have dtype ", accumulation_type(q),
              " for inputs of dtype ", q.scalar_type(), " but has ", state.scalar_type());
  check_device(op, "state", state, q_name, q);
  TORCH_CHECK(state.dim() == 3, op, ": state must have three dimensions, the last of size ", shape.state_size,
              ", but has shape ", state.sym_sizes());
  TORCH_SYM_CHECK(state.sym_size(2).sym_eq(shape.state_size), op, ": the last dimension of state must be ",
                  shape.state_size, " for kernel ", kernel_name(kernel), " but is ", state.sym_size(2));
}

/// What attention and its step have in common: q (B, H, [Lq,] D), k (B, Hkv, [Lk,] D), v (B, Hkv, [Lk,] Dv).
AttentionShape input_shape(const char* op, KernelKind kernel, bool step, bool enable_gqa, const at::Tensor& q,
                           const at::Tensor& k, const at::Tensor& v) {
  const bool features = kernel == KernelKind::Features;
  const char* q_name = features ? "phi" : "q";
  const char* k_name = features ? "psi" : "k";
  const auto check_dim = [&](const char* name, const at::Tensor& tensor, const char* shape) {
    TORCH_CHECK(tensor.dim() == (step ? 3 : 4), op, ": ", name, " must have shape ", shape, " but has ",
                tensor.sym_sizes());
  };
  check_dim(q_name, q, step ? "(B, H, D)" : "(B, H, Lq, D)");
  check_dim(k_name, k, step ? "(B, Hkv, D)" : "(B, Hkv, Lk, D)");
  check_dim("v", v, step ? "(B, Hkv, Dv)" : "(B, Hkv, Lk, Dv)");

  check_floating(op, q_name, q);
  check_same_dtype(op, k_name, k, q_name, q);
  check_same_dtype(op, "v", v, q_name, q);
  check_device(op, k_name, k, q_name, q);
  check_device(op, "v", v, q_name, q);

  AttentionShape shape{.batch = q.sym_size(0),
                       .sequences = q.sym_size(0),
                       .heads = q.sym_size(1),
                       .kv_heads = k.sym_size(1),
                       .query_len = step ? 1 : q.sym_size(2),
                       .key_len = step ? 1 : k.sym_size(2),
                       .head_dim = q.sym_size(-1),
                       .value_dim = v.sym_size(-1),
                       .state_size = 0};
  check_same(op, "batch size", k_name, k.sym_size(0), q_name, shape.batch);
  check_same(op, "batch size", "v", v.sym_size(0), q_name, shape.batch);
  check_same(op, "head dimension", k_name, k.sym_size(-1), q_name, shape.head_dim);
  check_same(op, "number of heads", "v", v.sym_size(1), k_name, shape.kv_heads);
  if (!step) check_same(op, "length", "v", v.sym_size(2), k_name, shape.key_len);
  if (enable_gqa) {
    TORCH_CHECK(shape.kv_heads == 0 ? shape.heads == 0 : shape.heads % shape.kv_heads == 0, op,
                ": the number of heads of ", q_name, " must be a multiple of that of ", k_name, ", ", shape.kv_heads,
                ", but is ", shape.heads);
  } else {
    TORCH_SYM_CHECK(shape.heads.sym_eq(shape.kv_heads), op, ": ", k_name, " has number of heads ", shape.kv_heads,
                    " but ", q_name, " has ", shape.heads, "; enable_gqa=True shares heads");
  }
  TORCH_SYM_CHECK(shape.head_dim.sym_ge(1), op, ": the head dimension must be at least 1 but is ", shape.head_dim);
  TORCH_SYM_CHECK(shape.value_dim.sym_ge(1), op, ": the value dimension must be at least 1 but is ", shape.value_dim);
  shape.state_size = state_layout(kernel).size<c10::SymInt>(shape.head_dim, shape.value_dim);
  return shape;
}

}  // namespace

AttentionShape attention_shape(const AttentionArguments& a, const at::Tensor& q, const at::Tensor& k,
                               const at::Tensor& v) {
  const char* op = attention_name(a.kernel);
  AttentionShape shape = input_shape(op, a.kernel, false, a.enable_gqa, q, k, v);
  const char* q_name = a.kernel == KernelKind::Features ? "phi" : "q";
  check_eps(op, a.kernel, a.eps);

  if (a.is_causal || a.cu_seqlens) {
    TORCH_SYM_CHECK(shape.query_len.sym_eq(shape.key_len), op, ": ", a.is_causal ? "is_causal=True" : "cu_seqlens",
                    " needs as many queries as keys but ", q_name, " has length ", shape.query_len,
                    " and the keys have length ", shape.key_len);
  }
  if (a.key_padding_mask) {
    const at::Tensor& mask = *a.key_padding_mask;
    TORCH_CHECK(!a.cu_seqlens, op,
                ": key_padding_mask and cu_seqlens exclude each other; leave the padding out of the packed sequences");
    TORCH_CHECK(mask.scalar_type() == at::kBool, op, ": key_padding_mask must have dtype Bool but has ",
                mask.scalar_type());
    check_device(op, "key_padding_mask", mask, q_name, q);
    check_shape(op, "key_padding_mask", mask, {shape.batch, shape.key_len});
  }
  if (a.cu_seqlens) {
    const at::Tensor& cu_seqlens = *a.cu_seqlens;
    check_integer(op, "cu_seqlens", cu_seqlens);
    TORCH_CHECK(cu_seqlens.dim() == 1, op, ": cu_seqlens must have shape (N + 1,) but has ", cu_seqlens.sym_sizes());
    check_device(op, "cu_seqlens", cu_seqlens, q_name, q);
    TORCH_SYM_CHECK(shape.batch.sym_eq(1), op, ": cu_seqlens needs batch size 1 but ", q_name, " has batch size ",
                    shape.batch);
    TORCH_SYM_CHECK(cu_seqlens.sym_size(0).sym_ge(1), op, ": cu_seqlens must have at least one element but has none");
    shape.sequences = cu_seqlens.sym_size(0) - 1;
  }
  if (a.decay) {
    const at::Tensor& decay = *a.decay;
    TORCH_CHECK(a.is_causal, op, ": decay needs is_causal=True");
    check_decay_dtype(op, decay, q);
    check_device(op, "decay", decay, q_name, q);
    check_decay(op, a.kernel, decay, decay.dim() == 2 || decay.dim() == 4);
    switch (decay.dim()) {
      case 1: check_shape(op, "decay", decay, {shape.kv_heads}); break;
      case 2: check_shape(op, "decay", decay, {shape.kv_heads, shape.head_dim}); break;
      case 3: check_shape(op, "decay", decay, {shape.batch, shape.kv_heads, shape.key_len}); break;
      case 4: check_shape(op, "decay", decay, {shape.batch, shape.kv_heads, shape.key_len, shape.head_dim}); break;
      default:
        TORCH_CHECK(false, op, ": decay must have shape (Hkv,), (Hkv, D), (B, Hkv, L) or (B, Hkv, L, D) but has ",
                    decay.sym_sizes());
    }
  }
  if (a.state) {
    check_state(op, a.kernel, *a.state, shape, q_name, q);
    check_shape(op, "state", *a.state, {shape.sequences, shape.kv_heads, shape.state_size});
  }
  return shape;
}

AttentionShape attention_step_shape(const StepArguments& a, const at::Tensor& q, const at::Tensor& k,
                                    const at::Tensor& v, const at::Tensor& state) {
  const char* op = step_name(a.kernel);
  const AttentionShape shape = input_shape(op, a.kernel, true, a.enable_gqa, q, k, v);
  const char* q_name = a.kernel == KernelKind::Features ? "phi" : "q";
  check_eps(op, a.kernel, a.eps);

  check_state(op, a.kernel, state, shape, q_name, q);
  check_shape(op, "state", state, {state.sym_size(0), shape.kv_heads, shape.state_size});
  TORCH_CHECK(state.sym_stride(-1) == 1 || shape.state_size == 1, op,
              ": the last dimension of state must be contiguous but has stride ", state.sym_stride(-1));
  if (a.slots) {
    check_integer(op, "slots", *a.slots);
    check_device(op, "slots", *a.slots, q_name, q);
    check_shape(op, "slots", *a.slots, {shape.batch});
  } else {
    TORCH_SYM_CHECK(state.sym_size(0).sym_ge(shape.batch), op, ": state must have a row for each of the ", shape.batch,
                    " batch entries but has ", state.sym_size(0), "; slots picks rows");
  }
  if (a.decay) {
    check_decay_dtype(op, *a.decay, q);
    check_device(op, "decay", *a.decay, q_name, q);
    check_step_decay(op, a.kernel, *a.decay, shape.batch, shape.kv_heads, shape.head_dim);
  }
  return shape;
}

void check_step_decay(const char* op, KernelKind kernel, const at::Tensor& decay, const c10::SymInt& batch,
                      const c10::SymInt& kv_heads, const c10::SymInt& head_dim) {
  const bool per_channel = decay.dim() == 2 || (decay.dim() == 3 && decay.sym_size(2) != 1);
  check_decay(op, kernel, decay, per_channel);
  switch (decay.dim()) {
    case 1: check_shape(op, "decay", decay, {kv_heads}); break;
    case 2: check_shape(op, "decay", decay, {kv_heads, head_dim}); break;
    case 3: check_shape(op, "decay", decay, {batch, kv_heads, per_channel ? head_dim : c10::SymInt(1)}); break;
    default:
      TORCH_CHECK(false, op, ": decay must have shape (Hkv,), (Hkv, D), (B, Hkv, 1) or (B, Hkv, D) but has ",
                  decay.sym_sizes());
  }
}

void check_gradients(const AttentionShape& shape, const AttentionArguments& a, const at::Tensor& q,
                     const at::Tensor& grad_out, const OptionalTensor& grad_state) {
  const char* op = attention_name(a.kernel);
  check_shape(op, "grad_out", grad_out, {shape.batch, shape.heads, shape.query_len, shape.value_dim});
  TORCH_CHECK(grad_out.scalar_type() == q.scalar_type(), op, ": grad_out must have dtype ", q.scalar_type(),
              " but has ", grad_out.scalar_type());
  if (grad_state) {
    check_shape(op, "grad_state", *grad_state, {shape.sequences, shape.kv_heads, shape.state_size});
    TORCH_CHECK(grad_state->scalar_type() == accumulation_type(q), op, ": grad_state must have dtype ",
                accumulation_type(q), " but has ", grad_state->scalar_type());
  }
}

at::Tensor empty_in_order_of(const at::Tensor& like, const c10::SymInt& batch, const c10::SymInt& heads,
                             const c10::SymInt& len, const c10::SymInt& dim) {
  if (TORCH_GUARD_OR_FALSE(like.sym_stride(1).sym_lt(like.sym_stride(2)))) {
    return at::empty_symint({batch, len, heads, dim}, like.options()).transpose(1, 2);
  }
  return at::empty_symint({batch, heads, len, dim}, like.options());
}

at::Tensor new_output(const AttentionShape& shape, const at::Tensor& q) {
  return empty_in_order_of(q, shape.batch, shape.heads, shape.query_len, shape.value_dim);
}

at::Tensor new_final_state(const AttentionShape& shape, const at::Tensor& q) {
  return at::empty_symint({shape.sequences, shape.kv_heads, shape.state_size}, q.options().dtype(accumulation_type(q)));
}

at::Tensor new_step_output(const AttentionShape& shape, const at::Tensor& q) {
  return at::empty_symint({shape.batch, shape.heads, shape.value_dim}, q.options());
}

Gradients new_gradients(const AttentionShape& shape, const AttentionArguments& a, const at::Tensor& q,
                        const at::Tensor& k, const at::Tensor& v) {
  const auto like = [](const at::Tensor& t) {
    return empty_in_order_of(t, t.sym_size(0), t.sym_size(1), t.sym_size(2), t.sym_size(3));
  };
  const auto absent = [&] { return at::empty({0}, q.options().dtype(accumulation_type(q))); };
  return {like(q), like(k), like(v), a.decay ? at::empty_symint(a.decay->sym_sizes(), a.decay->options()) : absent(),
          a.state ? new_final_state(shape, q) : absent()};
}

}  // namespace elattn
