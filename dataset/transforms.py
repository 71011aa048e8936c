"""Image files to tensors, and the transforms of the paper's recipes.

Pixels are used as stored: the orientation in EXIF data is not applied and transparency is dropped, as in torchvision's
ImageFolder and so in the published accuracies on ImageNet.

With --device_aug the loader's workers only decode, crop and flip, to uint8; the colours of whole batches change on the
device. Random draws are those of `train_transform`, in the same order: an image gets the same crop, flip, factors and
order of operations either way. Pixels differ only because PIL rounds to 8 bits after every operation.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from tools.errors import BadInput

# Normalisation of the paper's recipes, of red, green and blue in images from 0 to 1: (image - MEAN) / STD.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

JITTER = {'brightness': 0.4, 'contrast': 0.4, 'saturation': 0.4, 'hue': 0.2}
LONGEST = 32  # largest ratio of sides that is resized; longer images lose their ends

POLICIES = {'autoaugment': v2.AutoAugment, 'randaugment': v2.RandAugment, 'trivialaugment': v2.TrivialAugmentWide}

HUE, SLOTS = 3, 6  # number of the hue among ColorJitter's operations; slots of `pack_colours`
IDENTITY = (1.0, 0.0, 0.0)


# --- image files


def load_rgb(path: str | Path) -> Image.Image:
    """Decode an image file of any 8-bit mode to RGB.

    Raises:
        BadInput: missing, damaged, too large to be real, of more than 8 bits, or not an image.
    """
    with _opened(path) as (image, _):
        return _to_rgb(image)


def load_pixels(path: str | Path, fast: bool = False) -> Tensor:
    """Decode an image file to a tensor, uint8 [3, height, width], as `load_rgb` but faster for JPEG.

    Args:
        fast: for JPEG, the faster, less exact inverse transform, and no interpolation of colours; enough for training.

    Raises:
        BadInput: as `load_rgb`.
    """
    with _opened(path) as (image, raw):
        if image.format == 'JPEG' and image.mode in ('RGB', 'L'):
            with suppress(ValueError):  # damaged; PIL may still read it
                return torch.from_numpy(simplejpeg.decode_jpeg(raw, 'RGB', fast, fast)).permute(2, 0, 1)
        return torch.from_numpy(np.array(_to_rgb(image))).permute(2, 0, 1)


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Image.Image, bytes]]:
    """Open an image without decoding it: (image, bytes of the file). Errors within the context become BadInput."""
    try:
        raw = Path(path).read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # PIL warns of flaws in images that it can read
            with Image.open(io.BytesIO(raw)) as image:
                yield image, raw
    except MemoryError:
        raise
    except Exception as e:  # a damaged image can raise anything at all
        reason = getattr(e, 'strerror', None) or str(e) or type(e).__name__
        if isinstance(e, Image.UnidentifiedImageError):
            reason = 'not an image, or of an unknown kind'
        raise BadInput(f'{path}: cannot be read as an image ({reason.splitlines()[0]})') from e


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode == 'F' or image.mode.startswith('I'):
        # What is white depends on the camera or program, and PIL would clip the values at 255.
        raise ValueError(f'grey values of mode {image.mode}, which has more than 8 bits: convert to 8 bits')
    if image.mode == 'P' and 'transparency' in image.info:
        image = image.convert('RGBA')
    return image.convert('RGB')


# --- transforms


def train_transform(size: int, auto_augment: str | None = None) -> v2.Compose:
    """Return RandomResizedCrop, flip, ColorJitter, normalise: PIL image -> float [3, size, size].

    Args:
        auto_augment: one of `POLICIES`, in place of ColorJitter.
    """
    colours = POLICIES[auto_augment]() if auto_augment else v2.ColorJitter(**JITTER)
    return v2.Compose([_crop_and_flip(size), colours, *_to_normalised()])


def val_transform(size: int) -> v2.Compose:
    """Return resize to 8/7 of the size (256 for 224), centre crop, normalise: PIL image -> float [3, size, size]."""
    return v2.Compose([_resize_and_crop(size), *_to_normalised()])


def _crop_and_flip(size: int) -> v2.Compose:
    return v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()])


def _resize_and_crop(size: int) -> v2.Compose:
    return v2.Compose([_central_part, v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size)])


def _central_part(image: Image.Image | Tensor) -> Image.Image | Tensor:
    """Return the middle of an image more than `LONGEST` times as long as wide; resized whole it may take gigabytes."""
    size = v2.functional.get_size(image)
    longest = LONGEST * min(size)
    if max(size) <= longest:
        return image
    return v2.functional.center_crop(image, [min(side, longest) for side in size])


def _to_normalised() -> list:
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]


# --- colours on the device


class TrainPixels:
    """`train_transform` without its colours: uint8 [3, h, w] -> (uint8 [3, size, size], colours [19])."""

    def __init__(self, size: int):
        self.crop, self.jitter = _crop_and_flip(size), v2.ColorJitter(**JITTER)

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self.crop(pixels), pack_colours(**self.jitter.make_params([]))


class ValPixels:
    """`val_transform` without its normalisation: uint8 [3, h, w] -> (uint8 [3, size, size], no colours [0])."""

    def __init__(self, size: int):
        self.crop = _resize_and_crop(size)

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self.crop(pixels), torch.empty(0)


@dataclass
class RawImages:
    """Batch that becomes float images when it is moved to a device.

    Attributes:
        pixels: uint8 [N, 3, H, W].
        colours: [N, 19] of `pack_colours`; [N, 0]: no jitter.
    """

    pixels: Tensor
    colours: Tensor

    def pin_memory(self) -> 'RawImages':
        """Return a copy in page-locked memory. DataLoader calls it."""
        return RawImages(self.pixels.pin_memory(), self.colours.pin_memory())

    def to(self, device: torch.device, non_blocking: bool = False) -> Tensor:
        """Return the images on the device, jittered and normalised, float [N, 3, H, W]. Do not wait for the device."""
        images = self.pixels.to(device, non_blocking=non_blocking).float().div_(255)
        if self.colours.shape[1]:
            images = jitter(images, self.colours.to(device, non_blocking=non_blocking))
        for channel, mean, std in zip(images.unbind(1), MEAN, STD, strict=True):
            channel.sub_(mean).div_(std)
        return images


def pack_colours(
    fn_idx: Tensor, brightness_factor: float, contrast_factor: float, saturation_factor: float, hue_factor: float
) -> Tensor:
    """Pack the parameters that ColorJitter draws for one image into [19], for `jitter`.

    Three slots before the change of hue and three after it hold the other operations; free slots change nothing. So
    the images of a batch may differ in the order of operations. A slot is (share of the image, share of its mean grey,
    share of its grey). The last value is the shift of the hue.
    """
    blends = (
        (brightness_factor, 0.0, 0.0),
        (contrast_factor, 1 - contrast_factor, 0.0),
        (saturation_factor, 0.0, 1 - saturation_factor),
    )
    order = fn_idx.tolist()
    before, after = order[: order.index(HUE)], order[order.index(HUE) + 1 :]
    rows = []
    for operations in (before, after):
        rows += [blends[i] for i in operations] + [IDENTITY] * (SLOTS // 2 - len(operations))
    return torch.tensor([value for row in rows for value in row] + [hue_factor])


def jitter(images: Tensor, colours: Tensor) -> Tensor:
    """Apply ColorJitter, with the factors and the order of each image. Images: float [N, 3, H, W] from 0 to 1.

    Args:
        colours: [N, 19], see `pack_colours`.
    """
    slots = colours[:, :-1].reshape(-1, SLOTS, 3, 1, 1, 1).unbind(1)
    for slot in slots[: SLOTS // 2]:
        images = blend(images, slot)
    images = shift_hue(images, colours[:, -1])
    for slot in slots[SLOTS // 2 :]:
        images = blend(images, slot)
    return images


def blend(images: Tensor, slot: Tensor) -> Tensor:
    """Change brightness, contrast or saturation of each image, as torchvision defines them.

    Args:
        images: [N, 3, H, W].
        slot: [N, 3, 1, 1, 1]: shares of the image, its mean grey, and its grey.
    """
    share, of_mean, of_grey = slot.unbind(1)
    red, green, blue = images.unbind(1)
    grey = (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)[:, None]
    mean = grey.mean((2, 3), keepdim=True)
    return (images * share).add_(grey.mul_(of_grey).add_(mean * of_mean)).clamp_(0, 1)


def shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Add `shift` full circles to the hue of each image, in HSV.

    Args:
        images: [N, 3, H, W] from 0 to 1.
        shift: [N].
    """
    red, green, blue = images.unbind(1)
    low, value = images.aminmax(dim=1)
    chroma = value - low
    scale = chroma.clamp(min=1e-12)  # grey pixels have a chroma and numerators of 0
    by_blue = ((red - green) / scale).add_(4)
    by_green = ((blue - red) / scale).add_(2)
    by_red = (green - blue) / scale
    hue = torch.where(value == red, by_red, torch.where(value == green, by_green, by_blue))  # in sixths of a circle
    hue = hue.add_(6 * shift[:, None, None])[:, None]
    peaks = torch.arange(5, 0, -2, device=images.device).view(1, 3, 1, 1)
    turn = hue + peaks
    turn = turn.sub_(6 * (turn / 6).floor_())  # remainder_ takes many times longer on a CPU
    return value[:, None] - chroma[:, None] * torch.minimum(turn, 4 - turn).clamp_(0, 1)
