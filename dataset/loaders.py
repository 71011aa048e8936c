"""Batches of images from lists. Order and augmentation depend only on seed, epoch and image."""

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate

from dataset.device_aug import RawImages, TrainPixels, ValPixels
from dataset.images import USUAL_SIZE, load_pixels, load_rgb
from dataset.lists import Sample
from dataset.splits import Images, training_images
from dataset.transforms import train_transform, val_transform
from tools.chain import settle, with_flags
from tools.checkpoint import outlive_signals
from tools.distributed import World
from tools.environment import cores
from tools.errors import BadInput
from tools.rng import derive_seed
from tools.training import lr_note

MOST_BAD = 0.01
"""Share of the images of a list that `--bad_images skip` may skip."""


class ImageList(Dataset):
    """Images of a list. Key: (epoch, index); item: (transformed image, label).

    Seed, epoch and index decide the augmentation: it is the same in any worker and after any interruption.

    Args:
        skip: go on without images that cannot be read.
        replace: with `skip`, the next image of the list replaces a skipped one; if False, the item is None.

    Raises (in `__getitem__`):
        BadInput: a file is missing or no image; with `skip`, only if these are more than `MOST_BAD` of all.
    """

    def __init__(
        self,
        root: str | Path,
        samples: Sequence[Sample],
        transform: Callable,
        seed: int,
        skip: bool = False,
        replace: bool = True,
    ):
        self.root, self.samples, self.transform, self.seed = Path(root), samples, transform, seed
        self.skip, self.replace = skip, replace
        by_transform = {TrainPixels: partial(load_pixels, fast=True), ValPixels: load_pixels}
        self.load = by_transform.get(type(transform), load_rgb)
        self.bad = torch.zeros(len(samples), dtype=torch.bool).share_memory_()  # skipped in any worker
        self.logged: set[int] = set()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> tuple | None:
        epoch, index = key
        for shown in range(index, index + len(self.samples)):
            relative, label = self.samples[shown % len(self.samples)]
            try:
                image = self.load(self.root / relative)
            except BadInput as e:
                self.note_bad(shown % len(self.samples), e)
                if not self.replace:
                    return None
                continue
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(derive_seed(self.seed, 'image', epoch, index))
                return self.transform(image), label
        raise BadInput(f'no image under {self.root} can be read')

    def note_bad(self, index: int, error: BadInput) -> None:
        """Count an image as skipped, or raise the error."""
        if not self.skip:
            raise BadInput(f'{error}; leave it out, or give --bad_images skip') from error
        self.bad[index] = True
        self.check_share(str(error))

    def check_share(self, last: str) -> None:
        """Raise BadInput if more than `MOST_BAD` of the images were skipped. `last`: the last one's error."""
        if (count := int(self.bad.sum())) > MOST_BAD * len(self.samples):
            share = f'{count} of {len(self.samples)} images are bad, more than {MOST_BAD:.0%}'
            raise BadInput(f'--bad_images skip: {share}; the last one: {last}')

    def log_skipped(self, log: Callable[[str], object], world: World) -> None:
        """Log path and reason of the images skipped since the last call, in any worker of any process.

        All processes must call it together.

        Raises:
            BadInput: in all processes, if more than `MOST_BAD` of all images were skipped.
        """
        if not self.skip:
            return
        world.all_any(self.bad)
        reason = ''
        fresh = [index for index in self.bad.nonzero().flatten().tolist() if index not in self.logged]
        for index in fresh:
            try:
                self.load(self.root / self.samples[index][0])
            except BadInput as e:
                reason = str(e)
                log(f'skipped: {reason}')
        self.logged |= set(fresh)
        if fresh:
            log(f'--bad_images skip: {len(self.logged)} of {len(self.samples)} images skipped so far')
            self.check_share(reason)


def collate(items: list[tuple | None]) -> tuple[Tensor | RawImages, Tensor] | None:
    """Return the batch (images, labels) of items of an `ImageList`; None if no image could be read."""
    items = [item for item in items if item is not None]
    if not items:
        return None
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
    root: str | Path,
    samples: Sequence[Sample],
    transform: Callable,
    args,
    world: World,
    source: str,
    *,
    for_training: bool,
    workers: int | None = None,
) -> DataLoader:
    """Return a loader of batches (images [N, 3, H, W], labels [N]) for this process. Its sampler is an `EpochSampler`.

    Args:
        args: batch_size and workers, totals over all processes; seed; bad_images ('error' if absent).
        source: list or folder that error messages name.
        for_training: shuffle, drop the last, incomplete batch, replace a bad image by the next one. If False: keep
            order and last batch, leave bad images out.
        workers: instead of args.workers. A process has at most one for each of its cores.

    Raises:
        BadInput: for training, fewer images than one batch, or batches too small for batch norm.
    """
    if for_training and len(samples) < args.batch_size:
        raise BadInput(f'{source}: {len(samples)} images are fewer than one batch of --batch_size {args.batch_size}')
    skip = getattr(args, 'bad_images', 'error') == 'skip'
    dataset = ImageList(root, samples, transform, args.seed, skip, replace=for_training)
    batch_size = world.split_evenly(args.batch_size, '--batch_size')
    if for_training and batch_size < 2:
        raise BadInput(f'--batch_size {args.batch_size}: batch norm needs two images a process to train on')
    workers = min(workers_here(args.workers if workers is None else workers, world), cores())
    return DataLoader(
        dataset,
        batch_size,
        sampler=EpochSampler(dataset, batch_size, world, args.seed, for_training=for_training),
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=outlive_signals,
        pin_memory=world.device.type == 'cuda',
        drop_last=for_training,
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # otherwise worker seeds are drawn from the global generator
    )


def workers_here(workers: int, world: World) -> int:
    """Return the part of this process of a total of workers."""
    return -(-workers // world.size)


def fewer_workers(totals: Mapping[str, int], world: World) -> str:
    """Return a line for the log if `make_loader` makes fewer workers than flags ask for; else ''. `totals`: by flag."""
    asked = {flag: workers_here(total, world) for flag, total in totals.items()}
    fewer = [f'{flag} {totals[flag]}: {cores()} instead of {count}' for flag, count in asked.items() if count > cores()]
    each = 'this process' if world.size == 1 else 'each process'
    return f'{"; ".join(fewer)} in {each}, which may use {cores()} cores' if fewer else ''


def fitting_batch(args, world: World, images: Images, parts: int, note: Callable[[str], object]) -> int:
    """Return --batch_size, or if there are fewer images than that, the most that there are, with a line to `note`.

    Args:
        parts: of `images` that are trained on, 1 or 2.
    """
    counts = [len(samples) for samples in images.samples[:parts]]
    devices = world.size * max(world.gpus, 1)
    most = min(counts) // devices * devices
    if args.batch_size <= min(counts) or most < 2 * devices:  # of too few, `make_loader` raises
        return args.batch_size
    source = images.sources[counts.index(min(counts))]
    note(f'--batch_size {args.batch_size}: {most} instead, {source} has {min(counts)} images to train on')
    return most


def settle_data(
    args, world: World, images: Images, parts: int, sizes: Iterable[tuple[int | None, object]], note: Callable
) -> argparse.Namespace:
    """Return the flags with the input size that an earlier step gave, and with a batch size that the images allow.

    Args:
        parts: see `fitting_batch`.
        sizes: input sizes in files, see `settle`.
        note: called with a line for each value that is not as given.
    """
    img_size = settle('--img_size', args.img_size, sizes, USUAL_SIZE)
    return with_flags(args, img_size=img_size, batch_size=fitting_batch(args, world, images, parts, note))


def load_training_data(
    args, world: World, img_size: int | None, source: str, kept: Path | None
) -> tuple[argparse.Namespace, Images, tuple[DataLoader, DataLoader], list[str]]:
    """Return the settled flags of a training script, its images, their loaders (training, validation), and notes.

    Args:
        img_size: that of the config in `source`, None if it has none.
        kept: see `training_images`.

    Raises:
        BadInput: see `training_images` and `make_loader`.
    """
    notes: list[str] = []
    images = training_images(args, kept, notes.append)
    args = settle_data(args, world, images, 1, [(img_size, source)], notes.append)
    args = with_flags(args, val_root=args.val_root or args.train_root)
    notes += [lr_note(args), fewer_workers({'--workers': args.workers}, world)]
    loaders = _make_loaders(args, world, images, (True, False), (args.workers, args.workers))
    return args, images, loaders, notes


def make_search_loaders(
    args, world: World, images: Images, note: Callable[[str], object]
) -> tuple[DataLoader, DataLoader]:
    """Return the loaders of a search: of the images that train the weights, and the architecture.

    Args:
        args: img_size, batch_size, workers, val_workers (None: half of workers, since the architecture has a batch
            every second step), seed, device_aug, bad_images.
        note: called with lines for the log.

    Raises:
        BadInput: see `make_loader`.
    """
    workers = args.workers, -(-args.workers // 2) if args.val_workers is None else args.val_workers
    note(fewer_workers({'--workers': workers[0], '--val_workers': workers[1]}, world))
    return _make_loaders(args, world, images, (True, True), workers)


def _make_loaders(
    args, world: World, images: Images, for_training: tuple[bool, bool], workers: tuple[int, int]
) -> tuple[DataLoader, DataLoader]:
    """Return the loaders of both parts of `images`; see `make_loader`."""
    first, second = (
        make_loader(root, samples, transform, args, world, source, for_training=trains, workers=count)
        for root, samples, source, transform, trains, count in zip(
            images.roots, images.samples, images.sources, transforms(args), for_training, workers, strict=True
        )
    )
    return first, second


def transforms(args) -> tuple[Callable, Callable]:
    """Return the transforms for training and for validation.

    Args:
        args: img_size, device_aug, and auto_augment in scripts that have it.

    Raises:
        BadInput: both device_aug and auto_augment.
    """
    policy = getattr(args, 'auto_augment', None)
    if args.device_aug and policy:
        raise BadInput(f'--auto_augment {policy} does not run on the device; leave out --device_aug')
    if args.device_aug:
        return TrainPixels(args.img_size), ValPixels(args.img_size)
    return train_transform(args.img_size, policy), val_transform(args.img_size)


def log_skipped(*loaders: DataLoader, log: Callable[[str], object], world: World) -> None:
    """Log the images that loaders of `make_loader` skipped since the last call, in any process."""
    for loader in loaders:
        loader.dataset.log_skipped(log, world)


class Batches:
    """Endless stream of batches: pass after pass over a loader, each in another order.

    Args:
        loader: see `make_loader`.
        start: batches to skip, to continue an interrupted stream.
    """

    def __init__(self, loader: DataLoader, start: int = 0):
        self.loader = loader
        self.batches_a_pass = len(loader)
        self.next_pass, self.skip = divmod(start, self.batches_a_pass)
        self.iterator: Iterator = iter(())

    def __iter__(self) -> 'Batches':
        return self

    def __next__(self) -> tuple[Tensor | RawImages, Tensor]:
        batch = next(self.iterator, None)
        if batch is None:
            self.loader.sampler.set_epoch(self.next_pass, self.skip)
            self.next_pass, self.skip = self.next_pass + 1, 0
            self.iterator = iter(self.loader)
            batch = next(self.iterator)
        return batch
