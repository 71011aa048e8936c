"""Images of a run: from lists, or from folders of class folders, which all scripts split in one way."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from dataset.folders import find_pair, subfolders, unwrap
from dataset.images import MEAN, STD, load_pixels
from dataset.lists import (
    Sample,
    check_labels,
    class_file,
    class_names,
    count_classes,
    list_folder,
    list_text,
    parse_list,
    read_classes,
    read_list,
    split_by_class,
    warn_of_overlap,
    write_list,
)
from tools.distributed import World
from tools.errors import BadInput
from tools.options import TRAIN_LIST, VAL_LIST

CLASSES = Path(__file__).parent / 'imagenet100_classes.txt'
"""The 100 classes of ImageNet in the default lists of a search."""

RATIO, SEED = 0.8, 2
"""Share of a class in the first part of a split, and the split's seed. Those of every folder without lists, whatever
the seed of the run, so that a search and all trainings on a folder agree on what is left for validation."""

LISTS = 'train', 'val', 'search_train', 'search_val'
"""Lists that a folder is split into, as files `<name>.txt`; the last two are the parts of the first one."""

FIRST_IMAGES, FLAT, DARK = 4, 2.0, 64
"""Number of images that `warn_of_flat_images` reads; its bounds on standard deviation and largest value, of 255."""

Note = Callable[[str], object]


@dataclass(frozen=True)
class FolderLists:
    """All lists of a folder: samples by the names of `LISTS`, the folders that their paths start from, class names."""

    train_root: Path
    val_root: Path
    samples: dict[str, list[Sample]]
    names: list[str]

    def texts(self) -> dict[str, str]:
        """Return the lists as files: text by file name."""
        return {f'{name}.txt': list_text(samples) for name, samples in self.samples.items()}


@dataclass(frozen=True)
class Images:
    """Images of a run: those that train the weights, and those that validate or, in a search, train the architecture.

    Attributes:
        samples, roots, sources: of both; a source is the list or folder that messages name.
        files: lists made from folders, for the run folder: text by file name.
        lists: paths of lists that were there before the run, None for images of folders.
    """

    samples: tuple[list[Sample], list[Sample]]
    roots: tuple[str, str]
    sources: tuple[str, str]
    num_classes: int
    files: dict[str, str] = field(default_factory=dict)
    lists: tuple[str | None, str | None] = (None, None)
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
        return class_names(self.samples[0])

    @cached_property
    def digest(self) -> str:
        """16 hex digits that change with any path, label or order."""
        lines = '\n\n'.join('\n'.join(f'{path} {label}' for path, label in samples) for samples in self.samples)
        return hashlib.sha256(lines.encode(errors='replace')).hexdigest()[:16]


def find_roots(root: str | Path, note: Note = print, keep: bool = False) -> tuple[Path, Path]:
    """Return the folders of training and of validation images; one folder twice if `root` has no such pair.

    Args:
        keep: do not skip folders that hold nothing but one folder.

    Raises:
        BadInput: no such folder, or a pair whose second one has no class folders.
    """
    root, unwrapped = Path(root), Path if keep else unwrap
    if not root.is_dir():
        raise BadInput(f'image root {root}: no such folder; expected one with class folders, or with train/ and val/')
    outer = unwrapped(root)
    pair = find_pair(subfolders(outer))
    if not pair:
        return outer, outer
    if others := [name for name in subfolders(outer) if name not in pair]:
        note(f'{outer}: left out {", ".join(others)}; the lists are of {pair[0]} and {pair[1]}')
    train_root, val_root = (unwrapped(outer / name) for name in pair)
    if not subfolders(val_root):
        raise BadInput(f'{val_root}: no class folders in it; to split the training images: --img_root {train_root}')
    return train_root, val_root


def split_folder(
    roots: tuple[Path, Path],
    classes: Sequence[str] | None = None,
    ratio: float = RATIO,
    seed: int = SEED,
    note: Note = print,
    for_search: bool = True,
) -> FolderLists:
    """Return the lists of a folder with train/ and val/, or of one folder of class folders, split in each class.

    Args:
        roots: see `find_roots`.
        classes: class folders to take; None: all.
        for_search: split the training images again, into those of a search's weights and of its architecture.

    Raises:
        BadInput: see `list_folder` and `split_by_class`; or the two folders differ in their classes.
    """
    train_root, val_root = roots
    train = list_folder(train_root, classes, note)
    names = [Path(samples[0][0]).parts[0] for samples in train]
    if val_root != train_root:
        val = list_folder(val_root, classes, note)
        others = [Path(samples[0][0]).parts[0] for samples in val]
        if names != others:
            odd = sorted(set(names) ^ set(others))
            raise BadInput(
                f'{train_root} and {val_root} differ in {len(odd)} class folders: {", ".join(odd[:3])}; to list them'
                ' all the same, use --list train.txt for one and --list val.txt --like train.txt for the other'
            )
        parts = flat(train), flat(val)
    else:
        parts = split_by_class(train, ratio, seed)
    if for_search:
        by_class = [list(samples) for _, samples in groupby(parts[0], key=itemgetter(1))]
        parts += split_by_class(by_class, ratio, seed)
    return FolderLists(train_root, val_root, dict(zip(LISTS, parts, strict=False)), names)


def flat(by_class: Sequence[Sequence[Sample]]) -> list[Sample]:
    """Return the samples of all classes as one list."""
    return [sample for samples in by_class for sample in samples]


def list_like(root: str | Path, names: Sequence[str], note: Note) -> list[Sample]:
    """Return the images of class folders whose labels are the places of their names in `names`.

    Raises:
        BadInput: see `list_folder`.
    """
    return flat(list_folder(root, {name: label for label, name in enumerate(names)}, note))


def search_images(args, world: World, kept: Path | None, note: Note) -> Images:
    """Return the images of a search: of its lists, else those that `split_folder` makes of `img_root`.

    Args:
        args: img_root, train_list, val_list, num_classes, seed. Without lists, an `img_root` of ImageNet gets the
            default lists, which are made if neither exists.
        kept: run folder that the search goes on in, with its lists if it made some.
        note: called with lines for the log.

    Raises:
        BadInput: see `read_train_val` and `split_folder`.
    """
    _check_pair(args)
    if args.train_list or is_imagenet(args.img_root):
        lists = (args.train_list, args.val_list) if args.train_list else (TRAIN_LIST, VAL_LIST)
        note(world.from_rank0(lambda: make_default_lists(args.img_root, lists, args.seed)))
        return replace(read_train_val(lists, (args.img_root, args.img_root), args.num_classes, note), lists=lists)
    train_root, val_root = find_roots(args.img_root, note)
    roots = str(train_root), str(train_root)
    if lists := _kept_lists(kept, LISTS[2:]):
        note(f'lists: {lists[0]} and {lists[1]}, which this run made of {args.img_root}')
        return read_train_val(lists, roots, args.num_classes, note)
    lists = split_folder((train_root, val_root), note=note)
    samples = lists.samples['search_train'], lists.samples['search_val']
    note(
        f'{args.img_root}: {len(lists.names)} class folders; {len(samples[0])} images train the weights,'
        f' {len(samples[1])} the architecture, {len(lists.samples["val"])} are left for validation (lists: *.txt in the'
        ' run folder)'
    )
    sources = f'search_train.txt of {train_root}', f'search_val.txt of {train_root}'
    return _of_folders(samples, roots, sources, args.num_classes, len(lists.names), lists.texts(), note)


def training_images(args, kept: Path | None, note: Note) -> Images:
    """Return the images of a training: of its lists, else of its folders.

    If both folders are the same, `split_folder` splits it; else each has its class folders, and the training images
    number the classes.

    Args:
        args: train_root, val_root (None: train_root), train_list, val_list, num_classes.
        kept, note: see `search_images`.

    Raises:
        BadInput: see `read_train_val`, `split_folder` and `list_folder`.
    """
    _check_pair(args)
    given = args.train_root, args.val_root or args.train_root
    if args.train_list:
        lists = args.train_list, args.val_list
        return replace(read_train_val(lists, given, args.num_classes, note), lists=lists)
    one_folder = Path(given[0]).resolve() == Path(given[1]).resolve()
    roots = find_roots(given[0], note) if one_folder else tuple(map(Path, given))
    texts = str(roots[0]), str(roots[1])
    if lists := _kept_lists(kept, LISTS[:2]):
        note(f'lists: {lists[0]} and {lists[1]}, which this run made of {given[0]}')
        return read_train_val(lists, texts, args.num_classes, note)
    if one_folder:
        lists = split_folder(roots, note=note, for_search=False)
        samples, names = (lists.samples['train'], lists.samples['val']), lists.names
    else:
        train = list_folder(roots[0], None, note)
        names = [Path(of_class[0][0]).parts[0] for of_class in train]
        samples = flat(train), list_like(roots[1], names, note)
    note(
        f'{" and ".join(dict.fromkeys(texts))}: {len(names)} class folders; {len(samples[0])} images for training,'
        f' {len(samples[1])} for validation (lists: *.txt in the run folder)'
    )
    files = {f'{name}.txt': list_text(part) for name, part in zip(LISTS, samples, strict=False)}
    sources = f'train.txt of {roots[0]}', f'val.txt of {roots[1]}'
    return _of_folders(samples, texts, sources, args.num_classes, len(names), files, note)


def evaluation_images(args, num_classes: int, names: Sequence[str] | None, trained: Mapping, note: Note) -> Images:
    """Return the images of a test: of its list; else of `val_root`, with the labels that the weights have.

    Images of the folder that the weights were trained on are those that the training left for validation.

    Args:
        args: val_root, val_list, weights.
        names: class names by label, as the weights have them.
        trained: flags of the training.

    Raises:
        BadInput: see `read_list` and `list_folder`; or the folder holds training images, and no list names them.
    """
    root, source = Path(args.val_root), args.val_list
    if not source:
        root = find_roots(root, note)[1]
        source = _validation_list(args, root, trained, note)
    if source:
        samples = read_list(source, root, num_classes, note)
    else:
        samples = list_like(root, names, note) if names else flat(list_folder(root, None, note))
        if (found := count_classes(samples)) > num_classes:
            raise BadInput(f'--val_root {root}: {found} class folders, the weights are for {num_classes} classes')
        if not names:
            note(f'warning: {root}: labels by the sorted names of the folders; the weights name no classes')
        note(f'{root}: {len(samples)} images of {len({label for _, label in samples})} classes')
    return Images((samples, samples), (str(root), str(root)), (str(source or root),) * 2, num_classes)


def _validation_list(args, root: Path, trained: Mapping, note: Note) -> str | None:
    """Return the validation list of the training, if that took its images from the folder to test on; else None."""
    trained_on = trained.get('train_root')
    if not isinstance(trained_on, str):
        return None
    places = {Path(trained_on).resolve()}
    if Path(trained_on).is_dir() and not trained.get('train_list'):
        places.add(find_roots(trained_on, lambda _: None)[0].resolve())
    if root.resolve() not in places:
        return None
    for path in (Path(args.weights).parent / 'val.txt', Path(str(trained.get('val_list') or ''))):
        if path.is_file():
            note(f'--val_list {path}: the images of {root} that its training left for validation')
            return str(path)
    raise BadInput(
        f'--val_root {root}: the weights were trained on images of this folder; name the others with --val_list'
    )


def training_flags(flags: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the flags of a training's images, from those of the search before it; none if its folder is gone.

    These are the lists that the search made; or those that `make_lists.py --to` wrote beside the lists of the search;
    or the folder of the search with the validation folder beside it; or else the lists of the search.

    Args:
        flags: of the search.
        folder: of the search.
    """
    given = flags.get('img_root')
    if not isinstance(given, str) or not Path(given).is_dir():
        return {}
    lists = {'train_list': folder / 'train.txt', 'val_list': folder / 'val.txt'}
    if not flags.get('train_list') and all(path.is_file() for path in lists.values()):
        train_root, val_root = find_roots(given, lambda _: None)
        return {'train_root': train_root, 'val_root': val_root, **lists}
    root = Path(given).absolute()
    pair = find_pair(subfolders(root.parent))
    val_root = root.parent / pair[1] if pair and pair[0] == root.name else root
    roots = {'train_root': root, 'val_root': val_root}
    beside = Path(str(flags.get('train_list') or TRAIN_LIST)).parent
    lists = {'train_list': beside / 'train.txt', 'val_list': beside / 'val.txt'}
    if all(path.is_file() for path in lists.values()):
        return {**roots, **lists}
    if val_root != root or not flags.get('train_list'):
        return roots
    return {**roots, **{name: Path(str(flags.get(name))) for name in ('train_list', 'val_list')}}


def _kept_lists(folder: Path | None, names: Sequence[str]) -> tuple[str, str] | None:
    """Return the lists of these names in a run folder; None if it has none."""
    paths = [folder / f'{name}.txt' for name in names] if folder else []
    return tuple(map(str, paths)) if paths and all(path.is_file() for path in paths) else None


def _of_folders(
    samples: tuple[list[Sample], list[Sample]],
    roots: tuple[str, str],
    sources: tuple[str, str],
    given: int | None,
    found: int,
    files: dict[str, str],
    note: Note,
) -> Images:
    if given and given < found:
        raise BadInput(f'{roots[0]}: {found} class folders, --num_classes {given} is fewer')
    if not given:
        note(f'--num_classes {found}: from the class folders of {roots[0]}')
    for root, part, source in zip(roots, samples, sources, strict=True):
        warn_of_flat_images(root, part, source, note)
    return Images(samples, roots, sources, given or found, files)


def _check_pair(args) -> None:
    if bool(args.train_list) != bool(args.val_list):
        missing = '--train_list' if args.val_list else '--val_list'
        raise BadInput(f'{missing} is missing: give both lists, or neither for folders of class folders')


def is_imagenet(root: str | Path) -> bool:
    """Return whether the default lists of a search fit a folder: it has half of their classes, or their images."""
    names = read_classes(CLASSES)
    if 2 * sum((Path(root) / name).is_dir() for name in names) >= len(names):
        return True
    return Path(TRAIN_LIST).is_file() and (Path(root) / parse_list(TRAIN_LIST)[0][0]).is_file()


def make_default_lists(root: str | Path, lists: tuple[str, str], seed: int) -> str:
    """Create the default lists of a search if these are they and neither exists; returns a line for the log."""
    paths = Path(lists[0]), Path(lists[1])
    if lists != (TRAIN_LIST, VAL_LIST) or any(path.exists() for path in paths):
        return ''
    classes = read_classes(CLASSES)
    parts = split_by_class(list_folder(root, classes), ratio=RATIO, seed=seed)
    for part, path in zip(parts, paths, strict=True):
        write_list(part, path)
    return f'made {paths[0]} and {paths[1]}: {len(parts[0])} and {len(parts[1])} images of {len(classes)} classes'


def read_train_val(paths: tuple[str, str], roots: tuple[str, str], num_classes: int | None, note: Note) -> Images:
    """Read both lists of a run, check them and compare them.

    Args:
        num_classes: None: as many as the training list names.
        note: called with warnings, and with the number of classes if the training list decides it.

    Raises:
        BadInput: see `read_list` and `check_labels`.
    """
    train = read_list(paths[0], roots[0], num_classes, note)
    if num_classes is None:
        num_classes = count_classes(train)
        note(f'--num_classes {num_classes}: from the labels in {paths[0]}')
    val = read_list(paths[1], roots[1], num_classes, note)
    check_labels((train, val), paths, note)
    for root, samples, path in zip(roots, (train, val), paths, strict=True):
        warn_of_flat_images(root, samples, path, note)
    if Path(roots[0]).resolve() == Path(roots[1]).resolve():
        warn_of_overlap(train, val, paths, note)
    return Images((train, val), roots, (str(paths[0]), str(paths[1])), num_classes)


def warn_of_flat_images(root: str | Path, samples: Sequence[Sample], path: str | Path, warn: Note = print) -> None:
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
