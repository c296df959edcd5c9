"""Image files of any kind as RGB."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from elattn.errors import UserError

__all__ = ["BadImage", "read_image"]

_MOST_PIXELS = 80_000_000  # 240 MB of RGB; Pillow's own warning begins above


class BadImage(UserError):
    """An image that cannot be used.

    Attributes:
        path: of its file.
        reason: what is wrong with it.
    """

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = str(path), reason


def read_image(path: str | Path) -> np.ndarray:
    """The pixels as uint8, (H, W, 3), RGB, turned upright as the camera noted (EXIF orientation).

    Grey levels become three equal channels, 16 bits their upper 8, and transparency is ignored.

    Raises:
        BadImage: the file is missing, broken, of an unknown kind, or too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata, and sizes that are refused here
            with Image.open(path) as image:
                width, height = image.size
                if width * height > _MOST_PIXELS:
                    raise BadImage(path, f"{width} x {height} pixels are more than {_MOST_PIXELS // 10**6} million")
                return _rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise BadImage(path, "no such file") from None
    except Image.UnidentifiedImageError:
        raise BadImage(path, "not an image, or of an unknown kind") from None
    except Image.DecompressionBombError:
        raise BadImage(path, f"more than {_MOST_PIXELS // 10**6} million pixels") from None
    except BadImage:
        raise
    except Exception as error:  # decoders of broken files raise nearly anything
        raise BadImage(path, f"cannot be read ({error})") from None


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I;16"):
        return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, -1)
    if image.mode in ("I", "F"):
        raise ValueError("grey levels of 32 bits")
    return np.array(image.convert("RGB"))
