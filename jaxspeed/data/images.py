# SPDX-License-Identifier: Apache-2.0
"""Images on the host: files and pixels of any size, as what a vision model reads."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32

from jaxspeed.config import ConfigError


if TYPE_CHECKING:
    from PIL.Image import Image

_CHANGE = "give pixels, or the path of a PNG or JPEG file"


def read_image(
    path: str | Path, shape: tuple[int, ...]
) -> Float32[np.ndarray, "H W C"]:
    """Returns the image of a file in the model's size, its values between -1 and 1.

    Args:
        path: of a file of any format that Pillow reads.
        shape: the model's height, width and channels (1: grey, 3: colours).

    Raises:
        ConfigError: it cannot be read, or is no image.
    """
    from PIL import Image, UnidentifiedImageError

    path = Path(path).expanduser()
    try:
        with Image.open(path) as image:
            return _resized(image, shape)
    except UnidentifiedImageError:
        raise ConfigError(f"{path}: no image; {_CHANGE}") from None
    except OSError as error:  # Pillow's own, of truncated files, has no errno
        raise ConfigError(f"{path}: {error.strerror or error}; {_CHANGE}") from None


def scale_pixels(pixels: Any, shape: tuple[int, ...]) -> Float32[np.ndarray, "H W C"]:
    """Returns pixels in the model's size, their values between -1 and 1.

    Args:
        pixels: of any height and width, channels last (or none), from 0 to 255.
        shape: as in `read_image`.

    Raises:
        ConfigError: they are no pixels.
    """
    from PIL import Image

    try:
        values = np.asarray(pixels, np.uint8)
        if values.ndim not in (2, 3):
            raise ValueError(f"{values.ndim} dims")
        flat = values[..., 0] if values.shape[-1:] == (1,) else values
        return _resized(Image.fromarray(flat), shape)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"no image ({error}); {_CHANGE}") from None


def _resized(image: "Image", shape: tuple[int, ...]) -> Float32[np.ndarray, "H W C"]:
    from PIL import Image

    image = image.convert("L" if shape[2] == 1 else "RGB")
    if image.size != (shape[1], shape[0]):
        image = image.resize((shape[1], shape[0]), Image.Resampling.BICUBIC)
    return np.asarray(image, np.float32).reshape(shape) / 127.5 - 1
