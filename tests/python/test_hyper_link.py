"""HyperLink: the sum it begins as, the weights and gates it learns, TorchScript, compile, gradients."""

import pytest
import torch
from torch import Tensor

from elattn.nn import HyperLink

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY_MODE = pytest.mark.parametrize("mode", ["sum", "residual", "dense", "gated"])


def deltas(count: int, *shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(*(shape or (2, 5, 8)), dtype=dtype) for _ in range(count)]


def perturbed(mode: str, num_layers: int = 4) -> HyperLink:
    link = HyperLink(num_layers, mode=mode, d_model=8).double()
    with torch.no_grad():
        for parameter in link.parameters():
            parameter.add_(torch.randn_like(parameter))
    return link


@EVERY_MODE
@pytest.mark.parametrize("shape", [(2, 5, 8), (3, 8)])
def test_it_begins_as_the_sum_bit_for_bit(mode: str, shape: tuple[int, ...]) -> None:
    link = HyperLink(4, mode=mode, d_model=8)
    for count in range(1, 6):
        terms = deltas(count, *shape, dtype=torch.float32)
        expected = terms[0]
        for term in terms[1:]:
            expected = expected + term
        assert torch.equal(link(terms), expected)


@pytest.mark.parametrize(("mode", "number"), [("sum", 0), ("residual", 0), ("dense", 14), ("gated", 14 + 4 * 9)])
def test_number_of_parameters(mode: str, number: int) -> None:
    """N (N + 3) / 2 weights for N = 4, and N (d_model + 1) of the gates: none that nothing depends on."""
    assert sum(p.numel() for p in HyperLink(4, mode=mode, d_model=8).parameters()) == number


@pytest.mark.parametrize("mode", ["dense", "gated"])
def test_weights_form_a_lower_triangle(mode: str) -> None:
    """x_n has weights of its own for delta_0 to delta_n, and every parameter counts for some n."""
    link, terms = perturbed(mode), deltas(5)
    gated = [terms[0]]
    for j in range(1, 5):
        gate = torch.ones(2, 5, 1, dtype=torch.float64)
        if mode == "gated":
            gate = 2 / (1 + torch.exp(-(terms[j] @ link.gate_weight[j - 1] + link.gate_bias[j - 1])))[..., None]
        gated.append(gate * terms[j])
    row = 0
    for n in range(1, 5):
        weights = link.weight[row : row + n + 1]
        row += n + 1
        expected = sum(w * x for w, x in zip(weights, gated[: n + 1], strict=True))
        torch.testing.assert_close(link(terms[: n + 1]), expected)
    assert row == link.weight.numel()
    assert torch.equal(link(terms[:1]), terms[0])


@pytest.mark.parametrize("mode", ["dense", "gated"])
def test_every_parameter_has_its_gradient(mode: str) -> None:
    link, terms = perturbed(mode, 3), deltas(4, 2, 8)

    def total(*parameters: Tensor) -> Tensor:
        named = dict(zip(dict(link.named_parameters()), parameters, strict=True))
        outputs = [torch.func.functional_call(link, named, (terms[: n + 1],)) for n in range(1, 4)]
        return sum((x * x).sum() for x in outputs)

    parameters = [p.detach().requires_grad_() for p in link.parameters()]
    assert torch.autograd.gradcheck(total, parameters)
    assert all(bool(g.all()) for g in torch.autograd.grad(total(*parameters), parameters))


@EVERY_MODE
def test_torchscript_and_compile(mode: str) -> None:
    link, terms = perturbed(mode), deltas(4)
    torch.testing.assert_close(torch.jit.script(link)(terms), link(terms))
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(link, fullgraph=True, backend="eager")(terms), link(terms))


def test_deltas_of_autocast_keep_the_embeddings_precision() -> None:
    terms = [torch.randn(2, 8), *(torch.randn(2, 8).bfloat16() for _ in range(3))]
    for mode in ("sum", "dense", "gated"):
        assert HyperLink(3, mode=mode, d_model=8)(terms).dtype == torch.float32


def test_refusals() -> None:
    for arguments, message in [
        ({"num_layers": 0}, r"num_layers must be positive \(got 0\)"),
        ({"num_layers": 2, "mode": "product"}, "mode must be one of sum, dense, gated, residual"),
        ({"num_layers": 2, "mode": "gated"}, "needs d_model"),
    ]:
        with pytest.raises(ValueError, match=f"HyperLink: .*{message}"):
            HyperLink(**arguments)
    for mode in ("sum", "dense"):
        for count in (0, 4):
            with pytest.raises(ValueError, match=rf"1 to num_layers \+ 1 = 3 deltas \(got {count}\)"):
                HyperLink(2, mode=mode)(deltas(count))
