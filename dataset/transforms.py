"""Transforms of the paper's recipes, as presets."""

import torch
from torchvision.transforms import v2

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


POLICIES = {'autoaugment': v2.AutoAugment, 'randaugment': v2.RandAugment, 'trivialaugment': v2.TrivialAugmentWide}


def train_transform(size: int, auto_augment: str | None = None) -> v2.Compose:
    """RandomResizedCrop, flip, ColorJitter, normalise: PIL image -> float [3, size, size].

    Args:
        auto_augment: one of `POLICIES`, in place of ColorJitter.
    """
    jitter = v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.2)
    return v2.Compose(
        [
            v2.RandomResizedCrop(size),
            v2.RandomHorizontalFlip(),
            POLICIES[auto_augment]() if auto_augment else jitter,
            *_to_normalised(),
        ]
    )


def val_transform(size: int) -> v2.Compose:
    """Resize to 8/7 of the size (256 for 224), centre crop, normalise: PIL image -> float [3, size, size]."""
    return v2.Compose([v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size), *_to_normalised()])


def _to_normalised() -> list:
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
