"""Unpack the demo images (Fashion-MNIST, see NOTICE) into class folders, with lists for search, training and test.

python dataset/demo/unpack.py --to demo/images
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import tools.needed  # noqa: F401  # isort: skip

from PIL import Image

from dataset.lists import RATIO, SEED, flat, list_folder, split_by_class, write_list
from tools.options import Parser, count, run_script

SHEET = Path(__file__).with_name('fashion_mnist.png')
CLASSES = 't-shirt trouser pullover dress coat sandal shirt sneaker bag ankle-boot'.split()
TILE = 28
TRAIN_ROWS, TEST_ROWS = 5, 1


def get_args():
    """Parse the command line."""
    parser = Parser(__doc__)
    parser.add_argument('--to', required=True, help='folder that gets train/, test/ and the lists')
    parser.add_argument('--seed', type=count(0), default=SEED, help='of the split of train/ for the search')
    return parser.parse_args()


def unpack(folder: Path, seed: int) -> None:
    """Write train/<class>/ and test/<class>/ and the lists train.txt, test.txt, search_train.txt, search_val.txt."""
    sheet = Image.open(SHEET)
    columns = sheet.width // TILE
    for number, name in enumerate(CLASSES):
        first_row = number * (TRAIN_ROWS + TEST_ROWS)
        for part, start, rows in (('train', 0, TRAIN_ROWS), ('test', TRAIN_ROWS, TEST_ROWS)):
            target = folder / part / f'{number}_{name}'
            target.mkdir(parents=True, exist_ok=True)
            for i in range(rows * columns):
                top, left = (first_row + start + i // columns) * TILE, i % columns * TILE
                sheet.crop((left, top, left + TILE, top + TILE)).save(target / f'{i:04d}.png')
    train, test = list_folder(folder / 'train'), list_folder(folder / 'test')
    write_list(flat(train), folder / 'train.txt')
    write_list(flat(test), folder / 'test.txt')
    for samples, name in zip(split_by_class(train, RATIO, seed), ('search_train.txt', 'search_val.txt'), strict=True):
        write_list(samples, folder / name)


def main(args):
    """Unpack, and print the lists with their sizes."""
    folder = Path(args.to)
    unpack(folder, args.seed)
    for name in ('train.txt', 'test.txt', 'search_train.txt', 'search_val.txt'):
        print(f'{folder / name}: {len((folder / name).read_text().splitlines())} images')


if __name__ == '__main__':
    run_script(main, get_args())
