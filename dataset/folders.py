"""Folders of images: class folders, leftovers of other programs, splits such as train/ and val/."""

import itertools
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath

from tools.errors import BadInput

SUFFIXES = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif', '.tiff', '.webp')
"""Image files, as in torchvision's ImageFolder; importing torchvision takes seconds."""

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
"""Files and folders of other programs, in lower case. Hidden ones need no entry."""

ROLES = {
    'train': re.compile('train(ing)?(set|data|images)?'),
    'val': re.compile('(val(id|idation)?|dev)(set|data|images)?'),
    'test': re.compile('(test(ing)?|eval(uation)?)(set|data|images)?'),
}
"""Words that name a split."""

FILLERS = {'set', 'data', 'dataset', 'images', 'imgs', 'folder', 'split'}
"""Words in names of splits that are ignored."""

MOST_WRAPPERS = 8
"""Upper bound on nested folders that hold nothing but one folder."""


class ClassFolders:
    """Reader of class folders under a root. Follows links, as ImageFolder does, but reads each real folder once.

    Attributes:
        leftovers: files and folders of other programs, as paths relative to the root.
        dangling: links to images that do not exist.
    """

    def __init__(self, root: Path):
        self.root = root
        self.leftovers: list[str] = []
        self.dangling: list[str] = []
        self.owners: dict[str, str] = {}

    def names(self) -> list[str]:
        """Return the names of the class folders, sorted."""
        return sorted(name for name, is_folder in self._entries('.') if is_folder)

    def images(self, name: str) -> list[str]:
        """Return the images of a class, in its folder and the folders below, as sorted paths relative to the root.

        Raises:
            BadInput: a folder that cannot be read, or that belongs to another class already.
        """
        top, found, folders = os.path.realpath(self.root / name), [], [name]
        while folders:
            folder = folders.pop(0)
            real = os.path.realpath(self.root / folder)
            if folder != name and os.path.commonpath([real, top]) == real:
                continue  # a link back to a folder above
            owner = self.owners.get(real)
            if owner == name:
                continue
            if owner is not None:
                raise BadInput(
                    f'image root {self.root}: class folders {owner} and {name} both lead to {real}, whose images would '
                    'get two labels; leave one out'
                )
            self.owners[real] = name
            for entry, is_folder in self._entries(folder):
                (folders if is_folder else found).append(f'{folder}/{entry}')
        return sorted(found, key=lambda path: path.split('/'))

    def _entries(self, folder: str) -> list[tuple[str, bool]]:
        """Return (name, whether a folder) of the folders and images in a folder, sorted."""
        kept = []
        try:
            entries = sorted(os.scandir(self.root / folder), key=lambda entry: entry.name)
        except OSError as e:
            raise BadInput(f'image root {self.root}: folder {folder} cannot be read ({e.strerror})') from e
        for entry in entries:
            path = entry.name if folder == '.' else f'{folder}/{entry.name}'
            if is_leftover(entry.name):
                self.leftovers.append(path)
                continue
            is_image = entry.name.lower().endswith(SUFFIXES)
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:  # a link to itself
                is_folder = is_file = False
            if is_folder or (is_file and is_image):
                kept.append((entry.name, is_folder))
            elif entry.is_symlink() and (is_image or '.' not in entry.name):
                self.dangling.append(path)
        return kept


def is_leftover(name: str) -> bool:
    """Return whether a file or folder is hidden or of another program."""
    return name.startswith('.') or name.lower() in LEFTOVERS


def subfolders(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted, without leftovers."""
    return ClassFolders(folder).names()


def unwrap(folder: Path) -> Path:
    """Descend while a folder holds nothing but one folder that holds folders; return the last one."""
    for _ in range(MOST_WRAPPERS):
        inside = subfolders(folder)
        if len(inside) != 1 or not subfolders(folder / inside[0]):
            break
        folder = folder / inside[0]
    return folder


def split_name(name: str) -> tuple[str, list[str]] | None:
    """Return the role of a split ('train', 'val' or 'test') and the other words of its name; None: no split."""
    words = [word for word in re.findall(r'[^\W\d_]+|\d+', name.lower()) if word not in FILLERS]
    roles = [(role, word) for word in words for role, pattern in ROLES.items() if pattern.fullmatch(word)]
    if len(roles) != 1:
        return None
    role, word = roles[0]
    return role, [other for other in words if other != word]


def find_pair(names: Iterable[str]) -> tuple[str, str] | None:
    """Return the names of a training and a validation folder; a test folder if there is no validation folder.

    Case is ignored. Both names must agree but for the word of the split: seg_train and seg_test do, train_station and
    test_tube do not.
    """
    named = [(name, *split) for name in names if (split := split_name(name))]
    for wanted in ('val', 'test'):
        for (train, role, rest), (other, other_role, other_rest) in itertools.permutations(named, 2):
            if (role, other_role) == ('train', wanted) and rest == other_rest:
                return train, other
    return None


def check_no_splits(root: Path, images: Mapping[str, list[str]]) -> None:
    """Refuse folders that look like splits instead of classes.

    Args:
        images: the images of each folder, relative to the root.

    Raises:
        BadInput: the names are those of a pair of splits; two folders hold no images themselves, but sub-folders of
            equal names; a folder named as a split holds sub-folders only.
    """
    advice = 'to make all lists of both, use --to; if they are classes, name them with --classes'
    if pair := find_pair(images):
        raise BadInput(f'image root {root}: {pair[0]} and {pair[1]} look like splits, not classes; {advice}')
    nested = {}
    for name, paths in images.items():
        below = [PurePosixPath(path).relative_to(name).parts for path in paths]
        if all(len(parts) > 1 for parts in below):
            nested[name] = {parts[0] for parts in below}
    for (name, inside), (other, other_inside) in itertools.combinations(nested.items(), 2):
        if len(equal := sorted(inside & other_inside)) > 1:
            raise BadInput(
                f'image root {root}: {name} and {other} look like splits, not classes: both hold folders'
                f' {equal[0]} and {equal[1]}; give one of them as --img_root, or name the classes with --classes'
            )
    for name, inside in nested.items():
        if split_name(name) and len(inside) > 1:
            raise BadInput(
                f'image root {root}: {name} looks like a split, not a class; give --img_root {root / name}, or name'
                ' the classes with --classes'
            )


def note_left_out(folders: ClassFolders, warn: Callable[[str], object]) -> None:
    """Report the number of leftovers and the number of dangling links, in one line each."""
    if folders.leftovers:
        first, count = folders.leftovers[0], len(folders.leftovers)
        warn(f'{folders.root}: left out {count} hidden files, or files of other programs, such as {first}')
    if folders.dangling:
        first, count = folders.dangling[0], len(folders.dangling)
        warn(f'warning: {folders.root}: left out {count} links to files that do not exist, such as {first}')
