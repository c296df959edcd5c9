"""A detector as a file that other programs run, without Python or without PyTorch (docs/detection.md)."""

import importlib.util
import json
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from elattn._files import replacing
from elattn.detect.detector import Detector
from elattn.errors import UserError
from elattn.models import YoloLat
from elattn.models.export import origin, write_torchscript

__all__ = ["export_detector_onnx", "export_detector_torchscript"]


def export_detector_torchscript(detector: Detector, path: str | Path) -> None:
    """Writes the model, fused and scripted, with `forward`, `decode`, `select` and `detect`; replaces `path` once
    complete.

    A program that loads it needs PyTorch's C++ library and libelattn.so, but no Python. Facts about the detector are
    texts in extra files (`_extra_files` of `torch.jit.load`): `classes.json`, a list of names; `size`, the side of the
    square that pictures are fitted into; `stride`; `elattn_version`; and `fingerprint`, a hash of configuration and
    weights.
    """
    write_torchscript(_for_inference(detector), path, _facts(detector))


def export_detector_onnx(detector: Detector, path: str | Path) -> None:
    """Writes the model as ONNX, in standard operators only; replaces `path` once complete.

    `images` (B, 3, H, W), float32 in 0..1, become `boxes` (B, N, 4) and `scores` (B, N, C) of all N = H W / 256 cells,
    those of `YoloLat.decode`: suppression is left to the program. B is free, and H and W are any multiples of 16. The
    facts that a TorchScript file holds are the metadata of the model, with the same names.

    Raises:
        UserError: a package is missing.
    """
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f'ONNX needs the package {package}: pip install "elattn[onnx]"')
    batch, rows, columns = (torch.export.Dim(name) for name in ("batch", "rows", "columns"))
    with replacing(path) as partial, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # PyTorch's, to itself
        program = torch.export.export(
            _Decoded(_for_inference(detector)),
            (torch.zeros(2, 3, 64, 96),),  # no side is 16, because one cell would be taken for a constant
            dynamic_shapes=({0: batch, 2: 16 * rows, 3: 16 * columns},),
        )
        program = program.run_decompositions({torch.ops.elattn.attention.default: standard_attention})
        model = torch.onnx.export(
            program,
            dynamo=True,
            input_names=["images"],
            output_names=["boxes", "scores"],
            dynamic_shapes=({0: "batch", 2: "height", 3: "width"},),  # their names in the file
            verbose=False,
        )
        model.model.metadata_props.update(_facts(detector))
        model.save(partial, external_data=False)


class _Decoded(nn.Module):
    def __init__(self, model: YoloLat) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.decode(self.model(images))


def standard_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float = 1.0) -> Tensor:
    """Bidirectional `hadamard_exp` attention (docs/math.md, section 1) in operators that every runtime has.

    y = softmax over channels of (q + ell), times U, where ell_d is the logarithm of the sum of exp(k_d) over all keys
    and U the averages of v with these weights. Both are softmax-like: maxima are subtracted. q + k is kept as two
    floats (1.2), and scale <= 1/2 keeps it finite.
    """
    q, k = q * scale, k * scale
    gauge = k.amax(2, keepdim=True)  # (B, H, 1, D)
    weights = (k - gauge).exp()
    total = weights.sum(2, keepdim=True)  # at least 1
    averages = (weights / total).transpose(2, 3) @ v  # (B, H, D, Dv)
    high = q + gauge
    part = high - q
    low = (q - (high - part)) + (gauge - part)
    exponents = (high - high.amax(3, keepdim=True)) + (low + total.log())
    return exponents.softmax(3) @ averages


def _for_inference(detector: Detector) -> YoloLat:
    return detector.model.fuse().cpu()


def _facts(detector: Detector) -> dict[str, str]:
    return {
        "classes.json": json.dumps(detector.classes, ensure_ascii=False),
        "size": str(detector.size),
        "stride": str(detector.model.stride),
    } | origin(detector.model, detector.to_json())
