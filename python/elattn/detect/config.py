"""How to train a detector."""

from dataclasses import dataclass

__all__ = ["DetectConfig"]


@dataclass(frozen=True, kw_only=True)
class DetectConfig:
    """How to train a detector.

    Attributes:
        data: folder in COCO or YOLO format (`elattn.detect.load_data`), or "demo".
        variant, neck, position: of the model, `elattn.models.YoloLat`.
        size: side of the square that images are fitted into, a multiple of 16.
        early_scale, early_share: the first epochs, this share of all, train on smaller inputs, of this scale: an epoch
            costs less there, and more of them teach more than fewer at full size.
        epochs: times that every image of the training split is seen.
        batch_size: images of an update.
        learning_rate, warmup: the peak, reached after `warmup` updates, from where a cosine falls to a hundredth.
        weight_decay: of the convolutions; norms and biases have none.
        clip: largest norm of the gradient.
        ema: share that the averaged weights keep at an update, once there have been many.
        augment: whether images are zoomed, shifted, cropped and coloured by chance.
        mirror: whether half of them are mirrored too; not for objects that have a direction, such as digits.
        eval_every: epochs between validations.
        seed: of the initial weights, the order of images and their variation.
        precision: "float32", or "bfloat16": autocast, with weights and optimizer in float32.
        device: "cpu" or "cuda"; None for CUDA where the library has operators for it.

    Raises:
        ValueError: a field breaks a rule; the message has the rule and the value met.
    """

    data: str = "demo"
    variant: str = "lat_n"
    neck: str = "linear"
    position: int = 3
    size: int = 320
    early_scale: float = 0.5
    early_share: float = 2 / 3
    epochs: int = 14
    batch_size: int = 8
    learning_rate: float = 4e-3
    warmup: int = 200
    weight_decay: float = 0.05
    clip: float = 10.0
    ema: float = 0.998
    augment: bool = True
    mirror: bool = False
    eval_every: int = 2
    seed: int = 0
    precision: str = "float32"
    device: str | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "learning_rate", "clip", "eval_every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"DetectConfig: {name} must be positive (got {getattr(self, name)})")
        for name in ("warmup", "weight_decay", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"DetectConfig: {name} must not be negative (got {getattr(self, name)})")
        if not 0 <= self.ema < 1:
            raise ValueError(f"DetectConfig: ema must be at least 0 and below 1 (got {self.ema})")
        if not 0 < self.early_scale <= 1:
            raise ValueError(f"DetectConfig: early_scale must be above 0 and at most 1 (got {self.early_scale})")
        if not 0 <= self.early_share <= 1:
            raise ValueError(f"DetectConfig: early_share must be from 0 to 1 (got {self.early_share})")
        if self.size < 16 or self.size % 16 != 0:
            raise ValueError(f"DetectConfig: size must be a multiple of 16 (got {self.size})")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"DetectConfig: precision must be float32 or bfloat16 (got {self.precision!r})")
        if self.device not in (None, "cpu", "cuda"):
            raise ValueError(f"DetectConfig: device must be cpu or cuda (got {self.device!r})")

    def size_in(self, epoch: int) -> int:
        """Side of the input in an epoch, which counts from 0."""
        if epoch >= round(self.early_share * self.epochs):
            return self.size
        return max(16, 16 * round(self.early_scale * self.size / 16))
