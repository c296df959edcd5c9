"""Every rule of the operators has a message that names the operator, the rule and the value met."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import elattn
from compare import check_same
from inputs import qkv

B, H, HKV, L, D, DV = 2, 4, 2, 6, 8, 5


def x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def call(**changes: Any) -> None:
    """A good call of `attention`, but for `changes`; it must fail on the Meta device with the same message."""
    arguments = {"q": x(B, H, L, D), "k": x(B, HKV, L, D), "v": x(B, HKV, L, DV), "enable_gqa": True} | changes
    elattn.attention(**arguments)


def call_features(**changes: Any) -> None:
    arguments = {"phi": x(B, H, L, D), "psi": x(B, HKV, L, D), "v": x(B, HKV, L, DV), "enable_gqa": True} | changes
    elattn.feature_attention(**arguments)


def call_step(**changes: Any) -> None:
    kernel = changes.get("kernel", "hadamard_exp")
    state = elattn.new_state(B, HKV, D, DV, kernel=kernel if kernel in elattn.kernels() else "hadamard_exp")
    arguments = {"q": x(B, H, D), "k": x(B, HKV, D), "v": x(B, HKV, DV), "state": state, "enable_gqa": True} | changes
    elattn.attention_step(**arguments)


SIZE = D * DV + 3 * D
KERNEL_NAMES = "hadamard_exp, sum_sq, sub_sq, directional, elu"

SHARED = [
    ({"q": x(H, L, D)}, "q must have shape (B, H, Lq, D) but has [4, 6, 8]"),
    ({"k": x(B, L, D)}, "k must have shape (B, Hkv, Lk, D) but has [2, 6, 8]"),
    ({"v": x(B, HKV, 1, L, DV)}, "v must have shape (B, Hkv, Lk, Dv) but has [2, 2, 1, 6, 5]"),
    ({"q": x(B, H, L, D).long()}, "q must have dtype Float, Double, BFloat16 or Half but has Long"),
    ({"k": x(B, HKV, L, D).double()}, "k has dtype Double but q has Float"),
    ({"v": x(B, HKV, L, DV).bfloat16()}, "v has dtype BFloat16 but q has Float"),
    ({"k": x(B, HKV, L, D).to("meta")}, "k is on meta but q is on cpu"),
    ({"v": x(B, HKV, L, DV).to("meta")}, "v is on meta but q is on cpu"),
    ({"k": x(3, HKV, L, D)}, "k has batch size 3 but q has 2"),
    ({"v": x(1, HKV, L, DV)}, "v has batch size 1 but q has 2"),
    ({"k": x(B, HKV, L, 32)}, "k has head dimension 32 but q has 8"),
    ({"v": x(B, 3, L, DV)}, "v has number of heads 3 but k has 2"),
    ({"v": x(B, HKV, 7, DV)}, "v has length 7 but k has 6"),
    ({"q": x(B, 3, L, D)}, "the number of heads of q must be a multiple of that of k, 2, but is 3"),
    ({"q": x(B, H, L, D), "enable_gqa": False}, "k has number of heads 2 but q has 4; enable_gqa=True shares heads"),
    ({"q": x(B, H, L, 0), "k": x(B, HKV, L, 0)}, "the head dimension must be at least 1 but is 0"),
    ({"v": x(B, HKV, L, 0)}, "the value dimension must be at least 1 but is 0"),
    (
        {"is_causal": True, "q": x(B, H, 7, D)},
        "is_causal=True needs as many queries as keys but q has length 7 and the keys have length 6",
    ),
    ({"key_padding_mask": x(B, L)}, "key_padding_mask must have dtype Bool but has Float"),
    ({"key_padding_mask": x(B, 7).bool()}, "key_padding_mask must have shape [2, 6] but has [2, 7]"),
    ({"key_padding_mask": x(B).bool()}, "key_padding_mask must have shape [2, 6] but has [2]"),
    ({"key_padding_mask": x(B, L).bool().to("meta")}, "key_padding_mask is on meta but q is on cpu"),
    (
        {"key_padding_mask": x(B, L).bool(), "cu_seqlens": torch.tensor([0, 6])},
        "key_padding_mask and cu_seqlens exclude each other",
    ),
    ({"cu_seqlens": torch.tensor([0, 6])}, "cu_seqlens needs batch size 1 but q has batch size 2"),
    ({"state": x(B, HKV, SIZE).double()}, "state must have dtype Float for inputs of dtype Float but has Double"),
    ({"state": x(B, HKV, 9)}, "the last dimension of state must be {size} for kernel {kernel} but is 9"),
    ({"state": x(3, HKV, SIZE)}, "state must have shape [2, 2, {size}] but has [3, 2, {size}]"),
    ({"state": x(HKV, SIZE)}, "state must have three dimensions, the last of size {size}, but has shape [2, {size}]"),
]

ATTENTION = [
    ({"kernel": "softmax"}, f'unknown kernel "softmax"; the kernels are {KERNEL_NAMES}'),
    ({"kernel": "features"}, f'unknown kernel "features"; the kernels are {KERNEL_NAMES}'),
    ({"eps": 1e-3}, "eps belongs to the kernels sum_sq, sub_sq and directional but the kernel is hadamard_exp"),
    ({"eps": 1e-3, "kernel": "elu"}, "eps belongs to the kernels sum_sq, sub_sq and directional but the kernel is elu"),
    ({"eps": -1.0, "kernel": "sum_sq"}, "eps must be finite and not negative but is -1"),
    ({"eps": float("nan"), "kernel": "sum_sq"}, "eps must be finite and not negative but is nan"),
    ({"decay": x(HKV)}, "decay needs is_causal=True"),
    ({"is_causal": True, "decay": x(HKV).double()}, "decay must have dtype Float or that of q (Float) but has Double"),
    ({"is_causal": True, "decay": x(HKV).to("meta")}, "decay is on meta but q is on cpu"),
    (
        {"is_causal": True, "decay": x(HKV, D), "kernel": "elu"},
        "decay per channel belongs to the kernel hadamard_exp but the kernel is elu",
    ),
    (
        {"is_causal": True, "decay": x(B, HKV, L, D), "kernel": "sum_sq"},
        "decay per channel belongs to the kernel hadamard_exp but the kernel is sum_sq",
    ),
    ({"is_causal": True, "decay": x(H)}, "decay must have shape [2] but has [4]"),
    ({"is_causal": True, "decay": x(HKV, 3)}, "decay must have shape [2, 8] but has [2, 3]"),
    ({"is_causal": True, "decay": x(B, HKV, 7)}, "decay must have shape [2, 2, 6] but has [2, 2, 7]"),
    ({"is_causal": True, "decay": x(B, HKV, L, 3)}, "decay must have shape [2, 2, 6, 8] but has [2, 2, 6, 3]"),
    (
        {"is_causal": True, "decay": x()},
        "decay must have shape (Hkv,), (Hkv, D), (B, Hkv, L) or (B, Hkv, L, D) but has []",
    ),
    (
        {"state": x(B, HKV, elattn.state_size("sum_sq", D, DV))},
        f"the last dimension of state must be {SIZE} for kernel hadamard_exp but is 73",
    ),
]


def one(**changes: Any) -> dict[str, Any]:
    """Changes for a packed call."""
    return {"q": x(1, H, L, D), "k": x(1, HKV, L, D), "v": x(1, HKV, L, DV), **changes}


# Values, which only a device that can read them without waiting checks.
CU_SEQLENS_VALUES = [
    (one(cu_seqlens=torch.tensor([1, 6])), "cu_seqlens must start at 0 but starts at 1"),
    (one(cu_seqlens=torch.tensor([0, 4, 3, 6])), "cu_seqlens must not decrease but cu_seqlens[2] is 3 after 4"),
    (one(cu_seqlens=torch.tensor([0, 4])), "cu_seqlens must end at the length of the keys, 6, but ends at 4"),
    (one(cu_seqlens=torch.tensor([0, 9])), "cu_seqlens must end at the length of the keys, 6, but ends at 9"),
]
CU_SEQLENS = [
    (one(cu_seqlens=torch.tensor([0.0, 6.0])), "cu_seqlens must have dtype Int or Long but has Float"),
    (one(cu_seqlens=torch.tensor([[0, 6]])), "cu_seqlens must have shape (N + 1,) but has [1, 2]"),
    (one(cu_seqlens=torch.tensor([0, 6], device="meta")), "cu_seqlens is on meta but q is on cpu"),
    (one(cu_seqlens=torch.tensor([], dtype=torch.int64)), "cu_seqlens must have at least one element but has none"),
    (
        one(cu_seqlens=torch.tensor([0, 6]), q=x(1, H, 7, D)),
        "cu_seqlens needs as many queries as keys but q has length 7 and the keys have length 6",
    ),
    (
        one(cu_seqlens=torch.tensor([0, 6]), state=x(2, HKV, SIZE)),
        "state must have shape [1, 2, {size}] but has [2, 2, {size}]",
    ),
]

STEP = [
    ({"q": x(B, H, 1, D)}, "q must have shape (B, H, D) but has [2, 4, 1, 8]"),
    ({"k": x(B, HKV, 1, D)}, "k must have shape (B, Hkv, D) but has [2, 2, 1, 8]"),
    ({"v": x(B, DV)}, "v must have shape (B, Hkv, Dv) but has [2, 5]"),
    ({"q": x(B, H, D).int()}, "q must have dtype Float, Double, BFloat16 or Half but has Int"),
    ({"k": x(B, HKV, D).half()}, "k has dtype Half but q has Float"),
    ({"k": x(3, HKV, D)}, "k has batch size 3 but q has 2"),
    ({"k": x(B, HKV, 9)}, "k has head dimension 9 but q has 8"),
    ({"v": x(B, 3, DV)}, "v has number of heads 3 but k has 2"),
    ({"q": x(B, 3, D)}, "the number of heads of q must be a multiple of that of k, 2, but is 3"),
    ({"enable_gqa": False}, "k has number of heads 2 but q has 4; enable_gqa=True shares heads"),
    ({"kernel": "cosine"}, f'unknown kernel "cosine"; the kernels are {KERNEL_NAMES}'),
    ({"eps": 0.1}, "eps belongs to the kernels sum_sq, sub_sq and directional but the kernel is hadamard_exp"),
    ({"state": x(B, HKV, SIZE).double()}, "state must have dtype Float for inputs of dtype Float but has Double"),
    (
        {"state": x(B, HKV, SIZE + 1)},
        f"the last dimension of state must be {SIZE} for kernel hadamard_exp but is {SIZE + 1}",
    ),
    ({"state": x(B, SIZE)}, f"state must have three dimensions, the last of size {SIZE}, but has shape [2, {SIZE}]"),
    ({"state": x(SIZE, HKV, B).transpose(0, 2)}, "the last dimension of state must be contiguous but has stride 4"),
    ({"state": x(1, HKV, SIZE)}, "state must have a row for each of the 2 batch entries but has 1; slots picks rows"),
    ({"state": x(B, HKV, SIZE).to("meta")}, "state is on meta but q is on cpu"),
    ({"slots": torch.tensor([0.0, 1.0])}, "slots must have dtype Int or Long but has Float"),
    ({"slots": torch.tensor([0, 1, 2])}, "slots must have shape [2] but has [3]"),
    ({"slots": torch.tensor([0, 1], device="meta")}, "slots is on meta but q is on cpu"),
    ({"decay": x(H)}, "decay must have shape [2] but has [4]"),
    ({"decay": x(HKV, 3)}, "decay must have shape [2, 8] but has [2, 3]"),
    ({"decay": x(B, HKV, 3)}, "decay must have shape [2, 2, 8] but has [2, 2, 3]"),
    (
        {"decay": x(B, HKV, 1, D)},
        "decay must have shape (Hkv,), (Hkv, D), (B, Hkv, 1) or (B, Hkv, D) but has [2, 2, 1, 8]",
    ),
    (
        {"decay": x(HKV, D), "kernel": "elu"},
        "decay per channel belongs to the kernel hadamard_exp but the kernel is elu",
    ),
    ({"decay": x(HKV).half()}, "decay must have dtype Float or that of q (Float) but has Half"),
]
STEP_VALUES = [
    ({"slots": torch.tensor([0, 2])}, "slots must be -1 or a row of state, which has 2, but slots[1] is 2"),
    ({"slots": torch.tensor([-2, 1])}, "slots must be -1 or a row of state, which has 2, but slots[0] is -2"),
    ({"slots": torch.tensor([1, 1])}, "slots must name a row of state only once but names 1 twice"),
]


def refused(fn: Callable[..., None], changes: dict[str, Any], message: str, op: str) -> None:
    message = message.replace("{size}", str(SIZE)).replace("{kernel}", "hadamard_exp")
    with pytest.raises(RuntimeError, match="^" + re.escape(f"{op}: {message}")):
        fn(**changes)


def on_meta(changes: dict[str, Any]) -> dict[str, Any]:
    return {n: c.to("meta") if isinstance(c, Tensor) else c for n, c in changes.items()}


def mixes_devices(message: str) -> bool:
    return "is on meta" in message


@pytest.mark.parametrize(
    ("changes", "message"), SHARED + ATTENTION + CU_SEQLENS, ids=lambda v: v if isinstance(v, str) else ""
)
def test_attention(changes: dict[str, Any], message: str) -> None:
    refused(call, changes, message, "elattn::attention")
    refused(lambda **c: call(return_state=True, **c), changes, message, "elattn::attention")
    with torch.no_grad():
        refused(call, changes, message, "elattn::attention")
    if not mixes_devices(message):
        defaults = {"q": x(B, H, L, D), "k": x(B, HKV, L, D), "v": x(B, HKV, L, DV)}
        refused(call, on_meta(defaults | changes), message, "elattn::attention")


@pytest.mark.parametrize(("changes", "message"), CU_SEQLENS_VALUES, ids=lambda v: v if isinstance(v, str) else "")
def test_values_of_cu_seqlens(changes: dict[str, Any], message: str) -> None:
    for integer in (torch.int32, torch.int64):
        refused(call, changes | {"cu_seqlens": changes["cu_seqlens"].to(integer)}, message, "elattn::attention")


@pytest.mark.parametrize(
    ("changes", "message"), SHARED + CU_SEQLENS + CU_SEQLENS_VALUES, ids=lambda v: v if isinstance(v, str) else ""
)
def test_feature_attention(changes: dict[str, Any], message: str) -> None:
    names = {"q": "phi", "k": "psi"}
    changes = {names.get(name, name): value for name, value in changes.items()}
    words = re.split(r"\b", message)
    message = "".join(names.get(word, word) for word in words)
    size = elattn.state_size("features", D, DV)
    if isinstance(changes.get("state"), Tensor) and changes["state"].size(-1) == SIZE:
        changes["state"] = changes["state"][..., :size]
    message = message.replace("{size}", str(size)).replace("{kernel}", "features")
    refused(call_features, changes, message, "elattn::feature_attention")


@pytest.mark.parametrize(("changes", "message"), STEP, ids=lambda v: v if isinstance(v, str) else "")
def test_attention_step(changes: dict[str, Any], message: str) -> None:
    refused(call_step, changes, message, "elattn::attention_step")
    if not mixes_devices(message):
        defaults = {"q": x(B, H, D), "k": x(B, HKV, D), "v": x(B, HKV, DV), "state": x(B, HKV, SIZE)}
        if changes.get("kernel") == "elu":
            defaults["state"] = x(B, HKV, elattn.state_size("elu", D, DV))
        refused(call_step, on_meta(defaults | changes), message, "elattn::attention_step")


@pytest.mark.parametrize(("changes", "message"), STEP_VALUES, ids=lambda v: v if isinstance(v, str) else "")
def test_values_of_slots(changes: dict[str, Any], message: str) -> None:
    refused(call_step, changes, message, "elattn::attention_step")
    state = torch.randn(B, HKV, elattn.state_size("features", D, DV))
    before = state.clone()
    with pytest.raises(RuntimeError, match="^" + re.escape(f"elattn::feature_attention_step: {message}")):
        elattn.feature_attention_step(x(B, H, D), x(B, HKV, D), x(B, HKV, DV), state, enable_gqa=True, **changes)
    check_same(state, before)


def test_states() -> None:
    def refuses(message: str, fn: Callable[[], Any]) -> None:
        with pytest.raises(RuntimeError, match="^" + re.escape(message)):
            fn()

    names = f"{KERNEL_NAMES}, features"
    refuses(
        f'elattn::new_state: unknown kernel "x"; the kernels are {names}',
        lambda: elattn.new_state(1, 1, 2, 2, kernel="x"),
    )
    refuses(
        "elattn::new_state: dtype must be Float or Double but is BFloat16",
        lambda: elattn.new_state(1, 1, 2, 2, dtype=torch.bfloat16),
    )
    refuses("elattn::new_state: the head dimension must be at least 1 but is 0", lambda: elattn.new_state(1, 1, 0, 2))
    refuses(
        "elattn::state_size: the value dimension must be at least 1 but is -1", lambda: elattn.state_size("elu", 2, -1)
    )
    refuses(f'elattn::state_size: unknown kernel "y"; the kernels are {names}', lambda: elattn.state_size("y", 2, 2))
    refuses(f'elattn::state_fields: unknown kernel "y"; the kernels are {names}', lambda: elattn.state_fields("y"))
    refuses(
        "elattn::unpack_state: the last dimension of state must be 10 for kernel hadamard_exp but is 9",
        lambda: elattn.unpack_state(x(1, 1, 9), 2, 2),
    )
    refuses(
        "elattn::unpack_state: state must have dtype Float or Double but has Half",
        lambda: elattn.unpack_state(x(1, 1, 10).half(), 2, 2),
    )
    good = elattn.new_state(2, 3, 2, 2)
    merge = elattn.merge_states
    refuses("elattn::merge_states: b has shape [1, 3, 10] but a has [2, 3, 10]", lambda: merge(good, good[:1], 2, 2))
    refuses("elattn::merge_states: b has dtype Double but a has Float", lambda: merge(good, good.double(), 2, 2))
    refuses("elattn::merge_states: b is on meta but a is on cpu", lambda: merge(good, good.to("meta"), 2, 2))
    refuses(
        "elattn::merge_states: a must have shape (B, Hkv, state_size) but has [3, 10]",
        lambda: merge(good[0], good[0], 2, 2),
    )
    refuses(
        "elattn::merge_states: the last dimension of a must be 6 for kernel elu but is 10",
        lambda: merge(good, good, 2, 2, kernel="elu"),
    )
    refuses("elattn::merge_states: decay must have shape [3] but has [2]", lambda: merge(good, good, 2, 2, decay=x(2)))
    refuses(
        "elattn::merge_states: decay must be of a floating-point dtype but has Long",
        lambda: merge(good, good, 2, 2, decay=torch.zeros(3, dtype=torch.int64)),
    )


def test_nothing_is_written_by_a_refused_step() -> None:
    for changes, _ in STEP + STEP_VALUES:
        if isinstance(changes.get("state"), Tensor):
            continue
        kernel = changes.get("kernel", "hadamard_exp")
        state = torch.randn(B, HKV, elattn.state_size(kernel if kernel in elattn.kernels() else "elu", D, DV))
        before = state.clone()
        with pytest.raises(RuntimeError):
            call_step(**changes, state=state)
        check_same(state, before)


def test_overlapping_states_are_refused() -> None:
    row = elattn.new_state(1, 1, D, DV)
    with pytest.raises(RuntimeError):
        elattn.attention_step(x(2, 1, D), x(2, 1, D), x(2, 1, DV), row.expand(2, -1, -1))


def test_feature_kernel_objects_take_neither_eps_nor_decay() -> None:
    q, k, v = qkv(length=4)
    kernel = elattn.FeatureKernel(torch.exp, torch.exp)
    with pytest.raises(ValueError, match="neither eps nor decay"):
        elattn.attention(q, k, v, kernel=kernel, eps=0.1)
    with pytest.raises(ValueError, match="neither eps nor decay"):
        elattn.attention(q, k, v, kernel=kernel, is_causal=True, decay=torch.ones(2))
