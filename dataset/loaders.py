"""Images from lists, in batches whose order and augmentation depend on seed, epoch and image alone."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from dataset.lists import Sample, read_list
from dataset.transforms import train_transform, val_transform
from tools.distributed import World
from tools.errors import BadInput
from tools.interrupt import outlive_signals
from tools.rng import derive_seed


class ImageList(Dataset):
    """The images of a list: items (image [3, H, W], label), asked for by (epoch, index).

    Seed, epoch and index decide the augmentation: it is the same in any worker and after any interruption.

    Raises (in `__getitem__`):
        BadInput: a file that is missing or no image.
    """

    def __init__(self, root: str | Path, samples: Sequence[Sample], transform: Callable, seed: int):
        self.root, self.samples, self.transform, self.seed = Path(root), samples, transform, seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        relative, label = self.samples[index]
        image = load_rgb(self.root / relative)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(self.seed, 'image', epoch, index))
            return self.transform(image), label


class EpochSampler(DistributedSampler):
    """torch's DistributedSampler that yields (epoch, index) and can start at a later batch.

    It gives no image twice: where the images do not divide evenly, some processes get one fewer.
    """

    def __init__(self, dataset: Dataset, batch_size: int, world: World, shuffle: bool, drop_last: bool, seed: int):
        super().__init__(
            dataset, world.size, world.rank, shuffle=shuffle, seed=derive_seed(seed, 'order') >> 1, drop_last=drop_last
        )
        self.batch_size, self.start_batch = batch_size, 0

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the order of the next iteration, and the batch it starts with."""
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
    shuffle: bool,
    drop_last: bool,
    what: str,
    start_worker: Callable[[int], None] | None = None,
) -> DataLoader:
    """A loader of batches (images [N, 3, H, W], labels [N]) for this process. Its `sampler` is an `EpochSampler`.

    Args:
        args: batch_size and workers, totals over all processes, and seed.
        what: names the images in errors.
        start_worker: called with its number in each process that loads images.

    Raises:
        BadInput: with `drop_last`, fewer images than one batch.
    """
    if drop_last and len(samples) < args.batch_size:
        raise BadInput(f'{what}: {len(samples)} images are fewer than one batch of --batch_size {args.batch_size}')
    dataset = ImageList(root, samples, transform, args.seed)
    batch_size = world.share(args.batch_size, '--batch_size')
    workers = -(-args.workers // world.size)
    return DataLoader(
        dataset,
        batch_size,
        sampler=EpochSampler(dataset, batch_size, world, shuffle, drop_last, args.seed),
        num_workers=workers,
        worker_init_fn=start_worker,
        pin_memory=world.device.type == 'cuda',
        drop_last=drop_last,
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # of worker seeds, which nothing uses; keeps the global generator untouched
    )


def make_train_val_loaders(args, world: World) -> tuple[DataLoader, DataLoader]:
    """The loaders of a training script from its flags (roots, lists, num_classes, img_size, batch_size, workers, seed,
    auto_augment).

    Raises:
        BadInput: see `read_list` and `make_loader`.
    """
    train = read_list(args.train_list, args.train_root, args.num_classes)
    val = read_list(args.val_list, args.val_root, args.num_classes)
    for_training, for_validation = train_transform(args.img_size, args.auto_augment), val_transform(args.img_size)
    start = outlive_signals
    return (
        make_loader(args.train_root, train, for_training, args, world, True, True, args.train_list, start),
        make_loader(args.val_root, val, for_validation, args, world, False, False, args.val_list, start),
    )


class Batches:
    """An endless stream of batches: pass after pass over a loader, each in another order.

    Args:
        loader: see `make_loader`.
        start: batches to skip, so that a stream can go on where another ended.
    """

    def __init__(self, loader: DataLoader, start: int = 0):
        self.loader = loader
        self.batches_a_pass = len(loader)
        self.next_pass, self.skip = divmod(start, self.batches_a_pass)
        self.iterator: Iterator = iter(())

    def next(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The next batch, on the device."""
        batch = next(self.iterator, None)
        if batch is None:
            self.loader.sampler.set_epoch(self.next_pass, self.skip)
            self.next_pass, self.skip = self.next_pass + 1, 0
            self.iterator = iter(self.loader)
            batch = next(self.iterator)
        images, labels = batch
        return images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def load_rgb(path: str | Path) -> Image.Image:
    """Decode an image file of any mode to RGB.

    Raises:
        BadInput: missing, damaged, or not an image.
    """
    try:
        with Image.open(path) as image:
            return image.convert('RGB')
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise BadInput(f'{path}: cannot be read as an image ({e})') from e
