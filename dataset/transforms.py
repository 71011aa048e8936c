"""Transforms of the paper's recipes."""

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from dataset.images import MEAN, STD

JITTER = {'brightness': 0.4, 'contrast': 0.4, 'saturation': 0.4, 'hue': 0.2}
LONGEST = 32
"""Upper bound on the ratio of sides that is resized; longer images lose their ends."""

POLICIES = {'autoaugment': v2.AutoAugment, 'randaugment': v2.RandAugment, 'trivialaugment': v2.TrivialAugmentWide}


def train_transform(size: int, auto_augment: str | None = None) -> v2.Compose:
    """Return RandomResizedCrop, flip, ColorJitter, normalise: PIL image -> float [3, size, size].

    Args:
        auto_augment: one of `POLICIES`, in place of ColorJitter.
    """
    colours = POLICIES[auto_augment]() if auto_augment else v2.ColorJitter(**JITTER)
    return v2.Compose([crop_and_flip(size), colours, *_to_normalised()])


def val_transform(size: int) -> v2.Compose:
    """Return resize to 8/7 of the size (256 for 224), centre crop, normalise: PIL image -> float [3, size, size]."""
    return v2.Compose([resize_and_crop(size), *_to_normalised()])


def crop_and_flip(size: int) -> v2.Compose:
    """Return RandomResizedCrop and flip, of a PIL image or a tensor [3, h, w]."""
    return v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()])


def resize_and_crop(size: int) -> v2.Compose:
    """Return resize to 8/7 of the size (256 for 224) and centre crop, of a PIL image or a tensor [3, h, w]."""
    return v2.Compose([central_part, v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size)])


def central_part(image: Image.Image | Tensor) -> Image.Image | Tensor:
    """Return the middle of an image more than `LONGEST` times as long as wide; resized whole it may take gigabytes."""
    size = v2.functional.get_size(image)
    longest = LONGEST * min(size)
    return v2.functional.center_crop(image, [min(side, longest) for side in size]) if max(size) > longest else image


def _to_normalised() -> list:
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
