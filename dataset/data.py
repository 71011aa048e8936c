"""Images of a run, from lists or folders, with their loaders: one call per script."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from dataset.lists import (
    LISTS,
    RATIO,
    Sample,
    check_labels,
    class_file,
    class_names,
    count_classes,
    find_roots,
    flat,
    list_folder,
    list_like,
    list_text,
    parse_list,
    read_classes,
    read_list,
    split_by_class,
    split_folder,
    write_list,
)
from dataset.loaders import ImageSet, Loading, fitting_batch, make_loader, make_transforms
from dataset.transforms import MEAN, STD
from tools.distributed import World
from tools.errors import BadInput
from tools.options import TRAIN_LIST, VAL_LIST

log = logging.getLogger('tf-nas')

CLASSES = Path(__file__).parent / 'imagenet100_classes.txt'  # the classes of the default lists of a search


@dataclass(frozen=True)
class Source:
    """Where a run's images are, as its flags say.

    Attributes:
        root, val_root: folders of training and validation images.
        train_list, val_list: both, or None: the images are those of the class folders.
        num_classes: None: the images decide.
    """

    root: str
    val_root: str
    train_list: str | None = None
    val_list: str | None = None
    num_classes: int | None = None

    def __post_init__(self):
        if bool(self.train_list) != bool(self.val_list):
            missing = '--train_list' if self.val_list else '--val_list'
            raise BadInput(f'{missing} is missing: give both lists, or neither for folders of class folders')


@dataclass(frozen=True)
class Data:
    """Images of a run: those that train the weights, and those that validate or, in a search, train the architecture.

    Attributes:
        files: lists made from folders, for the run folder: text by file name.
        lists: paths of lists that were there before the run, None for images of folders.
        loaders: of `train` and `val`; empty until they are made.
        batch_size: images per step over all devices.
        mean, std: normalisation of the images.
    """

    train: ImageSet
    val: ImageSet
    num_classes: int
    files: dict[str, str] = field(default_factory=dict)
    lists: tuple[str | None, str | None] = (None, None)
    loaders: tuple[DataLoader, ...] = ()
    batch_size: int = 0
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD

    @property
    def flags(self) -> dict[str, Any]:
        """Values of flags for headers and checkpoints."""
        train_list, val_list = (path and str(Path(path).absolute()) for path in self.lists)
        return {'num_classes': self.num_classes, 'train_list': train_list, 'val_list': val_list}

    @property
    def names(self) -> list[str] | None:
        """Class names by label; see `class_names`."""
        return self._names if len(self._names or ()) == self.num_classes else None

    @property
    def run_files(self) -> dict[str, str]:
        """Files for the run folder: the lists, if they were made, and the class names."""
        return self.files | class_file(self._names)

    @cached_property
    def _names(self) -> list[str] | None:
        return class_names(self.train.samples)

    @cached_property
    def digest(self) -> str:
        """16 hex digits that change with any path, label or order."""
        texts = []
        for images in (self.train, self.val):
            texts.append('\n'.join(f'{path} {label}' for path, label in images.samples))
        return hashlib.sha256('\n\n'.join(texts).encode(errors='replace')).hexdigest()[:16]


def load_search_data(source: Source, loading: Loading, world: World, kept: Path | None) -> Data:
    """Return the images and loaders of a search; both parts train, the weights and the architecture.

    Args:
        kept: run folder that the search goes on in, with its lists if it made some.

    Raises:
        BadInput: see `search_images` and `make_loader`.
    """
    data = search_images(source, loading.seed, world, kept)
    loading = replace(loading, batch_size=fitting_batch(loading.batch_size, (data.train, data.val), world))
    return _with_loaders(data, loading, world, val_trains=True)


def load_training_data(source: Source, loading: Loading, world: World, kept: Path | None) -> Data:
    """Return the images and loaders of a training.

    Args:
        kept: run folder that the training goes on in, with its lists if it made some.

    Raises:
        BadInput: see `training_images` and `make_loader`.
    """
    data = training_images(source, kept)
    loading = replace(loading, batch_size=fitting_batch(loading.batch_size, (data.train,), world))
    return _with_loaders(data, loading, world, val_trains=False)


def _with_loaders(data: Data, loading: Loading, world: World, val_trains: bool) -> Data:
    transforms = make_transforms(loading)
    train = make_loader(data.train, transforms[0], loading, world, for_training=True)
    loading = replace(loading, workers=loading.val_workers)
    val = make_loader(data.val, transforms[1], loading, world, for_training=val_trains)
    return replace(data, loaders=(train, val), batch_size=loading.batch_size)


def search_images(source: Source, seed: int, world: World, kept: Path | None) -> Data:
    """Return the images of a search: of its lists, else those that `split_folder` makes of the folder.

    Without lists, a folder of ImageNet gets the default lists, which are made if neither exists.

    Raises:
        BadInput: see `read_images` and `split_folder`.
    """
    source = replace(source, val_root=source.root)
    if not source.train_list and is_imagenet(source.root):
        source = replace(source, train_list=TRAIN_LIST, val_list=VAL_LIST)
    if source.train_list:
        world.from_rank0(lambda: make_default_lists(source, seed))
        return read_images(source)
    roots = find_roots(source.root)
    lists = _kept_lists(kept, LISTS[2:]) or split_folder(roots)
    return _folder_images(source, lists, LISTS[2:], (roots[0], roots[0]))


def training_images(source: Source, kept: Path | None) -> Data:
    """Return the images of a training: of its lists, else of its folders, see `split_folder`.

    Raises:
        BadInput: see `read_images` and `split_folder`.
    """
    if source.train_list:
        return read_images(source)
    roots = Path(source.root), Path(source.val_root)
    if roots[0].resolve() == roots[1].resolve():
        roots = find_roots(source.root)
    lists = _kept_lists(kept, LISTS[:2]) or split_folder(roots, for_search=False)
    return _folder_images(source, lists, LISTS[:2], roots)


def read_images(source: Source) -> Data:
    """Read both lists of a run, check them and compare them.

    Raises:
        BadInput: see `read_list` and `check_labels`.
    """
    train_list, val_list = source.train_list, source.val_list
    train = read_list(train_list, source.root, source.num_classes)
    num_classes = source.num_classes or count_classes(train)
    if not source.num_classes:
        log.info('--num_classes %d: from the labels in %s', num_classes, train_list)
    val = read_list(val_list, source.val_root, num_classes)
    check_labels({train_list: train, val_list: val})
    shared = {path for path, _ in train} & {path for path, _ in val}
    if shared and Path(source.root).resolve() == Path(source.val_root).resolve():
        log.warning('%d images are both in %s and in %s, such as %s', len(shared), train_list, val_list, min(shared))
    sets = ImageSet(source.root, train, train_list), ImageSet(source.val_root, val, val_list)
    return Data(*sets, num_classes, lists=(train_list, val_list))


def _kept_lists(folder: Path | None, names: Sequence[str]) -> dict[str, list[Sample]]:
    """Return the lists that the run made before it was interrupted; its folder may have grown since."""
    paths = {name: folder / f'{name}.txt' for name in names} if folder else {}
    if not all(path.is_file() for path in paths.values()):
        return {}
    return {name: parse_list(path) for name, path in paths.items()}


def _folder_images(
    source: Source, lists: Mapping[str, list[Sample]], names: Sequence[str], roots: Sequence[Path]
) -> Data:
    """Return the images of two of the lists of a folder."""
    sets = []
    for root, name in zip(roots, names, strict=True):
        sets.append(ImageSet(str(root), lists[name], f'{name}.txt of {root}'))
        log.info('%s: %d images (in the run folder)', sets[-1].source, len(lists[name]))
    classes = count_classes(sets[0].samples)
    if source.num_classes and source.num_classes < classes:
        raise BadInput(f'{roots[0]}: {classes} class folders, --num_classes {source.num_classes} is fewer')
    if not source.num_classes:
        log.info('--num_classes %d: from the class folders of %s', classes, roots[0])
    files = {f'{name}.txt': list_text(samples) for name, samples in lists.items()}
    return Data(*sets, source.num_classes or classes, files)


def load_evaluation_data(
    source: Source, loading: Loading, world: World, names: Sequence[str] | None, weights: str, trained: Mapping
) -> tuple[ImageSet, DataLoader]:
    """Return the images of a test and their loader; see `evaluation_images`."""
    images = evaluation_images(source, names, weights, trained)
    return images, make_loader(images, make_transforms(loading)[1], loading, world, for_training=False)


def evaluation_images(source: Source, names: Sequence[str] | None, weights: str, trained: Mapping) -> ImageSet:
    """Return the images of a test: of its list; else of the folder, with the labels that the weights have.

    Images of the folder that the weights were trained on are those that the training left for validation.

    Args:
        source: val_root, its list if any, and the number of classes of the weights.
        names: class names by label, as the weights have them.
        trained: flags of the training.

    Raises:
        BadInput: see `read_list` and `list_folder`; or the folder holds training images, and no list names them.
    """
    root, path = Path(source.val_root), source.val_list
    if not path:
        root = find_roots(root)[1]
        path = _validation_list(root, weights, trained)
    if path:
        return ImageSet(str(root), read_list(path, root, source.num_classes), path)
    if names:
        samples = flat(list_like(root, {name: label for label, name in enumerate(names)}))
    else:
        samples = flat(list_folder(root))
        log.warning('%s: labels by the sorted names of the folders; the weights name no classes', root)
    if count_classes(samples) > source.num_classes:
        raise BadInput(f'--val_root {root}: its classes are more than the {source.num_classes} of the weights')
    return ImageSet(str(root), samples, str(root))


def _validation_list(root: Path, weights: str, trained: Mapping) -> str | None:
    """Return the validation list of the training, if that took its images from the folder to test on; else None."""
    trained_on = trained.get('train_root')
    if not isinstance(trained_on, str):
        return None
    if Path(trained_on).is_dir() and not trained.get('train_list'):
        trained_on = find_roots(trained_on)[0]
    if root.resolve() != Path(trained_on).resolve():
        return None
    for path in (Path(weights).parent / 'val.txt', Path(str(trained.get('val_list') or ''))):
        if path.is_file():
            log.info('--val_list %s: the images of %s that its training left for validation', path, root)
            return str(path)
    raise BadInput(
        f'--val_root {root}: the weights were trained on images of this folder; name the others with --val_list'
    )


def is_imagenet(root: str | Path) -> bool:
    """Return whether the default lists of a search fit a folder: it has half of their classes, or their images."""
    names = read_classes(CLASSES)
    if 2 * sum((Path(root) / name).is_dir() for name in names) >= len(names):
        return True
    return Path(TRAIN_LIST).is_file() and (Path(root) / parse_list(TRAIN_LIST)[0][0]).is_file()


def make_default_lists(source: Source, seed: int) -> None:
    """Create the default lists of a search if these are they and neither exists."""
    lists = TRAIN_LIST, VAL_LIST
    if (source.train_list, source.val_list) != lists or any(Path(path).exists() for path in lists):
        return
    parts = split_by_class(list_folder(source.root, read_classes(CLASSES)), RATIO, seed)
    for part, path in zip(parts, lists, strict=True):
        write_list(part, path)
        log.info('made %s: %d images', path, len(part))
