"""grouped_linear: a loop of F.linear, its gradients of any order, its registrations and its messages."""

import io
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import elattn
from backend import CPU_CONTRACT, DEVICE
from groups import ends, loop, strided

ops = torch.ops.elattn

# Rows of each group.
GROUPS = [[0], [1], [65], [0, 0, 0], [63, 1, 64], [0, 129, 0, 0, 2, 0], [1, 1, 1, 1, 1, 1, 1]]
EVERY_GROUPING = pytest.mark.parametrize("rows", GROUPS, ids=str)


def arguments(
    rows: list[int], size_in: int = 7, size_out: int = 5, dtype: torch.dtype = torch.float64, grad: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(sum(rows), size_in, dtype=torch.float64).to(dtype).requires_grad_(grad)
    weight = torch.randn(len(rows), size_out, size_in, dtype=torch.float64).to(dtype).requires_grad_(grad)
    return x, weight, ends(rows)


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-12, atol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@EVERY_GROUPING
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.usefixtures("restore_threads")
def test_it_is_a_loop_of_linear_layers(rows: list[int], threads: int) -> None:
    torch.set_num_threads(threads)
    for size_in, size_out in [(7, 5), (1, 1), (130, 129), (0, 3), (3, 0)]:
        x, weight, offsets = arguments(rows, size_in, size_out)
        y, expected = elattn.grouped_linear(x, weight, offsets), loop(x, weight, offsets)
        close(y, expected)
        g = torch.randn_like(y)
        found, wanted = torch.autograd.grad(y, (x, weight), g), torch.autograd.grad(expected, (x, weight), g)
        for actual, gradient in zip(found, wanted, strict=True):
            close(actual, gradient)


@pytest.mark.usefixtures("restore_threads")
def test_threads_share_uneven_groups() -> None:
    """More threads than rows in some groups, and borders of threads inside groups."""
    x, weight, offsets = arguments([1, 0, 200, 3, 50, 0, 2], 64, 96)
    g = torch.randn(256, 96, dtype=torch.float64)
    expected = loop(x, weight, offsets)
    gradients = torch.autograd.grad(expected, (x, weight), g)
    for threads in (2, 5, 16):
        torch.set_num_threads(threads)
        y = elattn.grouped_linear(x, weight, offsets)
        close(y, expected)
        for actual, gradient in zip(torch.autograd.grad(y, (x, weight), g), gradients, strict=True):
            close(actual, gradient, atol=1e-11)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)], ids=str
)
@pytest.mark.parametrize(("size_in", "size_out"), [(33, 18), (40, 24)])
def test_dtypes(size_in: int, size_out: int, dtype: torch.dtype, tolerance: float) -> None:
    x, weight, offsets = arguments([40, 0, 25], size_in, size_out, dtype)
    y = elattn.grouped_linear(x, weight, offsets)
    expected = loop(x.double(), weight.double(), offsets)
    g = torch.randn_like(expected).to(dtype)
    assert y.dtype == dtype
    close(y.double() / 8, expected / 8, tolerance, tolerance)
    for actual, gradient in zip(
        torch.autograd.grad(y, (x, weight), g), torch.autograd.grad(expected, (x, weight), g.double()), strict=True
    ):
        assert actual.dtype == dtype
        close(actual.double() / 8, gradient.double() / 8, tolerance, tolerance)


def test_no_groups() -> None:
    x, weight = torch.randn(0, 3, requires_grad=True), torch.randn(0, 4, 3, requires_grad=True)
    y = elattn.grouped_linear(x, weight, torch.zeros(0, dtype=torch.int32))
    assert y.shape == (0, 4)
    y.sum().backward()
    assert x.grad.shape == (0, 3) and weight.grad.shape == (0, 4, 3)


def test_strides_of_inputs_and_gradients() -> None:
    x, weight, offsets = arguments([3, 0, 64, 5], grad=False)
    g = torch.randn(72, 5, dtype=torch.float64)
    expected = loop(x, weight, offsets)
    grad_weight = ops._grouped_outer(g, x, offsets)
    for other in strided(x):
        close(elattn.grouped_linear(other, weight, offsets), expected)
        close(ops._grouped_outer(g, other, offsets), grad_weight)
    for other in strided(weight):
        close(elattn.grouped_linear(x, other, offsets), expected)
    for other in strided(g):
        close(ops._grouped_outer(other, x, offsets), grad_weight)
    spread = torch.stack([offsets, offsets + 1000], 1)[:, 0]
    assert spread.stride() == (2,)
    close(elattn.grouped_linear(x, weight, spread), expected)


def test_expanded_inputs_and_gradients() -> None:
    x, weight, offsets = arguments([3, 0, 4], grad=False)
    row, matrix = x[:1].clone().requires_grad_(), weight[:1].clone().requires_grad_()
    results = []
    for fn in (elattn.grouped_linear, loop):
        y = fn(row.expand(7, -1), matrix.expand(3, -1, -1), offsets)
        results.append((y, *torch.autograd.grad(y.sum(), (row, matrix))))  # the gradient of y is an expanded 1
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


def test_gradients_of_every_order() -> None:
    inputs = arguments([2, 0, 3], 3, 4)
    assert torch.autograd.gradcheck(elattn.grouped_linear, inputs)
    assert torch.autograd.gradgradcheck(elattn.grouped_linear, inputs)


class Called(TorchDispatchMode):
    """Records the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func)
        return func(*args, **(kwargs or {}))


def test_only_the_gradients_asked_for_are_computed() -> None:
    x, weight, offsets = arguments([4, 3])
    for frozen, free in [(x, weight), (weight, x)]:
        frozen.requires_grad_(False)
        y = elattn.grouped_linear(x, weight, offsets)
        # The factor of a frozen tensor's gradient is not kept, so changing it in place is no error.
        with torch.no_grad():
            free.mul_(1)
        y.sum().backward()
        assert frozen.grad is None and free.grad is not None
        frozen.requires_grad_()
        x.grad = weight.grad = None
    y = elattn.grouped_linear(x, weight, offsets)
    with Called() as called:
        torch.autograd.grad(y.sum(), x)
    assert ops.grouped_linear.default in called.names and ops._grouped_outer.default not in called.names


def test_equal_calls_give_equal_results() -> None:
    inputs = arguments([70, 0, 31], 33, 65, torch.float32)
    runs = []
    for _ in range(2):
        y = elattn.grouped_linear(*inputs)
        runs.append((y, *torch.autograd.grad(y.square().sum(), inputs[:2])))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# Registrations


def test_schema() -> None:
    assert str(ops.grouped_linear.default._schema) == (
        "elattn::grouped_linear(Tensor x, Tensor weight, Tensor offsets) -> Tensor"
    )


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_opcheck(grad: bool) -> None:
    x, weight, offsets = arguments([2, 0, 3], grad=grad)
    opcheck(ops.grouped_linear.default, (x, weight, offsets))
    opcheck(ops.grouped_linear.default, (x, weight.mT.contiguous().mT, offsets))
    g = torch.randn(5, 5, dtype=torch.float64, requires_grad=grad)
    opcheck(ops._grouped_outer.default, (g, x, offsets))


def test_compile_with_dynamic_shapes() -> None:
    torch.compiler.reset()

    def run(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        return elattn.grouped_linear(x, weight, offsets)

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    for rows in ([2, 0, 3], [5, 6, 7], [1, 40, 2]):
        inputs = arguments(rows)
        results = []
        for fn in (run, compiled):
            y = fn(*inputs)
            results.append((y, *torch.autograd.grad(y.square().sum(), inputs[:2])))
        for eager, other in zip(*results, strict=True):
            close(other, eager)


class Module(torch.nn.Module):
    def forward(self, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        return elattn.grouped_linear(x, weight, offsets)


def test_export_with_dynamic_shapes() -> None:
    rows = torch.export.Dim("rows", min=2)
    inputs = arguments([2, 0, 3], grad=False)
    exported = torch.export.export(Module(), inputs, dynamic_shapes=({0: rows}, None, None))
    other = (torch.randn(9, 7, dtype=torch.float64), inputs[1], ends([4, 5, 0]))
    assert torch.equal(exported.module()(*other), Module()(*other))


def test_torchscript_saved_and_loaded() -> None:
    def run(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        return torch.ops.elattn.grouped_linear(x, weight, offsets)

    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(run), buffer)
    buffer.seek(0)
    inputs = arguments([2, 0, 3])
    loaded = torch.jit.load(buffer)
    for _ in range(3):  # the interpreter specialises after its first runs
        y, expected = loaded(*inputs), elattn.grouped_linear(*inputs)
        assert torch.equal(y, expected)
        for found, gradient in zip(
            torch.autograd.grad(y.sum(), inputs[:2]), torch.autograd.grad(expected.sum(), inputs[:2]), strict=True
        ):
            assert torch.equal(found, gradient)


def test_autocast_casts_as_a_linear_layer() -> None:
    x, weight, offsets = arguments([4, 5], dtype=torch.float32)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        y, linear = elattn.grouped_linear(x, weight, offsets), F.linear(x, weight[0])
    assert y.dtype == linear.dtype == torch.bfloat16
    assert torch.equal(y, elattn.grouped_linear(x.bfloat16(), weight.bfloat16(), offsets))
    y.float().sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32


def test_forward_mode_is_refused() -> None:
    x, weight, offsets = arguments([2, 3], grad=False)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(RuntimeError, match="grouped_linear: forward-mode differentiation is not supported"):
            elattn.grouped_linear(dual, weight, offsets)


# Messages


def x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


SHAPES = [
    ({"x": x(2, 5, 3)}, "x must have shape (T, in) but has [2, 5, 3]"),
    ({"x": x(5, 3).long()}, "x must have dtype Float, Double, BFloat16 or Half but has Long"),
    ({"weight": x(4, 3)}, "weight must have shape (E, out, in) but has [4, 3]"),
    ({"weight": x(2, 4, 3).double()}, "weight has dtype Double but x has Float"),
    ({"weight": x(2, 4, 6)}, "weight has input size 6 but x has 3"),
    ({"offsets": ends([2, 3]).long()}, "offsets must have dtype Int but has Long"),
    ({"offsets": ends([2, 3])[None]}, "offsets must have shape (E,) but has [1, 2]"),
    ({"offsets": ends([2, 2, 1])}, "offsets has 3 groups but weight has 2"),
]
VALUES = [
    ([2, 4], "offsets must end at the number of rows, 5, but ends at 4"),
    ([2, 6], "offsets must end at the number of rows, 5, but ends at 6"),
    ([6, 5], "offsets must not decrease, starting from 0, but offsets[1] is 5 after 6"),
    ([-1, 5], "offsets must not decrease, starting from 0, but offsets[0] is -1 after 0"),
]


def call(**changes: Any) -> Tensor:
    return elattn.grouped_linear(**({"x": x(5, 3), "weight": x(2, 4, 3), "offsets": ends([2, 3])} | changes))


@pytest.mark.parametrize(("changes", "message"), SHAPES, ids=[message for _, message in SHAPES])
def test_messages_about_shapes(changes: dict[str, Tensor], message: str) -> None:
    pattern = "elattn::grouped_linear: " + re.escape(message)
    with pytest.raises(RuntimeError, match=pattern):
        call(**changes)
    good = {"x": x(5, 3), "weight": x(2, 4, 3), "offsets": ends([2, 3])}
    with pytest.raises(RuntimeError, match=pattern):
        call(**{name: tensor.to("meta") for name, tensor in (good | changes).items()})


@CPU_CONTRACT
@pytest.mark.parametrize(("values", "message"), VALUES, ids=[message for _, message in VALUES])
def test_messages_about_offsets(values: list[int], message: str) -> None:
    offsets = torch.tensor(values, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="elattn::grouped_linear: " + re.escape(message)):
        call(offsets=offsets)
    with pytest.raises(RuntimeError, match="elattn::_grouped_outer: " + re.escape(message)):
        ops._grouped_outer(x(5, 4), x(5, 3), offsets)


@CPU_CONTRACT
def test_messages_about_no_groups_and_devices() -> None:
    empty = torch.zeros(0, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="offsets must end at the number of rows, 5, but ends at 0"):
        call(weight=x(0, 4, 3), offsets=empty)
    for name in ("weight", "offsets"):
        other = {"weight": x(2, 4, 3), "offsets": ends([2, 3])}[name].to("meta")
        with pytest.raises(RuntimeError, match=f"elattn::grouped_linear: {name} is on meta but x is on cpu"):
            call(**{name: other})


def test_messages_of_the_gradient() -> None:
    for arguments_of_outer, message in [
        ((x(5), x(5, 3), ends([2, 3])), r"grad_out must have shape \(T, out\) but has \[5\]"),
        ((x(5, 4), x(5, 3, 1), ends([2, 3])), r"x must have shape \(T, in\) but has \[5, 3, 1\]"),
        ((x(5, 4), x(5, 3).double(), ends([2, 3])), "x has dtype Double but grad_out has Float"),
        ((x(4, 4), x(5, 3), ends([2, 3])), "grad_out has 4 rows but x has 5"),
        ((x(5, 4), x(5, 3), ends([2, 3]).long()), "offsets must have dtype Int but has Long"),
    ]:
        for device in ("cpu", "meta"):
            with pytest.raises(RuntimeError, match="elattn::_grouped_outer: " + message):
                ops._grouped_outer(*(tensor.to(device) for tensor in arguments_of_outer))
