"""Colour jitter of whole batches on the device: each operation, each order, the draws, and batches one ahead."""

import itertools

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image
from torchvision.transforms import v2

from dataset.lists import parse_list
from dataset.loaders import ImageSet, Loading, endless, make_loader, make_transforms
from dataset.transforms import (
    JITTER,
    MEAN,
    STD,
    RawImages,
    TrainPixels,
    ValPixels,
    jitter,
    pack_colours,
    train_transform,
    val_transform,
)
from tools.distributed import World
from tools.errors import BadInput
from tools.training import to_device

CPU = torch.device('cpu')
OPERATIONS = {
    'brightness_factor': F.adjust_brightness,
    'contrast_factor': F.adjust_contrast,
    'saturation_factor': F.adjust_saturation,
    'hue_factor': F.adjust_hue,
}
NEUTRAL = {'brightness_factor': 1.0, 'contrast_factor': 1.0, 'saturation_factor': 1.0, 'hue_factor': 0.0}


def colourful(count):
    """Random images with black, white, grey and pure colours among the pixels."""
    images = torch.rand(count, 3, 24, 20)
    corners = torch.tensor(list(itertools.product([0.0, 0.5, 1.0], repeat=3))).T
    images[:, :, 0] = corners[:, :20]
    images[:, :, 1, :7] = corners[:, 20:]
    return images


@pytest.mark.parametrize('name', OPERATIONS)
def test_each_operation_is_torchvisions_at_equal_factors(name):
    factors = [-0.2, -0.07, 0.0, 0.13, 0.2] if name == 'hue_factor' else [0.6, 0.85, 1.0, 1.2, 1.4]
    images = colourful(len(factors))
    colours = [pack_colours(torch.randperm(4), **NEUTRAL | {name: factor}) for factor in factors]
    expected = [OPERATIONS[name](image, factor) for image, factor in zip(images, factors, strict=True)]
    torch.testing.assert_close(jitter(images, torch.stack(colours)), torch.stack(expected), atol=2e-5, rtol=0)


def test_a_batch_has_all_orders_of_the_operations_at_once():
    orders = list(itertools.permutations(range(4)))
    images = colourful(len(orders))
    factors = [dict(zip(OPERATIONS, (1.4, 0.7, 1.3, 0.15), strict=True)) for _ in orders]
    colours = [pack_colours(torch.tensor(order), **f) for order, f in zip(orders, factors, strict=True)]
    expected = []
    for image, order in zip(images, orders, strict=True):
        for i in order:
            name = list(OPERATIONS)[i]
            image = OPERATIONS[name](image, factors[0][name])
        expected.append(image)
    result = jitter(images, torch.stack(colours))
    torch.testing.assert_close(result, torch.stack(expected), atol=5e-5, rtol=0)
    one_order = jitter(images, torch.stack([colours[0]] * len(orders)))
    assert (result - one_order)[1:].abs().amax((1, 2, 3)).min() > 0.01  # the orders do differ


def test_the_same_seed_gives_the_images_of_the_recipes_pipeline():
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((120, 90), Image.BICUBIC)
    pixels = v2.functional.pil_to_tensor(coarse)
    levels = torch.tensor(STD).view(3, 1, 1) * 255
    for seed in range(12):
        torch.manual_seed(seed)
        expected = train_transform(48)(coarse)
        torch.manual_seed(seed)
        image, colours = TrainPixels(48)(pixels)
        got = RawImages(image[None], colours[None]).to(CPU)[0]
        assert ((got - expected).abs() * levels).mean() < 3.5  # of 255; PIL rounds hues to 1/256 of a circle
    expected, (image, colours) = val_transform(48)(coarse), ValPixels(48)(pixels)
    assert ((RawImages(image[None], colours[None]).to(CPU)[0] - expected).abs() * levels).max() < 1.01


def test_grey_and_extreme_images_stay_finite_and_in_range():
    images = torch.stack([torch.zeros(3, 5, 5), torch.ones(3, 5, 5), torch.full((3, 5, 5), 0.5)])
    draws = [pack_colours(**v2.ColorJitter(**JITTER).make_params([])) for _ in images]
    result = jitter(images, torch.stack(draws))
    assert result.isfinite().all() and result.min() >= 0 and result.max() <= 1
    assert (result.amax(1) - result.amin(1)).max() < 1e-6  # grey stays grey


def stream(images, **changes):
    loading = Loading(32, 4, 0, seed=5, **changes)
    data = ImageSet(images, parse_list(images / 'train.txt'), 'train')
    loader = make_loader(data, make_transforms(loading)[0], loading, World(CPU), for_training=True)
    return to_device(endless(loader), CPU)


def test_batches_hold_what_the_recipes_pipeline_makes(images):
    ours, recipe = next(stream(images, device_aug=True)), next(stream(images))
    assert ours[0].dtype == torch.float32 and ours[0].shape == (4, 3, 32, 32)
    assert torch.equal(ours[1], recipe[1])
    assert ((ours[0] - recipe[0]) * torch.tensor(STD).view(3, 1, 1)).abs().mean() < 0.02


def test_policies_and_device_aug_exclude_each_other():
    with pytest.raises(BadInput, match='--auto_augment randaugment'):
        make_transforms(Loading(32, 4, 0, 5, device_aug=True, auto_augment='randaugment'))


def test_normalisation_is_by_channel():
    white = RawImages(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8), torch.empty(1, 0)).to(CPU)
    for channel, mean, std in zip(white[0], MEAN, STD, strict=True):
        assert channel[0, 0].item() == pytest.approx((1 - mean) / std, abs=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_batches_on_a_gpu_come_one_ahead_and_whole():
    cuda, seen = torch.device('cuda'), []

    def batches():
        for i in range(6):
            seen.append(i)
            pixels = torch.full((8, 3, 64, 64), i, dtype=torch.uint8)
            colours = torch.stack([pack_colours(torch.arange(4), **NEUTRAL)] * 8)
            yield RawImages(pixels, colours).pin_memory(), torch.full((8,), i).pin_memory()

    for i, (images, labels) in enumerate(to_device(batches(), cuda, torch.channels_last)):
        assert len(seen) == min(i + 2, 6)
        work = torch.randn(1024, 1024, device=cuda)
        for _ in range(20):
            work = work @ work  # the next batch is copied beside it
        assert labels.eq(i).all() and images.is_contiguous(memory_format=torch.channels_last)
        expected = RawImages(torch.full((1, 3, 1, 1), i, dtype=torch.uint8), torch.empty(1, 0)).to(CPU)
        torch.testing.assert_close(images.cpu(), expected.expand(8, 3, 64, 64), atol=1e-5, rtol=0)
    assert i == 5
