"""MoE against a dense float64 reference for every option; its loss, its report, and what it is used in."""

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from elattn.nn import MoE, MoEReport, SwiGLU

pytestmark = pytest.mark.usefixtures("one_thread")

BIASES = [("outer", True), ("outer", False), ("inner", True), ("inner", False), ("none", True)]
EVERY_BIAS = pytest.mark.parametrize(("bias_mode", "tie_labels"), BIASES, ids=lambda v: str(v))
EVERY_K = pytest.mark.parametrize("top_k", [1, 2, 3, 4])


def module(top_k: int = 2, dtype: torch.dtype = torch.float64, num_experts: int = 4, **options: Any) -> MoE:
    """Labels large enough for the experts to be of different strength."""
    moe = MoE(12, 10, num_experts, top_k=top_k, **options)
    with torch.no_grad():
        moe.labels.copy_(0.5 * torch.randn_like(moe.labels))
        for parameter in moe.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return moe.to(dtype)


def reference(moe: MoE, x: Tensor) -> tuple[Tensor, Tensor]:
    """The formulas of docs/moe.md, every expert on every token."""
    tokens, k, num_experts = x.reshape(-1, moe.d_model), moe.top_k, moe.num_experts
    scores = torch.softmax(tokens @ moe.labels.T + moe.router_bias, -1)
    chosen = torch.zeros_like(scores).scatter(1, scores.topk(k).indices, 1.0)
    weights = scores * chosen / (scores * chosen).sum(-1, keepdim=True)
    gate, up = torch.einsum("td,ehd->teh", tokens, moe.gate_up).chunk(2, -1)
    y = torch.einsum("teh,edh->ted", F.silu(gate) * up, moe.down)
    bias = moe.labels if moe.tie_labels else moe.expert_bias
    if moe.bias_mode == "outer":
        y = torch.einsum("te,ted->td", weights, y) + chosen @ bias
    elif moe.bias_mode == "inner":
        y = torch.einsum("te,ted->td", weights, y + bias)
    else:
        y = torch.einsum("te,ted->td", weights, y)
    f = chosen.sum(0) / chosen.sum()
    return y.view(x.shape), num_experts * (f * scores.mean(0)).sum()


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@EVERY_BIAS
@EVERY_K
def test_outputs_loss_and_gradients_are_those_of_the_formula(bias_mode: str, tie_labels: bool, top_k: int) -> None:
    moe = module(top_k, bias_mode=bias_mode, tie_labels=tie_labels)
    x = torch.randn(2, 9, 12, dtype=torch.float64, requires_grad=True)
    g, parameters = torch.randn_like(x), list(moe.parameters())
    results = []
    for fn in (moe, lambda x: reference(moe, x)):
        y, aux = fn(x)
        loss = (y * g).sum() + 3 * aux
        results.append((y, aux, *torch.autograd.grad(loss, (x, *parameters), allow_unused=True)))
    names = ["y", "aux", "x", *(name for name, _ in moe.named_parameters())]
    for name, actual, expected in zip(names, *results, strict=True):
        assert actual is not None, name
        close(actual, expected)


def test_gradcheck() -> None:
    moe, x = module(), torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    names, values = zip(*moe.named_parameters(), strict=True)
    # Far from ties, so that a small step does not change who is chosen.
    assert moe.explain(x).scores.sort().values.diff(dim=-1).min() > 1e-3

    def fn(x: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.functional_call(moe, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(fn, (x, *(v.detach().requires_grad_() for v in values)))


def test_sizes_of_the_papers_layer() -> None:
    def count(**options: Any) -> dict[str, int]:
        return {name: p.numel() for name, p in MoE(256, 256, 4, **options).named_parameters()}

    tied = count()
    assert tied == {"labels": 1024, "router_bias": 4, "gate_up": 524_288, "down": 262_144}
    for bias_mode in ("outer", "inner", "none"):
        assert count(bias_mode=bias_mode) == tied
    assert count(tie_labels=False) == tied | {"expert_bias": 1024}


@pytest.mark.parametrize("shape", [(12,), (1, 12), (0, 12), (2, 0, 12), (2, 3, 5, 12)], ids=str)
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    moe, x = module(), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y, aux = moe(x)
    assert y.shape == x.shape and aux.shape == ()
    if x.numel():
        expected, expected_aux = reference(moe, x)
        close(y, expected)
        close(aux, expected_aux)
    else:
        assert aux == 0
    (y.sum() + aux).backward()
    for parameter in (x, *moe.parameters()):
        assert torch.isfinite(parameter.grad).all()
    strided = x.detach().unsqueeze(-1).expand(*shape, 2)[..., 0]
    close(moe(strided)[0], y)


def test_one_expert_is_a_feed_forward_network() -> None:
    moe, dense = module(1, num_experts=1, bias_mode="none"), SwiGLU(12, 10).double()
    with torch.no_grad():
        dense.gate_up.weight.copy_(moe.gate_up[0])
        dense.down.weight.copy_(moe.down[0])
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    y, aux = moe(x)
    close(y, dense(x))
    close(aux, torch.ones_like(aux))


def test_step_is_forward() -> None:
    for bias_mode, tie_labels in BIASES:
        moe, x = module(bias_mode=bias_mode, tie_labels=tie_labels), torch.randn(3, 12, dtype=torch.float64)
        y = moe.step(x)
        assert not y.requires_grad
        close(y, moe(x)[0])
        close(moe.step(x[1]), y[1])


def test_tokens_do_not_meet() -> None:
    """A permutation of the tokens permutes the outputs; other tokens of a batch change nothing."""
    moe, x = module(), torch.randn(2, 7, 12, dtype=torch.float64)
    y, aux = moe(x)
    order = torch.randperm(14)
    shuffled, same_aux = moe(x.view(14, 12)[order])
    close(shuffled, y.view(14, 12)[order])
    close(same_aux, aux)
    close(moe(x[:1])[0], y[:1])
    for t in range(7):
        close(moe(x[1, t])[0], y[1, t])


def test_what_the_router_learns_from() -> None:
    x = torch.randn(50, 12, dtype=torch.float64)

    def router_gradient(aux_coef: float, **options: Any) -> Tensor:
        moe = module(**options)
        y, aux = moe(x)
        (y.square().sum() + aux_coef * aux).backward()
        return moe.router_bias.grad

    assert router_gradient(0.0, top_k=2).abs().max() > 1e-3
    # The weight of a single expert is 1, whatever its score.
    assert router_gradient(0.0, top_k=1, bias_mode="none").abs().max() == 0
    assert router_gradient(1.0, top_k=1, bias_mode="none").abs().max() > 1e-3
    # With all experts chosen the load is even, and the scores sum to 1: nothing to balance.
    moe = module(4)
    (gradient,) = torch.autograd.grad(moe(x)[1], moe.router_bias)
    assert gradient.abs().max() < 1e-12


def test_the_loss_is_1_when_even_and_num_experts_when_one_takes_all() -> None:
    moe, x = module(1), torch.randn(40, 12, dtype=torch.float64)
    with torch.no_grad():
        moe.labels.zero_()
        moe.router_bias.copy_(torch.tensor([100.0, 0.0, 0.0, 0.0]))
        close(moe(x)[1], torch.tensor(4.0, dtype=torch.float64))
        moe.router_bias.zero_()
        close(moe(x)[1], torch.tensor(1.0, dtype=torch.float64))


def test_the_loss_lowers_the_load_of_a_crowded_expert() -> None:
    moe, x = module(1), torch.randn(200, 12, dtype=torch.float64)
    with torch.no_grad():
        moe.router_bias[2] += 2
    before = moe.explain(x).load[2]
    optimizer = torch.optim.SGD([moe.router_bias], lr=1.0)
    for _ in range(20):
        optimizer.zero_grad()
        moe(x)[1].backward()
        optimizer.step()
    assert moe.explain(x).load[2] < 0.8 * before


def test_huge_logits_give_no_nan() -> None:
    moe, x = module(), 1e4 * torch.randn(9, 12, dtype=torch.float64)
    y, aux = moe(x)
    (y.sum() + aux).backward()
    assert torch.isfinite(y).all() and torch.isfinite(aux)
    for parameter in moe.parameters():
        assert torch.isfinite(parameter.grad).all()


def test_equal_calls_give_equal_results() -> None:
    moe, x = module(dtype=torch.float32), torch.randn(33, 12)
    runs = []
    for _ in range(2):
        y, aux = moe(x)
        runs.append((y, aux, *torch.autograd.grad(y.square().sum() + aux, list(moe.parameters()))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# What a module is used in


@EVERY_BIAS
def test_torchscript(bias_mode: str, tie_labels: bool) -> None:
    moe = module(bias_mode=bias_mode, tie_labels=tie_labels)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(moe), buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    for _ in range(3):  # the interpreter specialises after its first runs
        x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
        results = []
        for fn in (moe, loaded):
            y, aux = fn(x)
            results.append((y, aux, *torch.autograd.grad(y.square().sum() + aux, x)))
        for actual, expected in zip(*results, strict=True):
            close(actual, expected)
        close(loaded.step(x[0]), moe.step(x[0]))


def test_compile() -> None:
    torch.compiler.reset()
    moe = module(dtype=torch.float32)
    # Without code generation: it takes a minute and says nothing about the module.
    compiled = torch.compile(moe, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (7, 12):
        x = torch.randn(2, length, 12, requires_grad=True)
        results = []
        for fn in (moe, compiled):
            y, aux = fn(x)
            results.append((y, aux, *torch.autograd.grad(y.square().sum() + aux, (x, *moe.parameters()))))
        for expected, actual in zip(*results, strict=True):
            close(actual, expected, 1e-5)


@EVERY_BIAS
def test_export(bias_mode: str, tie_labels: bool) -> None:
    moe, length = module(bias_mode=bias_mode, tie_labels=tie_labels), torch.export.Dim("length", min=2)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    exported = torch.export.export(moe, (x,), dynamic_shapes=({1: length},))
    x = torch.randn(2, 13, 12, dtype=torch.float64)
    for actual, expected in zip(exported.module()(x), moe(x), strict=True):
        close(actual, expected)


@EVERY_BIAS
def test_autocast_and_bfloat16(bias_mode: str, tie_labels: bool) -> None:
    moe = module(dtype=torch.float32, bias_mode=bias_mode, tie_labels=tie_labels)
    x = torch.randn(64, 12, requires_grad=True)
    with torch.no_grad():
        # Labels that bfloat16 holds exactly, and tokens far from ties, so that all dtypes choose the same experts.
        moe.labels.copy_(moe.labels.bfloat16())
        scores = moe.explain(x).scores.log().sort(-1).values
        sure = scores[:, -2] - scores[:, -3] > 0.1
    expected, expected_aux = moe(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, aux = moe(x)
        stepped, report = moe.step(x), moe.explain(x)
    assert y.dtype == stepped.dtype == torch.bfloat16
    assert aux.dtype == report.scores.dtype == report.weights.dtype == torch.float32
    (y.float().sum() + aux).backward()
    assert x.grad.dtype == moe.gate_up.grad.dtype == torch.float32
    low, low_aux = copy.deepcopy(moe).bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16 and low_aux.dtype == torch.float32
    assert sure.sum() > 32
    for other in (y, stepped, low):
        close(other[sure].float(), expected[sure], 0.05)
    for other in (aux, low_aux):
        close(other, expected_aux, 0.05)


# The report


def test_report() -> None:
    moe, x = module(), torch.randn(2, 9, 12, dtype=torch.float64, requires_grad=True)
    report = moe.explain(x)
    assert isinstance(report, MoEReport)
    assert report.experts.shape == report.weights.shape == (2, 9, 2)
    assert report.scores.shape == (2, 9, 4) and report.load.shape == (4,)
    scores = torch.softmax(x @ moe.labels.T + moe.router_bias, -1)
    top, experts = scores.topk(2)
    close(report.scores, scores)
    assert torch.equal(report.experts, experts)
    close(report.weights, top / top.sum(-1, keepdim=True))
    close(report.load, torch.bincount(experts.flatten(), minlength=4) / 36.0, 1e-6)
    assert not report.weights.requires_grad


def test_report_as_text() -> None:
    report = MoEReport(
        experts=torch.tensor([[[0, 2], [2, 0], [2, 1], [0, 2]]]),
        weights=torch.tensor([[[0.75, 0.25], [0.5, 0.5], [1.0, 0.0], [0.75, 0.25]]]),
        scores=torch.tensor([[[0.6, 0.1, 0.2, 0.1]] * 4]),
        load=torch.tensor([0.375, 0.125, 0.5, 0.0]),
    )
    assert str(report).splitlines() == [
        "MoE: top 2 of 4 experts for 4 tokens",
        "expert    load   first  mean weight  mean score",
        "     0   37.5%   50.0%        0.667       0.600",
        "     1   12.5%    0.0%        0.000       0.100",
        "     2   50.0%   50.0%        0.500       0.200",
        "     3    0.0%    0.0%        0.000       0.100",
        "load-balance loss 1.350 (1 when even, 4 when one expert takes all)",
    ]
    assert "for 0 tokens" in str(module().explain(torch.zeros(2, 0, 12, dtype=torch.float64)))


def test_report_as_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    report = module().explain(torch.randn(2, 9, 12, dtype=torch.float64))
    tokens = [f"t{i}" for i in range(18)]
    figure = report.plot(tmp_path / "moe.png", tokens=tokens)
    assert (tmp_path / "moe.png").read_bytes().startswith(b"\x89PNG")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == tokens
    assert [label.get_text().split()[0] for label in axes.get_yticklabels()] == ["0", "1", "2", "3"]
    grid = axes.images[0].get_array()
    assert grid.shape == (4, 18)
    assert (~grid.mask).sum() == 36  # the chosen ones only
    close(torch.tensor(grid.sum(0).tolist()), torch.ones(18), 1e-6)

    given = Figure().subplots()
    assert report.plot(given) is given.figure
    assert isinstance(report.plot(), Figure)
    with pytest.raises(ValueError, match=r"MoEReport: tokens must name each of the 18 tokens \(got 3 names\)"):
        report.plot(tokens=["a", "b", "c"])


# Messages


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 5}, r"MoE: top_k must be 1..num_experts = 4 \(got 5\)"),
        ({"top_k": 0}, r"MoE: top_k must be 1..num_experts = 4 \(got 0\)"),
        ({"num_experts": 0}, r"MoE: num_experts must be positive \(got 0\)"),
        ({"d_model": 0}, r"MoE: d_model must be positive \(got 0\)"),
        ({"d_hidden": -1}, r"MoE: d_hidden must be positive \(got -1\)"),
        ({"bias_mode": "both"}, r"MoE: bias_mode must be one of outer, inner, none \(got 'both'\)"),
        (
            {"bias_mode": "none", "tie_labels": False},
            r'MoE: tie_labels=False needs bias_mode "outer" or "inner" \(got "none"\)',
        ),
    ],
    ids=str,
)
def test_options_that_break_a_rule(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoE(**({"d_model": 12, "d_hidden": 10, "num_experts": 4} | options))


def test_a_wrong_width_is_refused() -> None:
    moe, x = module(), torch.randn(2, 13, dtype=torch.float64)
    for call in (moe, moe.step, moe.explain):
        with pytest.raises(ValueError, match=r"MoE: x must have d_model = 12 channels \(got 13\)"):
            call(x)
