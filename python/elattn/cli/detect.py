"""`elattn detect`."""

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, track

from elattn import detect
from elattn._files import check_target
from elattn.errors import UserError
from elattn.train import select_device

__all__ = ["app"]

_DEFAULT = detect.DetectConfig()
_console = Console(highlight=False)

app = typer.Typer(help="Train, judge and use a detector.", no_args_is_help=True)

_Run = Annotated[Path, typer.Argument(help="Folder of a training run or of a saved detector.")]
_Data = Annotated[str, typer.Option(help='Folder in COCO or YOLO format, or "demo".')]
_Overlap = Annotated[float, typer.Option(help="Largest overlap of two boxes of a class.")]


def _option(panel: str, help: str, *names: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel)


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in --out.")] = False,
    data: _Data = _DEFAULT.data,
    size: Annotated[int, _option("Data", "Side of the input, a multiple of 16.")] = _DEFAULT.size,
    early_scale: Annotated[float, _option("Data", "Scale of the input in the first epochs.")] = _DEFAULT.early_scale,
    early_share: Annotated[float, _option("Data", "Which share of all these are.")] = _DEFAULT.early_share,
    augment: Annotated[bool, _option("Data", "Vary the images.")] = _DEFAULT.augment,
    mirror: Annotated[bool, _option("Data", "Mirror half of the images.")] = _DEFAULT.mirror,
    variant: Annotated[str, _option("Model", "lat_n or lat_dw.")] = _DEFAULT.variant,
    neck: Annotated[str, _option("Model", "linear, softmax or none.")] = _DEFAULT.neck,
    position: Annotated[int, _option("Model", "Size of a convolution of the values, or 0.")] = _DEFAULT.position,
    epochs: Annotated[int, _option("Training", "Times that every image is seen.")] = _DEFAULT.epochs,
    batch_size: Annotated[int, _option("Training", "Images of an update.")] = _DEFAULT.batch_size,
    learning_rate: Annotated[float, _option("Training", "Peak; a cosine follows.")] = _DEFAULT.learning_rate,
    warmup: Annotated[int, _option("Training", "Updates to the peak.")] = _DEFAULT.warmup,
    weight_decay: Annotated[float, _option("Training", "Of the convolutions.")] = _DEFAULT.weight_decay,
    clip: Annotated[float, _option("Training", "Largest norm of the gradient.")] = _DEFAULT.clip,
    ema: Annotated[float, _option("Training", "What averaged weights keep at an update.")] = _DEFAULT.ema,
    eval_every: Annotated[int, _option("Training", "Epochs between validations.")] = _DEFAULT.eval_every,
    seed: Annotated[int, _option("Training", "Of weights, order and variation.")] = _DEFAULT.seed,
    device: Annotated[str | None, _option("Machine", "cpu or cuda; by default what is there.")] = None,
    precision: Annotated[str, _option("Machine", "float32, or bfloat16 autocast.")] = _DEFAULT.precision,
) -> None:
    """Train a detector, judged on the split "val"."""
    options = {name: value for name, value in locals().items() if name not in ("out", "resume", "overwrite")}
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    try:
        config = detect.DetectConfig(**options)
    except ValueError as error:
        raise UserError(str(error)) from None
    result = detect.train_detector(config, out, resume=resume, overwrite=overwrite, console=_console)
    _print_evaluation(result.last)
    _report_skipped(list(map(str, result.skipped)))
    _console.print(f"The detector is in {out / 'best'}, pictures of the run are in {out}.", soft_wrap=True)


@app.command()
def val(
    run: _Run,
    data: _Data = _DEFAULT.data,
    split: Annotated[str, typer.Option(help="Part of the data.")] = "test",
    iou: _Overlap = 0.5,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default what is there.")] = None,
) -> None:
    """Print the average precision of a detector, and the time of each stage."""
    detector = detect.load_detector(run)
    images = detect.load_data(data, split, classes=detector.classes)
    detector.model.to(select_device(device))
    with Progress(console=_console, transient=True) as bar:
        task = bar.add_task("", total=len(images))
        result = detect.evaluate(
            detector.model, images, detector.size, iou=iou, report=lambda done: bar.update(task, completed=done)
        )
    _print_evaluation(result)
    for name, ap in zip(detector.classes, result.of_class, strict=True):
        _console.print(f"  {name:<16} AP {ap:.3f}")
    times = ", ".join(f"{name} {ms:.2f}" for name, ms in result.milliseconds.items())
    _console.print(f"milliseconds per image: {times}")
    _report_skipped(result.skipped)


@app.command()
def predict(
    run: _Run,
    images: Annotated[list[Path], typer.Argument(help="Images, or folders of images.")],
    out: Annotated[Path, typer.Option(help="Folder for the images with boxes and boxes.json.")],
    confidence: Annotated[float, typer.Option(help="Smallest score.")] = 0.25,
    iou: _Overlap = 0.5,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files in --out.")] = False,
) -> None:
    """Find objects in images."""
    detector, files = detect.load_detector(run), detect.find_images(images)
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise UserError(f"{out} exists already: replace files in it with --overwrite, or choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    found, bad = {}, []
    predictions = detect.predict(detector, files, confidence=confidence, iou=iou)
    for file, prediction in track(predictions, "", len(files), console=_console):
        if isinstance(prediction, detect.BadImage):
            bad.append(str(prediction))
            continue
        found[str(file)] = [
            {"class": detector.classes[label], "score": round(score, 6), "box": [round(x, 3) for x in box]}
            for box, score, label in zip(
                prediction.boxes.tolist(), prediction.scores.tolist(), prediction.labels.tolist(), strict=True
            )
        ]
        detect.draw(file, prediction, detector.classes).save(out / f"{file.stem}.png")
    (out / "boxes.json").write_text(json.dumps(found, indent=1) + "\n")
    _console.print(f"{sum(map(len, found.values()))} objects in {len(found)} images, written to {out}", soft_wrap=True)
    _report_skipped(bad)


class Format(str, Enum):
    """What `elattn detect export` writes."""

    torchscript = "torchscript"
    onnx = "onnx"


@app.command()
def export(
    run: _Run,
    file: Annotated[Path, typer.Argument(help="File to write.")],
    format: Annotated[Format, typer.Option(help="TorchScript, or ONNX without suppression.")] = Format.torchscript,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """Write a detector for C++ without Python, or for an ONNX runtime."""
    check_target(file, overwrite)
    detector = detect.load_detector(run)
    if format is Format.torchscript:
        detect.export_detector_torchscript(detector, file)
        content = "with forward, decode, select and detect"
    else:
        detect.export_detector_onnx(detector, file)
        content = "from images to boxes and scores"
    _console.print(f"{file}: {file.stat().st_size:,} bytes, {content}", soft_wrap=True)


def _print_evaluation(result: detect.Evaluation) -> None:
    _console.print(
        f"AP {result.ap:.3f}, AP50 {result.ap50:.3f}, AP75 {result.ap75:.3f}; objects small {result.small:.3f}, "
        f"medium {result.medium:.3f}, large {result.large:.3f}",
        soft_wrap=True,
    )


def _report_skipped(bad: list[str]) -> None:
    if bad:
        _console.print(
            f"{len(bad)} images could not be read:", *(f"  {line}" for line in bad), sep="\n", soft_wrap=True
        )
