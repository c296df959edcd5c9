"""Detectors as files: TorchScript, ONNX, and the C++ program `detect`, which finds what Python finds."""

import json
import struct
import subprocess
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

import elattn
from elattn._library import library_path
from elattn.cli.app import app
from elattn.detect import (
    Detector,
    export_detector_onnx,
    export_detector_torchscript,
    predict,
    read_image,
    save_detector,
)
from elattn.detect import export as export_module
from elattn.detect.export import standard_attention
from elattn.errors import UserError
from elattn.models import YoloLat
from elattn.testing import reference_attention

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = ["cat", 'a "big" dog', "größer\\kleiner"]
SIZE = 160
PROGRAM = library_path().parent / "examples" / "detect"

in_cpp = pytest.mark.skipif(not PROGRAM.exists(), reason=f"{PROGRAM} does not exist: make examples")


def new_detector(**options: Any) -> Detector:
    """One whose normalisations have something to do, and which finds objects everywhere."""
    torch.manual_seed(0)
    model = YoloLat(len(CLASSES), **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    return Detector(model.eval(), CLASSES, SIZE)


@pytest.fixture(scope="module")
def detector() -> Detector:
    return new_detector()


@pytest.fixture(scope="module")
def scripted(detector: Detector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scripted") / "model.pt"
    export_detector_torchscript(detector, path)
    return path


@pytest.fixture(scope="module")
def onnx_detector() -> Detector:
    """Of all kinds of parts; an export takes seconds."""
    return new_detector(variant="lat_dw", position=3)


@pytest.fixture(scope="module")
def onnx_file(onnx_detector: Detector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_detector_onnx(onnx_detector, path)
    return path


def facts_of(path: Path) -> dict[str, str]:
    found: dict[str, Any] = dict.fromkeys(("classes.json", "size", "stride", "elattn_version", "fingerprint"), "")
    torch.jit.load(path, _extra_files=found)
    return {name: value.decode() for name, value in found.items()}


def onnx_session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options)


def run_onnx(session: onnxruntime.InferenceSession, images: Tensor) -> list[Tensor]:
    return [torch.from_numpy(x) for x in session.run(None, {"images": images.numpy()})]


# TorchScript


def test_torchscript_is_the_detector(detector: Detector, scripted: Path) -> None:
    fused, loaded = detector.model.fuse(), torch.jit.load(scripted)
    images = torch.rand(2, 3, 64, 96)
    with torch.inference_mode():
        raw = fused(images)
        assert torch.equal(loaded(images), raw)
        assert all(torch.equal(a, b) for a, b in zip(loaded.decode(raw), fused.decode(raw), strict=True))
        expected = fused.detect(images, 0.0)
        for found in (loaded.detect(images, 0.0), loaded.select(raw, 0.0, 0.5, 100)):
            for one, two in zip(found, expected, strict=True):
                assert len(one[0]) > 0 and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_torchscript_says_what_it_is(detector: Detector, scripted: Path, tmp_path: Path) -> None:
    facts = facts_of(scripted)
    assert json.loads(facts["classes.json"]) == CLASSES
    assert (facts["size"], facts["stride"], facts["elattn_version"]) == ("160", "16", elattn.__version__)
    other = new_detector()
    with torch.no_grad():
        other.model.head[0].bias[3] += 1
    export_detector_torchscript(other, tmp_path / "model.pt")
    assert facts_of(tmp_path / "model.pt")["fingerprint"] != facts["fingerprint"]


def test_exporting_changes_neither_the_detector_nor_an_older_file_if_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector, path = new_detector(), tmp_path / "model"
    detector.model.train()
    path.write_bytes(b"older")

    def full(*arguments: object, **options: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(torch.jit, "save", full)
    monkeypatch.setattr(torch.onnx, "export", full)
    monkeypatch.setattr(torch.export, "export", full)
    for export in (export_detector_torchscript, export_detector_onnx):
        with pytest.raises(OSError, match="no space left"):
            export(detector, path)
    assert detector.model.training and all(p.requires_grad for p in detector.model.parameters())
    assert [p.name for p in tmp_path.iterdir()] == ["model"] and path.read_bytes() == b"older"


# ONNX


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 160, 160), (3, 48, 208), (1, 16, 16)])
def test_onnx_is_the_detector(onnx_detector: Detector, onnx_file: Path, batch: int, height: int, width: int) -> None:
    model, images = onnx_detector.model, torch.rand(batch, 3, height, width)
    with torch.inference_mode():
        expected = model.decode(model(images))
    boxes, scores = run_onnx(onnx_session(onnx_file), images)
    torch.testing.assert_close((boxes, scores), expected, rtol=0, atol=1e-4)


def test_onnx_is_one_file_of_standard_operators(onnx_file: Path) -> None:
    assert [p.name for p in onnx_file.parent.iterdir()] == [onnx_file.name]
    model = onnx.load(onnx_file)
    onnx.checker.check_model(model)
    assert {node.domain for node in model.graph.node} == {""} and not model.functions


def test_onnx_says_what_it_is(onnx_detector: Detector, onnx_file: Path, tmp_path: Path) -> None:
    session = onnx_session(onnx_file)
    assert [(x.name, x.shape) for x in session.get_inputs()] == [("images", ["batch", 3, "height", "width"])]
    assert [(x.name, x.shape[0], x.shape[2]) for x in session.get_outputs()] == [
        ("boxes", "batch", 4),
        ("scores", "batch", 3),
    ]
    export_detector_torchscript(onnx_detector, tmp_path / "model.pt")
    facts = session.get_modelmeta().custom_metadata_map
    assert facts.items() >= facts_of(tmp_path / "model.pt").items()


@pytest.mark.parametrize("scale", [1e4, 1e15, 1e30])
def test_onnx_stays_finite(onnx_file: Path, scale: float) -> None:
    boxes, scores = run_onnx(onnx_session(onnx_file), scale * torch.rand(1, 3, 64, 64))
    assert boxes.isfinite().all() and scores.isfinite().all()


@pytest.mark.parametrize(
    ("size", "offset", "bound"), [(1, 0, 1e-6), (100, 0, 1e-5), (1e4, 0, 1e-5), (1, 1e4, 1e-5), (1, -1e4, 1e-5)]
)
def test_attention_in_standard_operators_is_exact(size: float, offset: float, bound: float) -> None:
    q, k, v = (torch.randn(2, 4, 50, 16) for _ in range(3))
    q, k = q * size + offset, k * size + offset
    expected = reference_attention(q, k, v, scale=0.25)
    torch.testing.assert_close(standard_attention(q, k, v, scale=0.25).double(), expected, rtol=0, atol=bound)


def test_attention_in_standard_operators_is_finite() -> None:
    values = torch.tensor([0.0, 1e-30, 1, -1, 88, -104, 1e4, -1e4, 1e30, -1e30, 3e38, -3e38])
    q, k = (values[torch.randint(len(values), (3, 4, 20, 16))] for _ in range(2))
    v = torch.rand(3, 4, 20, 16)
    y = standard_attention(q, k, v, scale=0.25)
    assert y.isfinite().all() and (y - v.amax(2, keepdim=True)).max() < 1e-5


def test_a_missing_package_is_named(detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "elattn\[onnx\]"'):
        export_detector_onnx(detector, tmp_path / "model.onnx")


# The command


def test_command(detector: Detector, scripted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: object) -> Any:
        return CliRunner().invoke(app, ["detect", "export", *map(str, arguments)])

    save_detector(detector, tmp_path / "run")
    file = tmp_path / "model.pt"
    assert run(tmp_path / "run", file).exit_code == 0
    assert facts_of(file) == facts_of(scripted)
    assert "--overwrite" in str(run(tmp_path / "run", file).exception)
    assert "no folder" in str(run(tmp_path / "run", tmp_path / "none" / "model.pt").exception)
    monkeypatch.setattr("elattn.detect.export_detector_onnx", lambda detector, path: path.write_text("graph"))
    assert run(tmp_path / "run", file, "--format", "onnx", "--overwrite").exit_code == 0
    assert file.read_text() == "graph"


# C++


def picture(width: int = 211, height: int = 300) -> Image.Image:
    """Coloured patches."""
    patches = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    return Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PROGRAM, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120)


def found(*arguments: object) -> list[tuple[str, list[float]]]:
    """Class, and score and box, of what the program finds."""
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert " ms, model " in done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    return [(row[0], [float(x) for x in row[1:]]) for row in rows]


@pytest.fixture(scope="module")
def reads_png() -> None:
    if "PNG or binary PPM" not in run("--help").stdout:
        pytest.skip("detect was built with OpenCV, which has its own words, or without libpng")


def mistake(*arguments: object) -> str:
    """Runs what must fail with exit code 1 and one line, which is returned."""
    done = run(*arguments)
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and len(lines) == 1 and lines[0].startswith("detect: "), done
    return lines[0]


@in_cpp
@pytest.mark.parametrize(("width", "height"), [(211, 300), (64, 5), (160, 160)])
def test_cpp_finds_what_python_finds(
    detector: Detector, scripted: Path, tmp_path: Path, width: int, height: int
) -> None:
    file = tmp_path / "picture.ppm"
    picture(width, height).save(file)
    [(_, expected)] = predict(detector, [file], confidence=0.0, iou=0.5)
    rows = found(scripted, file, "--confidence", 0, "--iou", 0.5, "--threads", 1, "--repeat", 2)
    assert len(rows) == 100 and [name for name, _ in rows] == [CLASSES[label] for label in expected.labels]
    numbers = torch.tensor([row for _, row in rows])
    torch.testing.assert_close(numbers, torch.cat((expected.scores[:, None], expected.boxes), 1), rtol=0, atol=1e-4)


@in_cpp
@pytest.mark.usefixtures("reads_png")
@pytest.mark.parametrize("mode", ["1", "P", "RGBA", "I;16"])
def test_cpp_reads_pictures_as_python(scripted: Path, tmp_path: Path, mode: str) -> None:
    image = picture(40, 30)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 200)
    elif mode == "RGBA":
        image.putalpha(picture(40, 30).convert("L"))
    image.convert(mode).save(tmp_path / "picture.png")
    assert found(scripted, tmp_path / "picture.png", tmp_path / "out.png", "--confidence", 1) == []
    assert np.array_equal(read_image(tmp_path / "out.png"), read_image(tmp_path / "picture.png"))


@in_cpp
def test_cpp_frames_what_it_finds(scripted: Path, tmp_path: Path) -> None:
    picture().save(tmp_path / "picture.ppm")
    rows = found(scripted, tmp_path / "picture.ppm", tmp_path / "out.ppm", "--confidence", 0)
    changed = (read_image(tmp_path / "picture.ppm") != read_image(tmp_path / "out.ppm")).any(-1)
    expected = np.zeros_like(changed)
    for _, (_, *box) in rows:
        left, top, right, bottom = (max(0, round(x)) for x in box)
        inside = expected[top:bottom, left:right]
        for rows_, columns in ((slice(2), slice(None)), (slice(-2, None), slice(None))):
            inside[rows_, columns] = True
            inside[columns, rows_] = True
    assert changed.any() and not (changed & ~expected).any()
    assert changed.sum() > 0.95 * expected.sum()  # a frame may have the colour that was there


def png_start(width: int, height: int) -> bytes:
    """A PNG file up to where the pixels would begin."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(header) - 4) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 1000) + b"IDAT"


@in_cpp
@pytest.mark.usefixtures("reads_png")
def test_mistakes_in_cpp_are_one_line(scripted: Path, tmp_path: Path) -> None:
    good = tmp_path / "good.png"
    picture().save(good)
    files = {
        "half.pt": scripted.read_bytes()[:1000],
        "half.png": good.read_bytes()[:2000],
        "half.ppm": b"P6 20 20 255\n" + bytes(100),
        "huge.png": png_start(60_000, 60_000),
        "huge.ppm": b"P6 # a comment\n60000 60000 255\n",
        "long.ppm": b"P6 99999999999999999999 1 255\n",
        "deep.ppm": b"P6 1 1 65535\n" + bytes(6),
        "text.png": b"a text",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(tmp_path / "other.pt"))
    for arguments, message in [
        (("none.pt", good), "none.pt is not a file"),
        (("half.pt", good), "half.pt is not a TorchScript model, or is damaged"),
        (("other.pt", good), "other.pt has no method select, so it is no detector"),
        ((scripted, "none.png"), "none.png: there is no such file"),
        ((scripted, "half.png"), "half.png: it is a broken PNG file: "),
        ((scripted, "half.ppm"), "half.ppm: it ends too early"),
        ((scripted, "huge.png"), "huge.png: 60000 x 60000 pixels are more than 80 million"),
        ((scripted, "huge.ppm"), "huge.ppm: 60000 x 60000 pixels are more than 80 million"),
        ((scripted, "long.ppm"), "long.ppm: a number of its header has more than nine digits"),
        ((scripted, "deep.ppm"), "deep.ppm: its samples must go to 255, one byte each (they go to 65535)"),
        ((scripted, "text.png"), "text.png: it is not PNG or binary PPM"),
        ((scripted, good, "out.xyz"), "out.xyz: a picture to write must end in .png or .ppm"),
        ((scripted, good, "none/out.png"), "none/out.png: it cannot be written"),
        ((scripted,), "needs MODEL, PICTURE and perhaps OUTPUT (got 1 words)"),
        ((scripted, good, "--iou", "x"), "--iou must be a number >= 0 (got 'x')"),
        ((scripted, good, "--beam", 2), "there is no option --beam"),
    ]:
        line = mistake(*(tmp_path / a if isinstance(a, str) and "." in a else a for a in arguments))
        assert message in line, line
