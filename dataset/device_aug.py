"""Colour jitter on the device, of whole batches; the loader's workers only decode, crop and flip, to uint8.

Random draws are those of `train_transform`, in the same order: an image gets the same crop, flip, factors and order of
operations either way. Pixels differ only because PIL rounds to 8 bits after every operation.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms import v2

from dataset.images import MEAN, STD
from dataset.transforms import JITTER, crop_and_flip, resize_and_crop

HUE, SLOTS = 3, 6
IDENTITY = (1.0, 0.0, 0.0)


class TrainPixels:
    """`train_transform` without its colours: uint8 [3, h, w] -> (uint8 [3, size, size], colours [19])."""

    def __init__(self, size: int):
        self.crop, self.jitter = crop_and_flip(size), v2.ColorJitter(**JITTER)

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self.crop(pixels), pack_colours(**self.jitter.make_params([]))


class ValPixels:
    """`val_transform` without its normalisation: uint8 [3, h, w] -> (uint8 [3, size, size], no colours [0])."""

    def __init__(self, size: int):
        self.crop = resize_and_crop(size)

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
