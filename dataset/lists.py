"""Image lists, `relative/path.JPEG label` per line, and the folders of class folders that they are made from.

Three rules for folders replace guesses. Whoever has another layout gives the folders of both parts, or lists.

1. Training images are in `train`, validation images in `val`, `valid`, `validation` or `test`, in any case. A single
   folder around everything is passed through.
2. A class folder holds images, or folders of images; links are followed. Hidden files and those of other programs are
   left out and counted. Folders that look like splits, and classes without images, are refused.
3. In lists, one outermost folder has one label.
"""

import itertools
import logging
import os
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from tools.errors import BadInput
from tools.files import write_text
from tools.options import TRAIN_LIST

log = logging.getLogger('tf-nas')

Sample = tuple[str, int]  # path relative to the image root, label

SUFFIXES = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif', '.tiff', '.webp')  # as torchvision's ImageFolder

# Files and folders of other programs, in lower case. Hidden ones need no entry.
LEFTOVERS = {
    '__macosx',
    '@eadir',
    '#recycle',
    '$recycle.bin',
    'lost+found',
    'system volume information',
    'thumbs.db',
    'desktop.ini',
}
VALIDATION = ('val', 'valid', 'validation', 'test')  # folders of validation images; the first one there is taken
SPLITS = {'train', *VALIDATION}

MOST_CLASSES = 65536  # in a list, without --num_classes

# Every folder without lists is split alike, whatever the seed of the run, so that a search and all trainings on a
# folder agree on what is left for validation.
RATIO, SEED = 0.8, 2

LISTS = 'train', 'val', 'search_train', 'search_val'  # files <name>.txt; the last two are the parts of the first


# --- list files


def read_list(path: str | Path, root: str | Path, num_classes: int | None) -> list[Sample]:
    """Read and check a list; warn if classes have no images.

    Args:
        root: folder that the paths start from; the first and last image must be there.
        num_classes: labels are 0 to num_classes - 1; None: the list decides.

    Raises:
        BadInput: see `parse_list`; or an image is absent.
    """
    samples = parse_list(path, num_classes)
    for relative, _ in (samples[0], samples[-1]):
        if not (Path(root) / relative).is_file():
            raise BadInput(f'image list {path}: no file {relative} under {root}')
    classes = num_classes or count_classes(samples)
    absent = sorted(set(range(classes)) - {label for _, label in samples})
    if absent:
        log.warning('%s has no images of %d of %d classes, such as %d', path, len(absent), classes, absent[0])
    return samples


def parse_list(path: str | Path, num_classes: int | None = None) -> list[Sample]:
    """Read the lines of a list; ignore the image files.

    Raises:
        BadInput: unreadable, empty, or a bad line (named by its number).
    """
    samples = []
    for number, line in enumerate(_read_lines(path, 'image list'), start=1):
        if line.strip():
            samples.append(_parse_line(line.strip(), f'{path}:{number}', num_classes or MOST_CLASSES))
    if not samples:
        raise BadInput(f"image list {path}: is empty; expected lines of 'relative/path label'")
    return samples


def _read_lines(path: str | Path, kind: str) -> list[str]:
    try:
        return Path(path).read_text(encoding='utf-8-sig').split('\n')
    except (OSError, UnicodeDecodeError) as e:
        reason = getattr(e, 'strerror', None) or e
        raise BadInput(f'{kind} {path}: cannot be read ({reason})') from e


def _parse_line(line: str, where: str, num_classes: int) -> Sample:
    parts = line.rsplit(maxsplit=1)
    if len(parts) != 2:
        raise BadInput(f"{where}: {line!r} has no label; expected 'relative/path label'")
    relative, label = parts
    is_number = label.isascii() and label.isdigit() and len(label) < 10
    if not is_number or int(label) >= num_classes:
        raise BadInput(f'{where}: label {label[:20]!r} should be a whole number from 0 to {num_classes - 1}')
    if '\0' in relative or PurePosixPath(relative).is_absolute() or '..' in PurePosixPath(relative).parts:
        raise BadInput(f'{where}: path {relative!r} leaves the image root; expected a relative path without ..')
    return relative, int(label)


def list_text(samples: Sequence[Sample]) -> str:
    """Return the text of a list.

    Raises:
        BadInput: a path with a line break or not in UTF-8.
    """
    for relative, _ in samples:
        if relative.splitlines() != [relative] or relative.encode(errors='replace').decode() != relative:
            raise BadInput(
                f'{relative!r}: a list cannot hold a path with a line break or not in UTF-8; rename the file'
            )
    return ''.join(f'{relative} {label}\n' for relative, label in samples)


def write_list(samples: Sequence[Sample], path: str | Path) -> None:
    """Write a list atomically.

    Raises:
        BadInput: see `list_text`; or a folder that cannot be written to.
    """
    text = list_text(samples)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise BadInput(f'{path}: its folder cannot be made ({e.strerror})') from e
    write_text(path, text)


# --- labels and their folders


def count_classes(samples: Sequence[Sample]) -> int:
    """Return the number of classes that labels ask for: the largest label plus one, at least two."""
    return max(2, 1 + max(label for _, label in samples))


def _labels_by_folder(samples: Sequence[Sample], below_shared: bool = False) -> dict[str, set[int]]:
    """Return the labels of each outermost folder; images without a folder are left out.

    Args:
        below_shared: ignore the outer folders that all images share, such as train/ in train/n01440764/x.JPEG.
    """
    labels_of = defaultdict(set)
    for relative, label in samples:
        labels_of[os.path.dirname(os.path.normpath(relative))].add(label)
    labels_of.pop('', None)
    folders = {folder: folder.split('/') for folder in labels_of}
    shared = len(os.path.commonprefix([parts[:-1] for parts in folders.values()])) if below_shared else 0
    outermost = defaultdict(set)
    for folder, parts in folders.items():
        outermost[parts[shared]] |= labels_of[folder]
    return outermost


def check_labels(lists: Mapping[str, Sequence[Sample]]) -> None:
    """Refuse lists in which one outermost folder has two labels, as lists have that were numbered apart.

    A single folder around all images of a list is no class. So whoever has folders that are not classes, such as
    cameras or patients, gives the folder above them as the root.

    Args:
        lists: samples by the name of the list.

    Raises:
        BadInput: a folder with two labels, named with them.
    """
    places: dict[str, dict[int, str]] = defaultdict(dict)
    for path, samples in lists.items():
        folders = _labels_by_folder(samples)
        if len(folders) == 1:
            continue
        for folder, labels in folders.items():
            places[folder] |= dict.fromkeys(labels - places[folder].keys(), path)
    for folder in sorted(places):
        if len(places[folder]) > 1:
            first, second = itertools.islice(places[folder].items(), 2)
            raise BadInput(
                f'folder {folder} has label {first[0]} in {first[1]} and {second[0]} in {second[1]}; number one list '
                'like the other with dataset/make_lists.py --like; if folders are not classes, give the folder above'
                ' the root as the root, with paths that start there'
            )


def folders_by_label(samples: Sequence[Sample]) -> dict[int, str]:
    """Return the folder of each label; nothing if folders and labels do not correspond one to one."""
    names = {}
    for folder, labels in _labels_by_folder(samples, below_shared=True).items():
        for label in labels:
            if len(labels) > 1 or label in names:
                return {}
            names[label] = folder
    return names


def class_names(samples: Sequence[Sample]) -> list[str] | None:
    """Return the name of each label, its folder; a label without images has its number.

    Returns:
        Names by label, as many as `count_classes`; None if folders and labels do not correspond.
    """
    names = folders_by_label(samples)
    if not names or not all('/' in os.path.normpath(relative) for relative, _ in samples):
        return None
    return [names.get(label, str(label)) for label in range(count_classes(samples))]


def read_numbering(path: str | Path) -> dict[str, int]:
    """Return the label of each class folder of a list, for lists that must agree with it.

    Raises:
        BadInput: see `parse_list`; or its folders do not decide the labels.
    """
    names = folders_by_label(parse_list(path))
    if not names:
        raise BadInput(f'--like {path}: expected a list with one class folder per label')
    return {name: label for label, name in names.items()}


# --- folders


class ClassFolders:
    """Reader of the class folders under a root. Follows links, but reads each real folder once.

    Attributes:
        left_out: hidden files, files of other programs, broken links; relative to the root.
    """

    def __init__(self, root: Path):
        self.root = root
        self.left_out: list[str] = []
        self._owners: dict[str, str] = {}  # class by real folder

    def names(self) -> list[str]:
        """Return the names of the class folders, sorted."""
        return [name for name, is_folder in self._entries('.') if is_folder]

    def images(self, name: str) -> list[str]:
        """Return the images of a class, in its folder and the folders below, as sorted paths relative to the root.

        Raises:
            BadInput: a folder that cannot be read, or that belongs to another class already.
        """
        found, folders = [], [name]
        while folders:
            folder = folders.pop(0)
            real = os.path.realpath(self.root / folder)
            owner = self._owners.get(real)
            if owner == name:
                continue  # a second link to it, or a link back to a folder above
            if owner is not None:
                raise BadInput(
                    f'image root {self.root}: class folders {owner} and {name} both lead to {real}, whose images would '
                    'get two labels; leave one out'
                )
            self._owners[real] = name
            for entry, is_folder in self._entries(folder):
                (folders if is_folder else found).append(f'{folder}/{entry}')
        return sorted(found, key=lambda path: path.split('/'))

    def log_left_out(self) -> None:
        """Log the number of files that were left out, if any."""
        if self.left_out:
            what = '%s: left out %d hidden files, files of other programs or broken links, such as %s'
            log.info(what, self.root, len(self.left_out), self.left_out[0])

    def _entries(self, folder: str) -> list[tuple[str, bool]]:
        """Return (name, whether a folder) of the folders and images in a folder, sorted."""
        try:
            entries = sorted(os.scandir(self.root / folder), key=lambda entry: entry.name)
        except OSError as e:
            raise BadInput(f'image root {self.root}: folder {folder} cannot be read ({e.strerror})') from e
        kept = []
        for entry in entries:
            hidden = entry.name.startswith('.') or entry.name.lower() in LEFTOVERS
            is_link = entry.is_symlink()  # known without a look at the file, which takes long for a million of them
            if hidden or (is_link and not os.path.exists(entry)):
                self.left_out.append(os.path.normpath(f'{folder}/{entry.name}'))
                continue
            is_folder = entry.is_dir()
            if is_folder or entry.name.lower().endswith(SUFFIXES):
                kept.append((entry.name, is_folder))
        return kept


def find_pair(names: Iterable[str]) -> tuple[str, str] | None:
    """Return the names of the folders of training and validation images; None if there is no such pair."""
    by_word = {name.lower(): name for name in names}
    for word in VALIDATION:
        if 'train' in by_word and word in by_word:
            return by_word['train'], by_word[word]
    return None


def find_roots(root: str | Path) -> tuple[Path, Path]:
    """Return the folders of training and of validation images; one folder twice if `root` has no such pair.

    Raises:
        BadInput: no such folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise BadInput(f'image root {root}: no such folder; expected one with class folders, or with train/ and val/')
    names = ClassFolders(root).names()
    if len(names) == 1 and ClassFolders(root / names[0]).names():
        root = root / names[0]
        names = ClassFolders(root).names()
    pair = find_pair(names)
    if not pair:
        return root, root
    others = [name for name in names if name not in pair]
    if others:
        log.info('%s: left out %s; the lists are of %s and %s', root, ', '.join(others), *pair)
    return root / pair[0], root / pair[1]


def list_folder(root: str | Path, classes: Sequence[str] | None = None) -> list[list[Sample]]:
    """List the images of each class folder under `root`, sorted by name; labels by the sorted order of the classes.

    Args:
        classes: folders to take; None: all of them.

    Raises:
        BadInput: no such folder, fewer than two classes, a class without images, folders that look like splits, two
            classes with the same folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise BadInput(f'image root {root}: no such folder; expected one folder per class in it')
    folders = ClassFolders(root)
    names = sorted(classes or folders.names())
    absent = [name for name in names if not (root / name).is_dir()]
    if absent:
        raise BadInput(
            f'image root {root}: {len(absent)} of {len(names)} class folders absent: {", ".join(absent[:3])}'
        )
    if len(names) < 2:
        only = f'{names[0]} is the only class folder' if names else 'no class folders in it'
        raise BadInput(f'image root {root}: {only}; expected two or more')
    images = _images_by_class(folders, names)
    if classes is None:
        _check_no_splits(root, images)
    return [[(path, label) for path in images[name]] for label, name in enumerate(names)]


def list_like(root: str | Path, numbering: Mapping[str, int]) -> list[list[Sample]]:
    """List the images of class folders whose labels are given; some may be absent, and others are left out.

    Raises:
        BadInput: none of the folders, a class without images.
    """
    folders = ClassFolders(Path(root))
    there = folders.names()
    names = [name for name in there if name in numbering]
    if not names:
        raise BadInput(f'image root {root}: has none of the {len(numbering)} class folders, such as {min(numbering)}')
    if len(names) < len(numbering):
        absent = sorted(numbering.keys() - set(names))
        log.warning('%s lacks %d of %d classes: %s', root, len(absent), len(numbering), ', '.join(absent[:5]))
    if len(names) < len(there):
        others = [name for name in there if name not in numbering]
        log.info('%s: left out %d folders without a label: %s', root, len(others), ', '.join(others[:5]))
    images = _images_by_class(folders, names)
    return [[(path, numbering[name]) for path in images[name]] for name in names]


def _images_by_class(folders: ClassFolders, names: Sequence[str]) -> dict[str, list[str]]:
    images = {name: folders.images(name) for name in names}
    for name, paths in images.items():
        if not paths:
            raise BadInput(
                f'image root {folders.root}: class folder {name} holds no images ({", ".join(SUFFIXES)}); remove it, '
                'or name the classes with dataset/make_lists.py --classes'
            )
    folders.log_left_out()
    return images


def _check_no_splits(root: Path, images: Mapping[str, list[str]]) -> None:
    """Refuse folders that look like splits: by a pair of names, or by folders of equal names in two of them."""
    inside = {}  # folders in class folders that hold no images themselves
    for name, paths in images.items():
        below = [path.split('/')[1:] for path in paths]
        if all(len(parts) > 1 for parts in below):
            inside[name] = {parts[0] for parts in below}
    splits = list(find_pair(images) or ())
    splits += [name for name in inside if name.lower() in SPLITS and len(inside[name]) > 1]
    for first, second in itertools.combinations(inside, 2):
        if len(inside[first] & inside[second]) > 1:
            splits.append(first)
    if splits:
        raise BadInput(
            f'image root {root}: {splits[0]} looks like a split, not a class; give {root / splits[0]} as the root, or '
            'name the classes with dataset/make_lists.py --classes'
        )


def read_classes(path: str | Path) -> list[str]:
    """Read names of class folders, one per line.

    Raises:
        BadInput: unreadable or empty, a path, or a name twice.
    """
    lines = (line.strip().rstrip('/') for line in _read_lines(path, 'file of classes') if line.strip())
    names = list(lines)
    if not names:
        raise BadInput(f'{path}: names no classes')
    for name, times in Counter(names).items():
        if '/' in name or name in ('', '.', '..'):
            raise BadInput(f'{path}: {name!r} is no name of a class folder; expected a name without /')
        if times > 1:
            raise BadInput(f'{path}: names class {name} {times} times; its images would get several labels')
    return names


# --- splits


def flat(by_class: Sequence[Sequence[Sample]]) -> list[Sample]:
    """Return the samples of all classes as one list."""
    return [sample for samples in by_class for sample in samples]


def split_by_class(by_class: Sequence[Sequence[Sample]], ratio: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Split each class at random into two parts, the first with a share of `ratio`; each gets at least one image.

    Raises:
        BadInput: a class of a single image.
    """
    first, second = [], []
    for samples in by_class:
        if len(samples) < 2:
            raise BadInput(f'{samples[0][0]} is the only image of its class; a split needs two')
        shuffled = random.Random(seed).sample(samples, len(samples))
        cut = min(max(round(ratio * len(samples)), 1), len(samples) - 1)
        first += sorted(shuffled[:cut])
        second += sorted(shuffled[cut:])
    return first, second


def split_folder(
    roots: tuple[Path, Path],
    classes: Sequence[str] | None = None,
    ratio: float = RATIO,
    seed: int = SEED,
    for_search: bool = True,
) -> dict[str, list[Sample]]:
    """Return the `LISTS` of folders of training and validation images, or of one folder, split in each class.

    The class folders of the training images number the classes.

    Args:
        roots: see `find_roots`.
        classes: class folders to take; None: all.
        for_search: split the training images again, into those of a search's weights and of its architecture.

    Raises:
        BadInput: see `list_folder`, `list_like` and `split_by_class`.
    """
    by_class = list_folder(roots[0], classes)
    if roots[0] == roots[1]:
        train, val = split_by_class(by_class, ratio, seed)
    else:
        train = flat(by_class)
        val = flat(list_like(roots[1], {name: label for label, name in enumerate(class_names(train))}))
    lists = {'train': train, 'val': val}
    if for_search:
        grouped = itertools.groupby(train, key=lambda sample: sample[1])
        parts = split_by_class([list(group) for _, group in grouped], ratio, seed)
        lists |= dict(zip(LISTS[2:], parts, strict=True))
    return lists


def class_file(names: Sequence[str] | None) -> dict[str, str]:
    """Return name and text of the file of class names, one line per label; nothing without names."""
    return {'classes.txt': ''.join(f'{name}\n' for name in names)} if names else {}


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
    root = Path(given).absolute()
    train_root, val_root = find_roots(root)
    lists = _lists_in(folder)
    if not lists:
        pair = find_pair(ClassFolders(root.parent).names())
        if pair and pair[0] == root.name:
            val_root = root.parent / pair[1]
        lists = _lists_in(Path(str(flags.get('train_list') or TRAIN_LIST)).parent)
    if not lists and val_root == root and flags.get('train_list'):
        lists = {name: Path(str(flags.get(name))) for name in ('train_list', 'val_list')}
    return {'train_root': train_root, 'val_root': val_root, **lists}


def _lists_in(folder: Path) -> dict[str, Path]:
    lists = {'train_list': folder / 'train.txt', 'val_list': folder / 'val.txt'}
    return lists if all(path.is_file() for path in lists.values()) else {}
