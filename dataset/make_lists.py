"""Make image lists from class folders.

All lists that the scripts need, from a folder with train/ and val/ or from one folder of class folders. Prints the
commands for a search with them:

    python dataset/make_lists.py --img_root photos --to lists

A training and a validation list from one folder, split 80/20 in each class:

    python dataset/make_lists.py --img_root images --train_list train.txt \\
        --val_list val.txt

One list of all images of a folder, and a second one with the classes and labels of the first:

    python dataset/make_lists.py --img_root images/train --list train.txt
    python dataset/make_lists.py --img_root images/val --list val.txt \\
        --like train.txt
"""

import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tools.needed  # noqa: F401  # isort: skip
from dataset.folders import find_pair, subfolders, unwrap
from dataset.lists import list_folder, read_classes, read_numbering, split_by_class, write_list
from tools.errors import BadInput
from tools.files import write_text
from tools.options import Parser, count, number, run_script


def get_args(argv=None):
    """Parse `argv`, or the command line."""
    parser = Parser(__doc__)
    data, output = parser.groups['data'], parser.groups['output']
    data.add_argument(
        '--img_root', metavar='FOLDER', required=True, help='folder with one folder a class, or with train/ and val/'
    )
    chosen = data.add_mutually_exclusive_group()
    chosen.add_argument(
        '--classes', metavar='FILE', help='file that names the class folders to take, one a line; default: all'
    )
    chosen.add_argument(
        '--like', metavar='LIST', help='list that gives the class folders to take and their labels, such as train.txt'
    )
    output.add_argument(
        '--to',
        metavar='FOLDER',
        help='folder that gets train.txt, val.txt, search_train.txt, search_val.txt, classes.txt',
    )
    output.add_argument('--list', metavar='FILE', help='write all images to this one list')
    output.add_argument('--train_list', metavar='FILE', help='write the first part of a split here')
    output.add_argument('--val_list', metavar='FILE', help='write the second part of a split here')
    ratio = number(float, 0, 1, open_low=True)
    data.add_argument('--ratio', type=ratio, default=0.8, help='share of each class in the first part of a split')
    data.add_argument('--seed', type=count(0), default=2, help='seed of the split')
    args = parser.parse_args(argv)
    pair = bool(args.train_list) + bool(args.val_list)
    if pair == 1 or bool(args.to) + bool(args.list) + pair // 2 != 1:
        parser.error('give --to, or --list, or both --train_list and --val_list')
    if args.like and any(
        Path(args.like).resolve() == Path(p).resolve() for p in (args.list, args.train_list, args.val_list) if p
    ):
        parser.error(f'--like {args.like}: would be overwritten; write the new list to another file')
    if args.to and args.like:
        parser.error('--like goes with --list, or with --train_list and --val_list; the lists of --to agree anyway')
    return args


def wanted_classes(args, root):
    """Return the class folders of `root` that the flags name, with labels if --like gives them; None: all."""
    if args.like:
        return read_numbering(args.like)
    return read_classes(args.classes, root) if args.classes else None


def find_roots(args):
    """Return the folders of training and of validation images; one folder twice if --img_root has no such pair.

    Folders that hold nothing but one folder are skipped, unless --classes names what to take.
    """
    root, unwrapped = Path(args.img_root), Path if args.classes else unwrap
    if not root.is_dir():
        raise BadInput(f'image root {root}: no such folder; expected one with class folders, or with train/ and val/')
    outer = unwrapped(root)
    pair = find_pair(subfolders(outer))
    if not pair:
        return outer, outer
    if others := [name for name in subfolders(outer) if name not in pair]:
        print(f'{outer}: left out {", ".join(others)}; the lists are of {pair[0]} and {pair[1]}')
    train_root, val_root = (unwrapped(outer / name) for name in pair)
    if not subfolders(val_root):
        raise BadInput(f'{val_root}: no class folders in it; to split the training images: --img_root {train_root}')
    return train_root, val_root


def flat(by_class):
    """Return the samples of all classes as one list."""
    return [sample for samples in by_class for sample in samples]


def all_lists(args):
    """Return all lists for search and training: ({path: samples}, root of training, root of validation, names)."""
    to = Path(args.to)
    train_root, val_root = find_roots(args)
    classes = wanted_classes(args, train_root)
    train = list_folder(train_root, classes)
    names = [Path(samples[0][0]).parts[0] for samples in train]
    if val_root != train_root:
        val = list_folder(val_root, classes)
        others = [Path(samples[0][0]).parts[0] for samples in val]
        if names != others:
            odd = sorted(set(names) ^ set(others))
            raise BadInput(
                f'{train_root} and {val_root} differ in {len(odd)} class folders: {", ".join(odd[:3])}; to list them'
                ' all the same, use --list train.txt for one and --list val.txt --like train.txt for the other'
            )
        train_samples, val_samples = flat(train), flat(val)
    else:
        train_samples, val_samples = split_by_class(train, args.ratio, args.seed)
    by_class = [[sample for sample in train_samples if sample[1] == label] for label in range(len(names))]
    search = split_by_class(by_class, args.ratio, args.seed)
    lists = zip(('train', 'val', 'search_train', 'search_val'), (train_samples, val_samples, *search), strict=True)
    return {to / f'{name}.txt': samples for name, samples in lists}, train_root, val_root, names


def next_commands(to, train_root, val_root):
    """Return the commands that use the lists, for a search and a training."""
    to, train_root, val_root = (shlex.quote(str(path)) for path in (to, train_root, val_root))
    return f"""next, at 224 pixels (a table of another size: --img_size in all of them):
python latency_pkl/make_lat_lut.py --save_path {to}/latency.pkl
python train_search.py --img_root {train_root} --train_list {to}/search_train.txt --val_list {to}/search_val.txt \\
    --lookup_path {to}/latency.pkl --target_lat 50%
and, to train what it finds: train_eval.py with --train_root {train_root} --train_list {to}/train.txt \\
    --val_root {val_root} --val_list {to}/val.txt"""


def main(args):
    """Write the lists that the flags name."""
    if args.to:
        parts, *roots, names = all_lists(args)
    else:
        by_class = list_folder(args.img_root, wanted_classes(args, args.img_root))
        parts = {args.list: flat(by_class)}
    if args.train_list:
        parts = dict(
            zip((args.train_list, args.val_list), split_by_class(by_class, args.ratio, args.seed), strict=True)
        )
    for path, samples in parts.items():
        write_list(samples, path)
        print(f'{path}: {len(samples)} images of {len({label for _, label in samples})} classes')
    if args.to:
        write_text(Path(args.to) / 'classes.txt', ''.join(f'{name}\n' for name in names))
        print(next_commands(args.to, *roots))


if __name__ == '__main__':
    run_script(main, get_args())
