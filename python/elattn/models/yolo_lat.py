"""The paper's detector (section 7; docs/detection.md)."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from elattn.models.boxes import decode_boxes, suppress

__all__ = ["YoloLat"]

_VARIANTS = ("lat_n", "lat_dw")
_NECKS = ("linear", "softmax", "none")
_STRIDE = 16
_WIDTH = 128  # channels of the last stage
_NECK_WIDTH = 64
_HEADS = 4


class YoloLat(nn.Module):
    """A one-stage detector of stride 16 whose neck is exact linear attention over all cells of the picture.

    A cell predicts 5 + num_classes numbers: logarithms of the distances from its centre to the left, top, right and
    bottom side of a box, in strides; the logit of objectness; the logits of the classes.

    Args:
        num_classes: C.
        variant: "lat_n", dense 3x3 convolutions and a 1x1 head (316,438 parameters at one class), or "lat_dw",
            depthwise-separable ones and a 3x3 head (212,710).
        neck: "linear", bidirectional hadamard_exp attention; "softmax", scaled_dot_product_attention on the same
            weights, for comparison; "none", no neck.
        position: size of a depthwise convolution that is added to the values of the attention, which itself does not
            know where a cell lies; 0 for none, as published.

    Raises:
        ValueError: an option breaks a rule; the message has the rule and the value met.
    """

    stride: int

    def __init__(self, num_classes: int, *, variant: str = "lat_n", neck: str = "linear", position: int = 0) -> None:
        super().__init__()
        _require(num_classes >= 1, f"num_classes must be at least 1 (got {num_classes})")
        _require(variant in _VARIANTS, f"variant must be one of {', '.join(_VARIANTS)} (got {variant!r})")
        _require(neck in _NECKS, f"neck must be one of {', '.join(_NECKS)} (got {neck!r})")
        _require(position == 0 or position % 2 == 1, f"position must be 0 or an odd size (got {position})")
        self.num_classes, self.variant, self.neck_kind, self.position = num_classes, variant, neck, position
        self.stride = _STRIDE
        outputs = 5 + num_classes
        if variant == "lat_n":
            self.backbone = nn.Sequential(
                _conv(3, 16, stride=2),
                _conv(16, 32, stride=2),
                _conv(32, 64, stride=2),
                _conv(64, 64),
                _conv(64, _WIDTH, stride=2),
                _conv(_WIDTH, _WIDTH),
            )
            self.head = nn.Sequential(nn.Conv2d(_WIDTH, outputs, 1))
        else:
            self.backbone = nn.Sequential(
                _conv(3, 16, stride=2, activation=nn.SiLU),
                _separable(16, 32, stride=2),
                _separable(32, 64, stride=2),
                _separable(64, _WIDTH, stride=2),
                _separable(_WIDTH, _WIDTH),
            )
            self.head = nn.Sequential(_conv(_WIDTH, _WIDTH, activation=nn.SiLU), nn.Conv2d(_WIDTH, outputs, 1))
        self.neck = _NoNeck() if neck == "none" else _Neck(neck == "softmax", position)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values: boxes of four strides, and one cell in a hundred with an object."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        output = self.head[-1]
        nn.init.normal_(output.weight, std=0.01)
        with torch.no_grad():
            output.bias[:4] = 0.7
            output.bias[4:] = -4.6

    def forward(self, images: Tensor) -> Tensor:
        """Raw predictions (B, 5 + C, H / 16, W / 16) for images (B, 3, H, W) with values from 0 to 1.

        H and W are multiples of 16.
        """
        if images.dim() != 4 or images.size(1) != 3 or images.size(2) % 16 != 0 or images.size(3) % 16 != 0:
            raise ValueError(
                f"YoloLat: images must be (B, 3, H, W), H and W multiples of 16 (got {list(images.shape)})"
            )
        return self.head(self.neck(self.backbone(images)))

    @torch.jit.export
    def forward_packed(self, images: list[Tensor]) -> list[Tensor]:
        """Raw predictions (5 + C, H / 16, W / 16) for each of several images (3, H, W) of different sizes.

        The neck takes all of them at once, one after the other (cu_seqlens), so none is padded. For evaluation: in
        training, normalisation would be that of each image by itself.
        """
        features = [self.backbone(image[None]) for image in images]
        sizes = [(int(x.size(2)), int(x.size(3))) for x in features]
        # (1, 128, cells of all images, 1)
        cells = self.neck(torch.cat([x.flatten(2) for x in features], 2)[..., None], sizes)
        parts = cells.split([height * width for height, width in sizes], 2)
        return [self.head(x.view(1, -1, sizes[i][0], sizes[i][1]))[0] for i, x in enumerate(parts)]

    @torch.jit.export
    def decode(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (B, N, 4) as left, top, right, bottom in pixels, and scores (B, N, C), of the N = H W / 256 cells.

        A score is the geometric mean of the probabilities of an object and of the class.
        """
        logits = raw[:, 4:].flatten(2).transpose(1, 2)
        scores = (logits[..., :1].sigmoid() * logits[..., 1:].sigmoid()).sqrt()
        return decode_boxes(raw[:, :4], self.stride), scores

    @torch.jit.export
    def detect(
        self, images: Tensor, confidence: float = 0.25, iou: float = 0.5, limit: int = 100
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Boxes (n, 4), scores (n,) and labels (n,) of each picture, best first.

        Args:
            images: as for `forward`.
            confidence: smallest score.
            iou: a box that overlaps a better one of its class by more is left out.
            limit: largest n.
        """
        return self.select(self.forward(images), confidence, iou, limit)

    @torch.jit.export
    def select(self, raw: Tensor, confidence: float, iou: float, limit: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """What `detect` returns, from raw predictions."""
        boxes, scores = self.decode(raw)
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for i in range(raw.size(0)):
            found.append(suppress(boxes[i], scores[i], confidence, iou, limit))
        return found

    def fuse(self) -> "YoloLat":
        """A copy for inference, equal up to rounding, with fewer operations.

        Normalisations go into the convolutions before them. The neck is linear but for its attention, so its other
        products collapse into one before and one after the attention, and a 1x1 head goes into these. Weights are
        channels last, in which q, k and v are rows as the attention reads them.
        """
        model = copy.deepcopy(self).eval()
        model.backbone = _fuse_batch_norms(model.backbone)
        model.head = _fuse_batch_norms(model.head)
        if isinstance(model.neck, _Neck):
            model.neck = model.neck.fuse()
            if len(model.head) == 1:
                model.neck.append(model.head[0])
                model.head = nn.Sequential()
        return model.to(self.head[-1].weight, memory_format=torch.channels_last).requires_grad_(False)


class _NoNeck(nn.Module):
    """What takes the place of `_Neck` in a model without one."""

    def forward(self, x: Tensor, sizes: list[tuple[int, int]] | None = None) -> Tensor:
        return x


class _Neck(nn.Module):
    """x + BN(W_3 BN(u + W_2 attention(W_qkv u))) with u = BN(W_1 x), on (B, 128, H, W).

    With `sizes` (H, W) of several images, x is (1, 128, cells of all images, 1).
    """

    def __init__(self, softmax: bool, position: int) -> None:
        super().__init__()
        self.reduce = _conv(_WIDTH, _NECK_WIDTH, size=1, activation=None)
        self.qkv = nn.Conv2d(_NECK_WIDTH, 3 * _NECK_WIDTH, 1, bias=False)
        self.mix = _Mix(softmax, position)
        self.proj = nn.Conv2d(_NECK_WIDTH, _NECK_WIDTH, 1, bias=False)
        self.norm = nn.BatchNorm2d(_NECK_WIDTH)
        self.expand = _conv(_NECK_WIDTH, _WIDTH, size=1, activation=None)

    def forward(self, x: Tensor, sizes: list[tuple[int, int]] | None = None) -> Tensor:
        u = self.reduce(x)
        u = self.norm(u + self.proj(self.mix(self.qkv(u), sizes)))
        return x + self.expand(u)

    def fuse(self) -> "_FusedNeck":
        reduce, expand = _matrix(_fuse_batch_norms(self.reduce)[0]), _matrix(_fuse_batch_norms(self.expand)[0])
        scale = self.norm.weight.double() / (self.norm.running_var.double() + self.norm.eps).sqrt()
        shift = self.norm.bias.double() - self.norm.running_mean.double() * scale
        norm = (torch.diag(scale), shift)
        weight, bias = _after(expand, _after(norm, reduce))
        return _FusedNeck(
            qkv=_after(_matrix(self.qkv), reduce),
            direct=(weight + torch.eye(_WIDTH, device=weight.device), bias),
            attended=expand[0] @ norm[0] @ _matrix(self.proj)[0],
            mix=self.mix,
        )


class _Mix(nn.Module):
    """Attention of every cell to all cells: (B, 192, H, W), which are q, k and v of four heads, to (B, 64, H, W)."""

    def __init__(self, softmax: bool, position: int) -> None:
        super().__init__()
        self.softmax, self.heads = softmax, _HEADS
        self.position: nn.Conv2d | None = None
        if position:
            self.position = nn.Conv2d(
                _NECK_WIDTH, _NECK_WIDTH, position, padding=position // 2, groups=_NECK_WIDTH, bias=False
            )

    @torch.jit.export
    def split(self, qkv: Tensor) -> list[Tensor]:
        """q, k and v, each (B, heads, H W, head_dim)."""
        return qkv.flatten(2).unflatten(1, (3, self.heads, -1)).transpose(3, 4).unbind(1)

    def forward(self, qkv: Tensor, sizes: list[tuple[int, int]] | None = None) -> Tensor:
        q, k, v = self.split(qkv)
        if not self.softmax:
            y = torch.ops.elattn.attention(
                q, k, v, kernel="hadamard_exp", scale=q.size(3) ** -0.5, cu_seqlens=_bounds(sizes, q.device)
            )
        elif sizes is None:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            counts = [height * width for height, width in sizes]
            qs, ks, vs = q.split(counts, 2), k.split(counts, 2), v.split(counts, 2)
            y = torch.cat([F.scaled_dot_product_attention(qs[i], ks[i], vs[i]) for i in range(len(counts))], 2)
        out = y.transpose(2, 3).reshape(qkv.size(0), -1, qkv.size(2), qkv.size(3))
        if self.position is not None:
            values = qkv[:, -out.size(1) :]
            if sizes is None:
                out = out + self.position(values)
            else:
                parts = values.split([height * width for height, width in sizes], 2)
                placed = [
                    self.position(x.view(1, -1, sizes[i][0], sizes[i][1])).flatten(2) for i, x in enumerate(parts)
                ]
                out = out + torch.cat(placed, 2)[..., None]
        return out


class _FusedNeck(nn.Module):
    """`_Neck` with its products collapsed: direct x + attended attention(qkv x), where each is a 1x1 convolution.

    Args:
        qkv, direct: matrix and bias of an affine map from 128 channels.
        attended: matrix from 64 channels.
    """

    def __init__(self, qkv: tuple[Tensor, Tensor], direct: tuple[Tensor, Tensor], attended: Tensor, mix: _Mix) -> None:
        super().__init__()
        self.qkv, self.direct, self.attended = _pointwise(*qkv), _pointwise(*direct), _pointwise(attended, None)
        self.mix = mix

    def append(self, conv: nn.Conv2d) -> None:
        """Puts a 1x1 convolution of the output into the neck."""
        weight, bias = _matrix(conv)
        self.direct = _pointwise(*_after((weight, bias), _matrix(self.direct)))
        self.attended = _pointwise(weight @ _matrix(self.attended)[0], None)

    def forward(self, x: Tensor, sizes: list[tuple[int, int]] | None = None) -> Tensor:
        return self.direct(x) + self.attended(self.mix(self.qkv(x), sizes))


def _conv(
    inputs: int,
    outputs: int,
    *,
    size: int = 3,
    stride: int = 1,
    groups: int = 1,
    activation: type[nn.Module] | None = nn.ReLU,
) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False)
    layers = [conv, nn.BatchNorm2d(outputs)]
    if activation is not None:
        layers.append(activation(inplace=True))
    return nn.Sequential(*layers)


def _separable(inputs: int, outputs: int, *, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        _conv(inputs, inputs, stride=stride, groups=inputs, activation=nn.SiLU),
        _conv(inputs, outputs, size=1, activation=nn.SiLU),
    )


def _fuse_batch_norms(module: nn.Module) -> nn.Module:
    """A copy, in eval mode, whose normalisations after convolutions are part of these."""
    if not isinstance(module, nn.Sequential):
        return module
    layers: list[nn.Module] = []
    for layer in module:
        if isinstance(layer, nn.BatchNorm2d):
            layers[-1] = fuse_conv_bn_eval(layers[-1].eval(), layer.eval())
        else:
            layers.append(_fuse_batch_norms(layer))
    return nn.Sequential(*layers)


def _bounds(sizes: list[tuple[int, int]] | None, device: torch.device) -> Tensor | None:
    """cu_seqlens of the cells of several images."""
    if sizes is None:
        return None
    counts = torch.tensor([0] + [height * width for height, width in sizes])
    return counts.cumsum(0).to(device)


def _matrix(conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Matrix and bias of a 1x1 convolution, in float64."""
    weight = conv.weight.detach().double().flatten(1)
    bias = weight.new_zeros(weight.size(0)) if conv.bias is None else conv.bias.detach().double()
    return weight, bias


def _after(second: tuple[Tensor, Tensor], first: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The affine map `second` of `first`."""
    return second[0] @ first[0], second[0] @ first[1] + second[1]


def _pointwise(weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    conv = nn.Conv2d(weight.size(1), weight.size(0), 1, bias=bias is not None, device=weight.device)
    with torch.no_grad():
        conv.weight.copy_(weight[..., None, None])
        if bias is not None:
            conv.bias.copy_(bias)
    return conv


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"YoloLat: {message}")
