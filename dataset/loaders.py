"""Batches of images. Order and augmentation depend only on seed, epoch and image."""

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate

from dataset.lists import Sample
from dataset.transforms import (
    RawImages,
    TrainPixels,
    ValPixels,
    load_pixels,
    load_rgb,
    train_transform,
    val_transform,
)
from tools.checkpoint import outlive_signals
from tools.distributed import World
from tools.environment import cores
from tools.errors import BadInput
from tools.rng import derive_seed

log = logging.getLogger('tf-nas')


@dataclass(frozen=True)
class ImageSet:
    """Images under one root. `source`: the list or folder that messages name."""

    root: str
    samples: list[Sample]
    source: str


@dataclass(frozen=True)
class Loading:
    """How images are loaded; `batch_size`, `workers` and `val_workers` are totals over all processes."""

    img_size: int
    batch_size: int
    workers: int
    seed: int
    val_workers: int = 0
    device_aug: bool = False
    auto_augment: str | None = None


class ImageList(Dataset):
    """Images of a list. Key: (epoch, index); item: (transformed image, label).

    Seed, epoch and index decide the augmentation: it is the same in any worker and after any interruption.

    Raises (in `__getitem__`):
        BadInput: a file is missing or no image.
    """

    def __init__(self, root: str | Path, samples: Sequence[Sample], transform: Callable, seed: int):
        self.root, self.samples, self.transform, self.seed = Path(root), samples, transform, seed
        by_transform = {TrainPixels: partial(load_pixels, fast=True), ValPixels: load_pixels}
        self.load = by_transform.get(type(transform), load_rgb)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> tuple:
        epoch, index = key
        relative, label = self.samples[index]
        image = self.load(self.root / relative)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(self.seed, 'image', epoch, index))
            return self.transform(image), label


def collate(items: list[tuple]) -> tuple[Tensor | RawImages, Tensor]:
    """Return the batch (images, labels) of items of an `ImageList`."""
    images, labels = default_collate(items)
    return RawImages(*images) if isinstance(images, (list, tuple)) else images, labels


class EpochSampler(DistributedSampler):
    """torch's DistributedSampler that yields (epoch, index) and can start at a later batch.

    No image comes twice: if the images do not divide evenly, some processes get one fewer.
    """

    def __init__(self, dataset: Dataset, batch_size: int, world: World, seed: int, *, for_training: bool):
        super().__init__(
            dataset,
            world.size,
            world.rank,
            shuffle=for_training,
            seed=derive_seed(seed, 'order') >> 1,
            drop_last=for_training,
        )
        self.batch_size, self.start_batch = batch_size, 0

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Set the epoch, which decides the order of the next iteration, and its first batch."""
        super().set_epoch(epoch)
        self.start_batch = start_batch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for position, index in enumerate(super().__iter__()):
            padding = self.rank + position * self.num_replicas >= len(self.dataset)
            if position >= self.start_batch * self.batch_size and not padding:
                yield self.epoch, index


def make_loader(
    images: ImageSet, transform: Callable, loading: Loading, world: World, *, for_training: bool
) -> DataLoader:
    """Return a loader of batches (images [N, 3, H, W], labels [N]) for this process. Its sampler is an `EpochSampler`.

    Args:
        for_training: shuffle and drop the last, incomplete batch; else keep order and last batch.

    Raises:
        BadInput: for training, fewer images than one batch, or batches too small for batch norm.
    """
    count, total = len(images.samples), loading.batch_size
    if for_training and count < total:
        raise BadInput(f'{images.source}: {count} images are fewer than one batch of --batch_size {total}')
    batch_size = world.split_evenly(total, '--batch_size')
    if for_training and batch_size < 2:
        raise BadInput(f'--batch_size {total}: batch norm needs two images per process to train on')
    dataset = ImageList(images.root, images.samples, transform, loading.seed)
    workers = -(-loading.workers // world.size)
    if workers > cores():
        log.info('%d processes load images, not %d: this process may use %d cores', cores(), workers, cores())
        workers = cores()
    return DataLoader(
        dataset,
        batch_size,
        sampler=EpochSampler(dataset, batch_size, world, loading.seed, for_training=for_training),
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=outlive_signals,
        pin_memory=world.device.type == 'cuda',
        drop_last=for_training,
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # otherwise worker seeds are drawn from the global generator
    )


def make_transforms(loading: Loading) -> tuple[Callable, Callable]:
    """Return the transforms for training and for validation.

    Raises:
        BadInput: both device_aug and auto_augment.
    """
    size, policy = loading.img_size, loading.auto_augment
    if loading.device_aug and policy:
        raise BadInput(f'--auto_augment {policy} does not run on the device; leave out --device_aug')
    if loading.device_aug:
        return TrainPixels(size), ValPixels(size)
    return train_transform(size, policy), val_transform(size)


def fitting_batch(batch_size: int, trained_on: Sequence[ImageSet], world: World) -> int:
    """Return the batch size, or if there are fewer images than that, the most that there are on all devices alike."""
    fewest = min(trained_on, key=lambda images: len(images.samples))
    count = len(fewest.samples)
    devices = world.size * max(world.gpus, 1)
    most = count // devices * devices
    if batch_size <= count or most < 2 * devices:  # of too few, `make_loader` raises
        return batch_size
    log.info('--batch_size %d: %d instead, %s has %d images to train on', batch_size, most, fewest.source, count)
    return most


def endless(loader: DataLoader, start: int = 0) -> Iterator[tuple[Tensor | RawImages, Tensor]]:
    """Yield batches without end: pass after pass over a loader, each in another order.

    Args:
        start: batches to skip, to continue an interrupted stream.
    """
    first_pass, skip = divmod(start, len(loader))
    for number in itertools.count(first_pass):
        loader.sampler.set_epoch(number, skip)
        skip = 0
        yield from loader
