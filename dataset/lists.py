"""Image lists: one image a line, `relative/path.JPEG label`. Paths may hold spaces."""

import itertools
import os
import random
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from dataset.folders import SUFFIXES, ClassFolders, check_no_splits, note_left_out, subfolders
from tools.errors import BadInput
from tools.files import write_text

Sample = tuple[str, int]
"""(path relative to the image root, label)"""

MOST_CLASSES = 65536
"""Upper bound on the classes of a list without `--num_classes`."""

READINGS = (lambda parts: parts[0], lambda parts: parts[-1], '/'.join)
"""Candidates for the class folder among the folders of a path: the outermost, the innermost, all of them."""

MOST_NAMES = 3
"""Folders that may share a label and still name it."""


def read_list(
    path: str | Path, root: str | Path, num_classes: int | None, warn: Callable[[str], object] = print
) -> list[Sample]:
    """Read and check a list.

    Args:
        root: folder that the paths start from; the first and last image must be there.
        num_classes: labels are 0 to num_classes - 1; None: the list decides.
        warn: called with a line each if images are listed twice and if classes have no images.

    Raises:
        BadInput: see `parse_list`; or an image is absent.
    """
    samples = parse_list(path, num_classes)
    for relative, _ in (samples[0], samples[-1]):
        if not (Path(root) / relative).is_file():
            raise BadInput(f'image list {path}: no file {relative} under {root}')
    _warn_of_oddities(samples, path, num_classes or count_classes(samples), warn)
    return samples


def parse_list(path: str | Path, num_classes: int | None = None) -> list[Sample]:
    """Read the lines of a list; ignore the image files.

    Raises:
        BadInput: unreadable, empty, or a bad line (named by its number).
    """
    try:
        text = Path(path).read_text(encoding='utf-8-sig')
    except (OSError, UnicodeDecodeError) as e:
        reason = getattr(e, 'strerror', None) or e
        raise BadInput(f"image list {path}: cannot be read ({reason}); expected lines of 'relative/path label'") from e
    samples = [
        _parse_line(line.strip(), f'{path}:{number}', num_classes)
        for number, line in enumerate(text.split('\n'), start=1)
        if line.strip()
    ]
    if not samples:
        raise BadInput(f"image list {path}: is empty; expected lines of 'relative/path label'")
    return samples


def count_classes(samples: Sequence[Sample]) -> int:
    """Return the number of classes that labels ask for: the largest label plus one, at least two."""
    return max(2, 1 + max(label for _, label in samples))


def warn_of_overlap(
    train: Sequence[Sample], val: Sequence[Sample], paths: tuple[str, str], warn: Callable[[str], object] = print
) -> None:
    """Warn in one line if two lists of one folder share images."""
    if shared := {path for path, _ in train} & {path for path, _ in val}:
        warn(f'warning: {len(shared)} images are both in {paths[0]} and in {paths[1]}, such as {min(shared)}')


def _warn_of_oddities(samples: Sequence[Sample], path: str | Path, classes: int, warn: Callable) -> None:
    if twice := [relative for relative, times in Counter(relative for relative, _ in samples).items() if times > 1]:
        warn(f'warning: {path} lists {len(twice)} images more than once, such as {twice[0]}')
    present = {label for _, label in samples}
    if absent := classes - len(present):
        first = itertools.islice((label for label in range(classes) if label not in present), 5)
        shown = ', '.join(map(str, first)) + (', ...' if absent > 5 else '')
        warn(f'warning: {path} has no images of {absent} of {classes} classes: {shown}')


def _parse_line(line: str, where: str, num_classes: int | None) -> Sample:
    parts = line.rsplit(maxsplit=1)
    if len(parts) != 2:
        raise BadInput(f"{where}: {line!r} has no label; expected 'relative/path label'")
    relative, label = parts
    most = (num_classes or MOST_CLASSES) - 1
    if not label.isascii() or not label.isdigit():
        raise BadInput(f'{where}: label {label!r} should be a whole number from 0 to {most}')
    if len(label) > 9 or int(label) > most:
        given = f' (--num_classes {num_classes})' if num_classes else ''
        raise BadInput(f'{where}: label {label[:20]} should be at most {most}{given}')
    if '\0' in relative or PurePosixPath(relative).is_absolute() or '..' in PurePosixPath(relative).parts:
        raise BadInput(f'{where}: path {relative!r} leaves the image root; expected a relative path without ..')
    return relative, int(label)


def class_folders(lists: Sequence[Sequence[Sample]]) -> list[dict[str, set[int]]]:
    """Return the labels of each class folder, for each list; images without a folder are left out.

    Folders that all images of a list share, such as train/, do not count. Of the rest, the outermost folder is the
    class folder, as in ImageFolder. The innermost one or the whole path takes its place if fewer of these have several
    labels within a list. So dog/2021/x.JPEG is of class dog; train/n01440764/x.JPEG, in a list with images of other
    classes under train/ and extra/, is of class n01440764.
    """
    trees = [_folder_labels(samples) for samples in lists]
    readings = [[_merge((read(parts), labels) for parts, labels in tree) for tree in trees] for read in READINGS]
    return min(readings, key=_share_of_mixed)


def _folder_labels(samples: Sequence[Sample]) -> list[tuple[tuple[str, ...], set[int]]]:
    """Return (parts of its path, labels) of each folder, without the outer folders that all share."""
    by_folder = _merge((relative.rpartition('/')[0], {label}) for relative, label in samples)
    folders = [(PurePosixPath(folder).parts, labels) for folder, labels in by_folder.items()]
    folders = [(parts, labels) for parts, labels in folders if parts]
    shared = len(os.path.commonprefix([parts[:-1] for parts, _ in folders]))
    return [(parts[shared:], labels) for parts, labels in folders]


def _merge(items: Iterable[tuple[str, set[int]]]) -> dict[str, set[int]]:
    merged = defaultdict(set)
    for name, labels in items:
        merged[name] |= labels
    return dict(merged)


def _share_of_mixed(lists: Sequence[Mapping[str, set[int]]]) -> float:
    """Return the share of folders with several labels within a list."""
    sizes = [len(labels) for folders in lists for labels in folders.values()]
    return sum(size > 1 for size in sizes) / max(1, len(sizes))


def check_labels(
    lists: Sequence[Sequence[Sample]], paths: Sequence[str | Path], warn: Callable[[str], object] = print
) -> None:
    """Refuse lists in which one class folder has two labels, as lists that were numbered apart have.

    Folders need not be classes, but may be cameras or patients. So a list of which most folders have several labels is
    not compared. If a folder has two labels within a list, the lists are refused only if they name about as many labels
    as folders. Several folders may share a label.

    Args:
        paths: names of the lists in messages.
        warn: called with a line if folders with several labels are accepted, and if the folder of a label differs.

    Raises:
        BadInput: a class folder with two labels, named with them.
    """
    found = dict(zip(paths, class_folders(lists), strict=True))
    compared = {path: folders for path, folders in found.items() if _share_of_mixed([folders]) <= 0.5}
    union = _merge(item for folders in compared.values() for item in folders.items())
    folder_a_class = len(union) < 2 * _count_labels(union)
    renumbered = _share_of_mixed([union]) > 0.5  # superclasses that were numbered apart
    each_list_agrees = _share_of_mixed(list(compared.values())) == 0
    wrong = sorted(
        name
        for name, labels in union.items()
        if len(labels) > 1 and (folder_a_class or renumbered) and (each_list_agrees or len(labels) == 2)
    )
    if wrong:
        places = [
            f'{" and ".join(map(str, sorted(folders[wrong[0]])))} in {path}'
            for path, folders in compared.items()
            if wrong[0] in folders
        ]
        raise BadInput(
            f'class folder {wrong[0]} has label {", ".join(places)} ({len(wrong)} of {len(union)} class folders have'
            ' several labels); number one list like the other: dataset/make_lists.py --like'
        )
    many = [folders for folders in found.values() if len(folders) >= _count_labels(folders)]
    union = _merge(item for folders in many for item in folders.items())
    if mixed := sorted(name for name, labels in union.items() if len(labels) > 1):
        shown = ' and '.join(map(str, sorted(union[mixed[0]])[:2]))
        warn(
            f'warning: {len(mixed)} of {len(union)} folders have several labels in {" and ".join(map(str, paths))},'
            f' such as {mixed[0]} ({shown}); right only if these folders are not classes'
        )
    _warn_of_other_folders(compared, warn)


def _count_labels(folders: Mapping[str, set[int]]) -> int:
    return len(set().union(*folders.values()))


def _warn_of_other_folders(found: Mapping[str | Path, Mapping[str, set[int]]], warn: Callable) -> None:
    """Warn in one line if two lists agree on the folders of some labels and differ in those of others."""
    if len(found) != 2:
        return
    first, second = (_folders_by_label(folders) for folders in found.values())
    single = [label for label in sorted(first) if len(first[label]) == len(second.get(label, ())) == 1]
    other = [label for label in single if first[label] != second[label]]
    if 0 < len(other) < len(single):
        label = other[0]
        names = ', '.join(f'{by[label][0]} in {path}' for by, path in zip((first, second), found, strict=True))
        warn(f'warning: {len(other)} labels have different class folders in the two lists: label {label} is {names}')


def _folders_by_label(folders: Mapping[str, set[int]]) -> dict[int, list[str]]:
    by_label = defaultdict(list)
    for name in sorted(folders):
        for label in folders[name]:
            by_label[label].append(name)
    return by_label


def class_names(samples: Sequence[Sample]) -> list[str] | None:
    """Return the name of each label of a list: its class folder, see `class_folders`.

    A label of two or three folders has their names, joined by commas. One without images has its number.

    Returns:
        Names by label, as many as `count_classes`; None if the folders do not name classes: images without a folder, a
        folder of two labels, a label of more than `MOST_NAMES` folders.
    """
    (folders,) = class_folders([samples])
    by_label = _folders_by_label(folders)
    named = all('/' in os.path.normpath(relative) for relative, _ in samples)
    if not named or _share_of_mixed([folders]) or max(map(len, by_label.values())) > MOST_NAMES:
        return None
    return [', '.join(by_label.get(label, [str(label)])) for label in range(count_classes(samples))]


def class_file(names: Sequence[str] | None) -> dict[str, str]:
    """Return name and text of the file that holds class names, a line each by label; nothing without names."""
    return {'classes.txt': ''.join(f'{name}\n' for name in names)} if names else {}


def read_numbering(path: str | Path) -> dict[str, int]:
    """Return the label of each class folder of a list, for lists that must agree with it.

    Raises:
        BadInput: see `parse_list`; or its folders do not decide the labels.
    """
    (folders,) = class_folders([parse_list(path)])
    if not folders:
        raise BadInput(f'--like {path}: its images are in no class folders, which --like takes labels from')
    if mixed := sorted(name for name, labels in folders.items() if len(labels) > 1):
        labels = ' and '.join(map(str, sorted(folders[mixed[0]])[:2]))
        raise BadInput(
            f'--like {path}: folder {mixed[0]} has labels {labels}; --like takes a list with one label a class folder'
        )
    return {name: label for name, (label,) in folders.items()}


def list_folder(
    root: str | Path,
    classes: Sequence[str] | Mapping[str, int] | None = None,
    warn: Callable[[str], object] = print,
) -> list[list[Sample]]:
    """List the images of each class folder under `root`, sorted by name; labels by the sorted order of the classes.

    Args:
        classes: folders to take; None: all of them. A mapping gives their labels; then folders may be absent.
        warn: called with lines about what was left out: leftovers of other programs, dangling links, and, with a
            mapping, classes without a folder and folders without a class.

    Raises:
        BadInput: no such folder, no classes or a single one, a class without images, folders that look like splits, two
            classes with the same folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise BadInput(f'image root {root}: no such folder; expected one folder a class in it')
    folders = ClassFolders(root)
    there = folders.names()
    names = sorted(there if classes is None else classes)
    if not names:
        raise BadInput(f'image root {root}: no class folders in it')
    absent = [name for name in names if not (root / name).is_dir()]
    numbers = classes if isinstance(classes, Mapping) else {name: label for label, name in enumerate(names)}
    if isinstance(classes, Mapping):
        names = _present_classes(root, names, absent, there, warn)
    elif absent:
        raise BadInput(
            f'image root {root}: {len(absent)} of {len(names)} class folders absent: {", ".join(absent[:3])}'
        )
    if len(set(numbers.values())) < 2:
        inside = f'; if its folders are the classes, give --img_root {root / names[0]}'
        hint = inside if subfolders(root / names[0]) else ''
        raise BadInput(f'image root {root}: {names[0]} is the only class folder; expected two or more{hint}')
    images = {name: folders.images(name) for name in names}
    if classes is None:
        check_no_splits(root, images)
    for name in names:
        if not images[name]:
            raise BadInput(f'image root {root}: class folder {name} holds no images ({", ".join(SUFFIXES)})')
    note_left_out(folders, warn)
    return [[(path, numbers[name]) for path in images[name]] for name in names]


def _present_classes(
    root: Path, names: list[str], absent: list[str], there: list[str], warn: Callable[[str], object]
) -> list[str]:
    """Return the classes that have folders; warn of the absent ones, and of folders that are no classes."""
    if len(absent) == len(names):
        shown = ', '.join(names[:3])
        raise BadInput(f'image root {root}: has none of the {len(names)} class folders of the list, such as {shown}')
    if absent:
        warn(f'warning: image root {root} lacks {len(absent)} of {len(names)} classes: {", ".join(absent[:5])}')
    if others := sorted(set(there) - {PurePosixPath(name).parts[0] for name in names}):
        warn(f'{root}: left out {len(others)} folders without a label in the list: {", ".join(others[:5])}')
    return [name for name in names if name not in absent]


def read_classes(path: str | Path, root: str | Path | None = None, warn: Callable[[str], object] = print) -> list[str]:
    """Read names of class folders, one a line.

    Args:
        root: folder of the class folders. If none of the lines with spaces names a folder there, the first words do, as
            in ImageNet's LOC_synset_mapping.txt.
        warn: called with a line if first words are taken.

    Raises:
        BadInput: unreadable or empty, a path, or a name twice.
    """
    try:
        lines = Path(path).read_text(encoding='utf-8-sig').splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f'{path}: cannot be read as a list of classes ({e})') from e
    names = [line.strip().rstrip('/') for line in lines if line.strip()]
    if not names:
        raise BadInput(f'{path}: names no classes')
    if root is not None:
        names = [_name_in(Path(root), name) for name in names]
        with_space = [name for name in names if len(name.split()) > 1]
        firsts = {name: name.split()[0] for name in with_space if (Path(root) / name.split()[0]).is_dir()}
        if firsts and not any((Path(root) / name).is_dir() for name in with_space):
            warn(
                f'{path}: took the first words of {len(firsts)} lines as class folders, such as {min(firsts.values())}'
            )
            names = [firsts.get(name, name) for name in names]
    for name, times in Counter(names).items():
        if '/' in name or name in ('', '.', '..'):
            raise BadInput(f'{path}: {name!r} is no name of a class folder; expected a name without /')
        if times > 1:
            raise BadInput(f'{path}: names class {name} {times} times; its images would get several labels')
    return names


def _name_in(root: Path, name: str) -> str:
    """Return the name as the file system spells it: an accent may be part of a letter or a character after it."""
    spellings = (name, *(unicodedata.normalize(form, name) for form in ('NFC', 'NFD')))
    return next((spelling for spelling in spellings if (root / spelling).is_dir()), name)


def split_by_class(by_class: list[list[Sample]], ratio: float, seed: int) -> tuple[list[Sample], list[Sample]]:
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
