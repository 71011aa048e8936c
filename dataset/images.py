"""Image files of any kind, as RGB.

Pixels are taken as they are stored: an orientation in the EXIF data is not applied and transparency is dropped, as
torchvision's ImageFolder does and thus the published accuracies on ImageNet.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from tools.errors import BadInput

SIXTEEN_BIT = ('I', 'I;16', 'I;16L', 'I;16B', 'I;16N')
"""PIL's modes of grey images with more than 8 bits; it would clip them at 255."""


def load_rgb(path: str | Path) -> Image.Image:
    """Decode an image file of any mode to RGB.

    Raises:
        BadInput: missing, damaged, too large to be real, or not an image.
    """
    with opened(path) as (image, _):
        return to_rgb(image)


def load_pixels(path: str | Path, fast: bool = False) -> Tensor:
    """`load_rgb` as a tensor, uint8 [3, height, width]; JPEG files decode faster.

    Args:
        fast: JPEG with the faster, less exact transform and without interpolation of colours: good enough to train on.

    Raises:
        BadInput: as `load_rgb`.
    """
    with opened(path) as (image, raw):
        if image.format == 'JPEG' and image.mode in ('RGB', 'L'):
            with suppress(ValueError):  # damaged: PIL decides whether it can be read all the same
                return torch.from_numpy(simplejpeg.decode_jpeg(raw, 'RGB', fast, fast)).permute(2, 0, 1)
        return pil_to_tensor(to_rgb(image))


@contextmanager
def opened(path: str | Path) -> Iterator[tuple[Image.Image, bytes]]:
    """An image that is not yet decoded, and the bytes of its file; what goes wrong in the context is BadInput."""
    try:
        raw = Path(path).read_bytes()
        if not raw:
            raise ValueError('the file is empty')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of PIL, on images that it reads all the same
            with Image.open(io.BytesIO(raw)) as image:
                yield image, raw
    except MemoryError:
        raise
    except Exception as e:  # a damaged image can raise anything at all
        reason = (getattr(e, 'strerror', None) or str(e) or type(e).__name__).splitlines()[0]
        reason = 'not an image' if isinstance(e, Image.UnidentifiedImageError) else reason
        raise BadInput(f'{path}: cannot be read as an image ({reason})') from e


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as 8-bit RGB."""
    image.load()
    if image.mode in SIXTEEN_BIT:
        image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode == 'P' and 'transparency' in image.info:
        image = image.convert('RGBA')
    return image if image.mode == 'RGB' else image.convert('RGB')
