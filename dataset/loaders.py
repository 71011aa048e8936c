"""Batches of images from lists. Order and augmentation depend only on seed, epoch and image."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate

from dataset.device_aug import RawImages, TrainPixels, ValPixels
from dataset.images import load_pixels, load_rgb
from dataset.lists import (
    Sample,
    check_labels,
    count_classes,
    list_folder,
    read_classes,
    read_list,
    split_by_class,
    warn_of_overlap,
    write_list,
)
from dataset.transforms import train_transform, val_transform
from tools.distributed import World
from tools.environment import cores
from tools.errors import BadInput
from tools.options import TRAIN_LIST, VAL_LIST
from tools.rng import derive_seed
from tools.run.stop import outlive_signals

CLASSES = Path(__file__).parent / 'imagenet100_classes.txt'
"""The 100 classes of ImageNet in the default lists of a search."""

MOST_BAD = 0.01
"""Share of the images of a list that `--bad_images skip` may skip."""

FIRST_IMAGES, FLAT, DARK = 4, 2.0, 64
"""Number of images that `warn_of_flat_images` reads; its bounds on standard deviation and largest value, of 255."""


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
            raise error
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


def fewer_workers(flag: str, workers: int, world: World) -> str:
    """Return a line for the log if `make_loader` makes fewer workers than the flag asks for; else ''."""
    if (asked := workers_here(workers, world)) <= cores():
        return ''
    each = 'this process' if world.size == 1 else 'each process'
    return f'{flag} {workers}: {cores()} instead of {asked} in {each}, which may use {cores()} cores'


def make_train_val_loaders(args, world: World) -> tuple[tuple[DataLoader, DataLoader], int]:
    """Return the loaders of a training script (training, validation), and the number of classes.

    Args:
        args: roots, lists, num_classes, img_size, batch_size, workers, seed, auto_augment, device_aug, bad_images.

    Raises:
        BadInput: see `read_list` and `make_loader`.
    """
    warn = partial(print, flush=True) if world.is_first else lambda _: None
    lists, roots = (args.train_list, args.val_list), (args.train_root, args.val_root)
    train, val, num_classes = read_train_val(lists, roots, args.num_classes, warn)
    if line := fewer_workers('--workers', args.workers, world):
        warn(line)
    train_transform, val_transform = transforms(args)
    train_loader = make_loader(args.train_root, train, train_transform, args, world, lists[0], for_training=True)
    val_loader = make_loader(args.val_root, val, val_transform, args, world, lists[1], for_training=False)
    return (train_loader, val_loader), num_classes


def make_search_loaders(args, world: World, note: Callable[[str], object]) -> tuple[tuple[DataLoader, DataLoader], int]:
    """Return the loaders of a search (images that train the weights, the architecture), and the number of classes.

    Args:
        args: img_root, train_list, val_list, num_classes, img_size, batch_size, workers, val_workers (None: half of
            workers, since the architecture has a batch every second step), seed, device_aug, bad_images.
        note: called with lines for the log.

    Raises:
        BadInput: see `read_list` and `make_loader`.
    """
    note(world.from_rank0(lambda: make_default_lists(args)))
    lists = args.train_list, args.val_list
    train, val, num_classes = read_train_val(lists, (args.img_root, args.img_root), args.num_classes, note)
    workers = args.workers, -(-args.workers // 2) if args.val_workers is None else args.val_workers
    for flag, total in zip(('--workers', '--val_workers'), workers, strict=True):
        note(fewer_workers(flag, total, world))
    loaders = [
        make_loader(args.img_root, samples, transform, args, world, source, for_training=True, workers=count)
        for samples, transform, source, count in zip((train, val), transforms(args), lists, workers, strict=True)
    ]
    return tuple(loaders), num_classes


def make_default_lists(args) -> str:
    """Create the default lists of a search if neither exists; returns a line for the log."""
    paths = Path(args.train_list), Path(args.val_list)
    if (args.train_list, args.val_list) != (TRAIN_LIST, VAL_LIST) or any(path.exists() for path in paths):
        return ''
    classes = read_classes(CLASSES)
    parts = split_by_class(list_folder(args.img_root, classes), ratio=0.8, seed=args.seed)
    for part, path in zip(parts, paths, strict=True):
        write_list(part, path)
    return f'made {paths[0]} and {paths[1]}: {len(parts[0])} and {len(parts[1])} images of {len(classes)} classes'


def read_train_val(
    paths: tuple[str, str], roots: tuple[str, str], num_classes: int | None, warn: Callable[[str], object]
) -> tuple[list[Sample], list[Sample], int]:
    """Read both lists of a run, check them and compare them.

    Args:
        num_classes: None: as many as the training list names.
        warn: called with warnings, and with the number of classes if the training list decides it.

    Returns:
        (training, validation, number of classes)

    Raises:
        BadInput: see `read_list` and `check_labels`.
    """
    train = read_list(paths[0], roots[0], num_classes, warn)
    if num_classes is None:
        num_classes = count_classes(train)
        warn(f'--num_classes {num_classes}: from the labels in {paths[0]}')
    val = read_list(paths[1], roots[1], num_classes, warn)
    check_labels((train, val), paths, warn)
    for root, samples, path in zip(roots, (train, val), paths, strict=True):
        warn_of_flat_images(root, samples, path, warn)
    if Path(roots[0]).resolve() == Path(roots[1]).resolve():
        warn_of_overlap(train, val, paths, warn)
    return train, val, num_classes


def warn_of_flat_images(
    root: str | Path, samples: Sequence[Sample], path: str | Path, warn: Callable[[str], object] = print
) -> None:
    """Warn in one line if the first images of a list are all nearly constant or all nearly black.

    A likely cause is a range of values that their format does not have, such as 12 bits in 16.
    """
    spreads, peaks = [], []
    for relative, _ in samples[:FIRST_IMAGES]:
        with suppress(BadInput):  # loading it for a batch will raise or skip
            pixels = load_pixels(Path(root) / relative).float()
            spreads.append(pixels.std((1, 2), correction=0).max().item())
            peaks.append(int(pixels.max()))
    if spreads and (max(spreads) < FLAT or max(peaks) < DARK):
        warn(
            f'warning: the first {len(spreads)} images of {path} are nearly constant or black (standard deviation up to'
            f' {max(spreads):.1f}, values up to {max(peaks)}, of 255), such as {samples[0][0]}; is their range right?'
        )


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
