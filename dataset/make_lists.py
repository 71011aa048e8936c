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

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tools.needed  # noqa: F401  # isort: skip
from dataset.lists import (
    RATIO,
    SEED,
    class_file,
    class_names,
    find_roots,
    flat,
    list_folder,
    list_like,
    read_classes,
    read_numbering,
    split_by_class,
    split_folder,
    write_list,
)
from tools.chain import command
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
    data.add_argument('--ratio', type=ratio, default=RATIO, help='share of each class in the first part of a split')
    data.add_argument('--seed', type=count(0), default=SEED, help='seed of the split')
    args = parser.parse_args(argv)
    pair = bool(args.train_list) + bool(args.val_list)
    if pair == 1 or bool(args.to) + bool(args.list) + pair // 2 != 1:
        parser.error('give --to, or --list, or both --train_list and --val_list')
    if args.to and args.like:
        parser.error('--like goes with --list, or with --train_list and --val_list; the lists of --to agree anyway')
    if args.like and args.like in (args.list, args.train_list, args.val_list):
        parser.error(f'--like {args.like}: would be overwritten; write the new list to another file')
    return args


def next_commands(to, train_root, val_root):
    """Return the commands that use the lists, for a search and a training."""
    table = to / 'latency.pkl'
    search = {'img_root': train_root, 'train_list': to / 'search_train.txt', 'val_list': to / 'search_val.txt'}
    training = {'train_root': train_root, 'val_root': val_root}
    training |= {'train_list': to / 'train.txt', 'val_list': to / 'val.txt', 'config_path': Path('model.config')}
    return f"""next (at another size than 224: give --img_size to the first command, the others take it from there):
{command('latency_pkl/make_lat_lut.py', {'save_path': table})}
{command('train_search.py', search | {'lookup_path': table, 'target_lat': '50%'})}
and, to train what it finds:
{command('train_eval.py', training)}"""


def write(path, samples):
    """Write a list, and print its size."""
    write_list(samples, path)
    print(f'{path}: {len(samples)} images of {len({label for _, label in samples})} classes')


def main(args):
    """Write the lists that the flags name."""
    classes = read_classes(args.classes) if args.classes else None
    if args.to:
        to, roots = Path(args.to), find_roots(args.img_root)
        lists = split_folder(roots, classes, args.ratio, args.seed)
        for name, samples in lists.items():
            write(to / f'{name}.txt', samples)
        for name, text in class_file(class_names(lists['train'])).items():
            write_text(to / name, text)
        print(next_commands(to, *roots))
        return
    if args.like:
        by_class = list_like(args.img_root, read_numbering(args.like))
    else:
        by_class = list_folder(args.img_root, classes)
    if args.list:
        write(args.list, flat(by_class))
        return
    first, second = split_by_class(by_class, args.ratio, args.seed)
    write(args.train_list, first)
    write(args.val_list, second)


if __name__ == '__main__':
    run_script(main, get_args())
