"""Make image lists from class folders.

A training and a validation list from one folder, split 80/20 in each class:

    python dataset/make_lists.py --img_root images --train_list train.txt --val_list val.txt

One list of all images of a folder:

    python dataset/make_lists.py --img_root images/val --list val.txt
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset.lists import list_folder, split_by_class, write_list
from tools.errors import BadInput
from tools.options import Parser, count, number, run_script


def get_args():
    """Parse the command line."""
    parser = Parser(__doc__)
    parser.add_argument('--img_root', required=True, help='folder with one folder a class')
    parser.add_argument('--classes', help='file that names the class folders to take, one a line; default: all')
    parser.add_argument('--list', help='write all images to this one list')
    parser.add_argument('--train_list', help='write the first part of a split here')
    parser.add_argument('--val_list', help='write the second part of a split here')
    parser.add_argument('--ratio', type=number(float, 0, 1, open_low=True), default=0.8, help='share of the first part')
    parser.add_argument('--seed', type=count(0), default=2)
    return parser.parse_args()


def read_classes(path: str | Path) -> list[str]:
    """Class folder names, one a line.

    Raises:
        BadInput: unreadable or empty.
    """
    try:
        names = Path(path).read_text(encoding='utf-8').split()
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f'{path}: cannot be read as a list of classes ({e})') from e
    if not names:
        raise BadInput(f'{path}: names no classes')
    return names


def main(args):
    """Write the lists that the flags ask for."""
    if bool(args.list) == bool(args.train_list and args.val_list) or bool(args.train_list) != bool(args.val_list):
        raise BadInput('give either --list, or --train_list and --val_list')
    by_class = list_folder(args.img_root, read_classes(args.classes) if args.classes else None)
    if args.list:
        parts = {args.list: [sample for samples in by_class for sample in samples]}
    else:
        parts = dict(
            zip((args.train_list, args.val_list), split_by_class(by_class, args.ratio, args.seed), strict=True)
        )
    for path, samples in parts.items():
        write_list(samples, path)
        print(f'{path}: {len(samples)} images of {len(by_class)} classes')


if __name__ == '__main__':
    run_script(main, get_args())
