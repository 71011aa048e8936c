"""Image lists: one image a line, `relative/path.JPEG label`. Paths may hold spaces."""

import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from tools.errors import BadInput
from tools.files import write_text

Sample = tuple[str, int]
"""(path relative to the image root, label)"""

SUFFIXES = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif', '.tiff', '.webp')
"""Of the files that torchvision's ImageFolder takes for images; torchvision takes seconds to import."""

MOST_CLASSES = 65536
"""That a list without `--num_classes` may ask for."""


def read_list(
    path: str | Path, root: str | Path, num_classes: int | None, warn: Callable[[str], object] = print
) -> list[Sample]:
    """Read and check a list.

    Args:
        root: folder that the paths start from; the first and last image must be there.
        num_classes: labels are 0 to num_classes - 1; None where the list says how many there are.
        warn: called with a line about what is odd but legal: images listed twice, classes without images.

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
    for relative, _ in (samples[0], samples[-1]):
        if not (Path(root) / relative).is_file():
            raise BadInput(f'image list {path}: no file {relative} under {root}')
    _warn_of_oddities(samples, path, num_classes or count_classes(samples), warn)
    return samples


def count_classes(samples: Sequence[Sample]) -> int:
    """Number of classes that the labels of a list ask for: the largest label plus one, at least two."""
    return max(2, 1 + max(label for _, label in samples))


def warn_of_overlap(
    train: Sequence[Sample], val: Sequence[Sample], paths: tuple[str, str], warn: Callable[[str], object] = print
) -> None:
    """One line where two lists of one folder share images."""
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


def list_folder(root: str | Path, classes: Sequence[str] | None = None) -> list[list[Sample]]:
    """Images of each class folder under `root`, sorted by name; labels by the sorted order of the classes.

    Args:
        classes: folders to take; all of them where None.

    Raises:
        BadInput: no such folder, no classes, a class without images.
    """
    root = Path(root)
    if not root.is_dir():
        raise BadInput(f'image root {root}: no such folder; expected one folder a class in it')
    names = sorted(
        classes if classes is not None else (p.name for p in root.iterdir() if p.is_dir() and p.name[0] != '.')
    )
    if not names:
        raise BadInput(f'image root {root}: no class folders in it')
    absent = [name for name in names if not (root / name).is_dir()]
    if absent:
        raise BadInput(
            f'image root {root}: {len(absent)} of {len(names)} class folders absent: {", ".join(absent[:3])}'
        )
    listed = []
    for label, name in enumerate(names):
        files = sorted(p for p in (root / name).rglob('*') if p.suffix.lower() in SUFFIXES and p.is_file())
        if not files:
            raise BadInput(f'image root {root}: class folder {name} holds no images ({", ".join(SUFFIXES)})')
        listed.append([(p.relative_to(root).as_posix(), label) for p in files])
    return listed


def read_classes(path: str | Path) -> list[str]:
    """Class folder names, one a line.

    Raises:
        BadInput: unreadable or empty.
    """
    try:
        lines = Path(path).read_text(encoding='utf-8').splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f'{path}: cannot be read as a list of classes ({e})') from e
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise BadInput(f'{path}: names no classes')
    return names


def split_by_class(by_class: list[list[Sample]], ratio: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Split each class at random into two parts, the first with a share of `ratio` (at least one image in each part).

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


def write_list(samples: Sequence[Sample], path: str | Path) -> None:
    """Write a list, whole or not at all.

    Raises:
        BadInput: a path with a line break or not in UTF-8, or a folder that cannot be written to.
    """
    for relative, _ in samples:
        if relative.splitlines() != [relative] or relative.encode(errors='replace').decode() != relative:
            raise BadInput(
                f'{relative!r}: a list cannot hold a path with a line break or not in UTF-8; rename the file'
            )
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise BadInput(f'{path}: its folder cannot be made ({e.strerror})') from e
    write_text(path, ''.join(f'{relative} {label}\n' for relative, label in samples))
