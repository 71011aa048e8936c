"""Image files of any kind, as RGB.

Pixels are used as stored: the orientation in EXIF data is not applied and transparency is dropped, as in torchvision's
ImageFolder and so in the published accuracies on ImageNet.
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

from tools.errors import BadInput

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""Normalisation of the paper's recipes, of red, green and blue in images from 0 to 1: (image - MEAN) / STD."""

USUAL_SIZE = 224
"""Input size in pixels if neither a flag nor a file gives one: the paper's."""

TIFF_STARTS = (b'II*\0', b'MM\0*')
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0
"""First bytes of TIFF files; two tags; a value of the second."""


def load_rgb(path: str | Path) -> Image.Image:
    """Decode an image file of any mode to RGB.

    Raises:
        BadInput: missing, damaged, too large to be real, or not an image.
    """
    with opened(path) as (image, _):
        return to_rgb(image)


def load_pixels(path: str | Path, fast: bool = False) -> Tensor:
    """Decode an image file to a tensor, uint8 [3, height, width], as `load_rgb` but faster for JPEG.

    Args:
        fast: for JPEG, the faster, less exact inverse transform, and no interpolation of colours; enough for training.

    Raises:
        BadInput: as `load_rgb`.
    """
    with opened(path) as (image, raw):
        if image.format == 'JPEG' and image.mode in ('RGB', 'L'):
            with suppress(ValueError):  # damaged; PIL may still read it
                return torch.from_numpy(simplejpeg.decode_jpeg(raw, 'RGB', fast, fast)).permute(2, 0, 1)
        return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)


@contextmanager
def opened(path: str | Path) -> Iterator[tuple[Image.Image, bytes]]:
    """Open an image without decoding it: (image, bytes of the file). Errors within the context become BadInput."""
    try:
        raw = Path(path).read_bytes()
        if not raw:
            raise ValueError('the file is empty')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # PIL warns of flaws in images that it can read
            with Image.open(io.BytesIO(raw)) as image:
                yield image, raw
    except MemoryError:
        raise
    except Exception as e:  # a damaged image can raise anything at all
        reason = (getattr(e, 'strerror', None) or str(e) or type(e).__name__).splitlines()[0]
        if isinstance(e, Image.UnidentifiedImageError):
            reason = 'a TIFF file of a kind that PIL cannot read' if raw[:4] in TIFF_STARTS else 'not an image'
        raise BadInput(f'{path}: cannot be read as an image ({reason})') from e


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB.

    Raises:
        ValueError: grey values in a range without a fixed meaning, see `grey_to_8_bits`.
    """
    image.load()
    if image.mode == 'F' or image.mode.startswith('I'):
        image = grey_to_8_bits(image)
    if image.mode == 'P' and 'transparency' in image.info:
        image = image.convert('RGBA')
    return image if image.mode == 'RGB' else image.convert('RGB')


def grey_to_8_bits(image: Image.Image) -> Image.Image:
    """Scale a grey image of more than 8 bits, integer or float, to mode 'L'. PIL would clip the values at 255.

    Black is 0. White is 65535 in 16 bits, also if a camera of 12 bits wrote them: a guess from the largest value would
    change the brightness from image to image. White is 4095 in TIFF files of 12 bits. In 32 bits it depends on the
    largest value: 255 or 65535 for integers, 1 or 255 for floats.

    Raises:
        ValueError: values outside of these ranges.
    """
    values, tags = np.asarray(image), getattr(image, 'tag_v2', {})
    low, high = values.min(), values.max()
    if image.mode == 'F':
        white = 1 if high <= 1 else 255
    elif image.mode == 'I' and image.format not in ('PNG', 'PPM'):
        white = 255 if high <= 255 else 65535
    else:
        white = 4095 if tags.get(BITS_PER_SAMPLE) == (12,) else 65535
    if not (low >= 0 and high <= white):
        expected = '0 to 1 or 0 to 255' if image.mode == 'F' else '0 to 255 or 0 to 65535'
        raise ValueError(f'grey values from {low:g} to {high:g}, of mode {image.mode}; expected {expected}')
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        values = white - values
    if image.mode == 'F':
        scaled = np.rint(values * (255 / white))
    else:
        scaled = values.astype(np.int64) * 256 // (white + 1)
    return Image.fromarray(scaled.astype(np.uint8))
