"""The detector's model: the published sizes, boxes, suppression, fused and scripted forms."""

import math

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from elattn.models import YoloLat
from elattn.models.boxes import box_iou, cell_centres, decode_boxes, encode_boxes, suppress


def trained(num_classes: int = 3, **options: object) -> YoloLat:
    """A model whose normalisations have something to do."""
    torch.manual_seed(0)
    model = YoloLat(num_classes, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    return model.eval()


def random_boxes(count: int, generator: torch.Generator) -> Tensor:
    corner = torch.rand(count, 2, generator=generator) * 200
    return torch.cat((corner, corner + 10 + torch.rand(count, 2, generator=generator) * 90), 1)


@pytest.mark.parametrize(
    ("num_classes", "variant", "count"), [(1, "lat_n", 316_438), (80, "lat_n", 326_629), (1, "lat_dw", 212_710)]
)
def test_has_the_published_number_of_parameters(num_classes: int, variant: str, count: int) -> None:
    model = YoloLat(num_classes, variant=variant)
    assert sum(p.numel() for p in model.parameters()) == count
    softmax = YoloLat(num_classes, variant=variant, neck="softmax")
    assert {n: p.shape for n, p in softmax.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("variant", "neck", "position"),
    [("lat_n", "linear", 0), ("lat_n", "none", 0), ("lat_dw", "softmax", 0), ("lat_dw", "linear", 3)],
)
def test_fused_and_scripted_forms_agree(variant: str, neck: str, position: int) -> None:
    model = trained(variant=variant, neck=neck, position=position)
    images = torch.rand(2, 3, 64, 96)
    with torch.inference_mode():
        expected, fused = model(images), model.fuse()
        torch.testing.assert_close(fused(images), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        scripted = torch.jit.script(fused)
        assert torch.equal(scripted(images), fused(images))
        for found, wanted in zip(scripted.detect(images, 0.0), fused.detect(images, 0.0), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_fusing_leaves_the_model_as_it_is() -> None:
    model = trained().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.fuse()
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("variant", ["lat_n", "lat_dw"])
def test_fusing_keeps_device_and_dtype(variant: str) -> None:
    fused = YoloLat(3, variant=variant).to("meta", torch.bfloat16).fuse()
    assert {(p.device.type, p.dtype) for p in fused.parameters()} == {("meta", torch.bfloat16)}


def test_every_cell_sees_the_whole_picture() -> None:
    """Further than the convolutions reach."""
    images = torch.rand(1, 3, 16, 640)
    for neck, sees in (("linear", True), ("softmax", True), ("none", False)):
        model = trained(neck=neck)
        with torch.inference_mode():
            before = model(images)[..., 0]
            images[..., -16:] = 1 - images[..., -16:]
            assert torch.equal(before, model(images)[..., 0]) != sees


@pytest.mark.parametrize(
    ("variant", "neck", "position"),
    [("lat_n", "linear", 0), ("lat_n", "none", 0), ("lat_n", "softmax", 3), ("lat_dw", "linear", 3)],
)
def test_images_of_different_sizes_are_packed(variant: str, neck: str, position: int) -> None:
    model = trained(variant=variant, neck=neck, position=position)
    images = [torch.rand(3, height, width) for height, width in ((64, 96), (16, 16), (112, 48))]
    scripted = torch.jit.script(model.fuse())
    with torch.inference_mode():
        for packed in (
            model.forward_packed(images),
            model.fuse().forward_packed(images),
            scripted.forward_packed(images),
        ):
            for image, raw in zip(images, packed, strict=True):
                expected = model(image[None])[0]
                torch.testing.assert_close(raw, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_a_picture_is_detected_alike_alone_and_in_a_batch() -> None:
    model, images = trained().fuse(), torch.rand(3, 3, 64, 64)
    together = model.detect(images, 0.0)
    for i, (boxes, scores, labels) in enumerate(together):
        alone = model.detect(images[i : i + 1], 0.0)[0]
        torch.testing.assert_close(alone, (boxes, scores, labels), rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", [4, 16, 33, 160, 320])
def test_what_is_encoded_is_decoded(size: int) -> None:
    centres = cell_centres(20, 20, 16, torch.device("cpu"))
    centre = centres[210]
    box = torch.cat((centre - size * 0.3, centre + size * 0.7))
    inside = ((centres > box[:2]) & (centres < box[2:])).all(1)
    raw = torch.zeros(1, 400, 4)
    raw[0, inside] = encode_boxes(box.expand(int(inside.sum()), 4), centres[inside], 16)
    decoded = decode_boxes(raw.transpose(1, 2).view(1, 4, 20, 20), 16)[0, inside]
    # A side nearer to a centre than exp(-6) strides moves there.
    torch.testing.assert_close(decoded, box.expand_as(decoded), rtol=0, atol=16 * math.exp(-6) + 1e-4)
    assert (decoded - box).abs().min(0).values.max() < 1e-4


def test_scores_are_geometric_means() -> None:
    raw = torch.randn(2, 5 + 3, 2, 3)
    boxes, scores = trained().decode(raw)
    assert boxes.shape == (2, 6, 4) and scores.shape == (2, 6, 3)
    expected = (raw[1, 4, 1, 2].sigmoid() * raw[1, 7, 1, 2].sigmoid()).sqrt()
    torch.testing.assert_close(scores[1, 5, 2], expected)


def test_overlaps_agree_with_torchvision() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = random_boxes(20, generator), random_boxes(30, generator)
    torch.testing.assert_close(box_iou(a, b), torchvision.ops.box_iou(a, b))
    assert torch.equal(box_iou(torch.ones(1, 4), torch.ones(1, 4)), torch.zeros(1, 1))


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(1, 200), st.integers(1, 4), st.floats(0.1, 0.9))
def test_suppression_is_that_of_torchvision(seed: int, count: int, classes: int, iou: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    boxes, scores = random_boxes(count, generator), torch.rand(count, classes, generator=generator)
    flat = scores.flatten()
    kept = torchvision.ops.batched_nms(
        boxes.repeat_interleave(classes, 0), flat, torch.arange(count * classes) % classes, iou
    )
    kept = kept[flat[kept] >= 0.3][:100]
    found = suppress(boxes, scores, 0.3, iou, 100, candidates=1000)
    expected = (boxes[kept // classes], flat[kept], kept % classes)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_suppression_looks_at_the_best_candidates_only() -> None:
    boxes = torch.arange(10.0)[:, None] * 100 + torch.tensor([0.0, 0, 10, 10])
    _, scores, _ = suppress(boxes, torch.linspace(0, 1, 10)[:, None], 0.0, 0.5, 100, candidates=4)
    assert torch.equal(scores, torch.linspace(0, 1, 10).flip(0)[:4])
    found, _, _ = suppress(boxes, torch.full((10, 1), 0.5), 0.0, 0.5, 100, candidates=4)
    assert torch.equal(found, boxes[:4])  # of equals the first


def test_nothing_is_found_in_nothing() -> None:
    boxes, scores, labels = suppress(torch.rand(5, 4), torch.zeros(5, 2), 0.5, 0.5, 100)
    assert boxes.shape == (0, 4) and scores.shape == (0,) and labels.shape == (0,) and labels.dtype == torch.int64


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_boxes_stay_finite(value: float) -> None:
    boxes = decode_boxes(torch.full((1, 4, 2, 2), value), 16)
    assert math.isnan(value) or boxes.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0,), {}, "num_classes must be at least 1 (got 0)"),
        ((1,), {"variant": "lat_x"}, "variant must be one of lat_n, lat_dw (got 'lat_x')"),
        ((1,), {"neck": "x"}, "neck must be one of linear, softmax, none (got 'x')"),
        ((1,), {"position": 2}, "position must be 0 or an odd size (got 2)"),
    ],
)
def test_refuses_wrong_options(arguments: tuple[int], options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match="YoloLat: ") as error:
        YoloLat(*arguments, **options)
    assert str(error.value) == f"YoloLat: {message}"


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64), (1, 3, 60, 64)])
def test_refuses_other_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        trained()(torch.zeros(shape))
