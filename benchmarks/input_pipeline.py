"""Images per second that one worker core prepares, by the paper's pipeline and by --device_aug.

    python benchmarks/input_pipeline.py             (generated JPEGs, 500 x 375)
    python benchmarks/input_pipeline.py --img_root DIR --list LIST

A worker reads, decodes, augments and collates JPEG files. With --device_aug the training device jitters the colours
instead; its time per image is printed too. Both pipelines alternate.
"""

import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.counting import seconds
from dataset.device_aug import TrainPixels
from dataset.folders import ClassFolders
from dataset.lists import read_list
from dataset.loaders import ImageList, collate
from dataset.transforms import train_transform
from tools.distributed import pick_device
from tools.environment import device_name
from tools.errors import BadInput
from tools.options import Parser, add_device_arg, count, image_size, run_script

QUALITY = 92
"""JPEG quality of the generated files, which gives about 100 KB, the average size in ImageNet."""


def get_args():
    """Parse the command line."""
    parser = Parser(__doc__)
    parser.add_argument('--img_root', help='folder of images')
    parser.add_argument('--list', help="lines of 'relative/path label'")
    parser.add_argument('--images', type=count(2), default=64, help='images per round')
    parser.add_argument('--rounds', type=count(3), default=9)
    parser.add_argument('--img_size', type=image_size, default=224)
    add_device_arg(parser)
    return parser.parse_args()


def photo_like(rng, width=500, height=375):
    """Return an image with the 1/f spectrum of photographs, correlated colours, and edges of flat shapes."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    noise = rng.normal(size=(3, height, width))
    noise = np.fft.irfft2(np.fft.rfft2(noise) / frequency, s=(height, width))
    noise /= noise.std((1, 2), keepdims=True)
    image = 128 + 45 * (0.85 * noise[:1] + 0.35 * noise) + rng.normal(size=(1, height, width)) * 3
    y, x = np.mgrid[:height, :width]
    for _ in range(6):
        centre, radius = rng.uniform(size=2) * (height, width), rng.uniform(20, 120)
        inside = np.hypot(y - centre[0], x - centre[1]) < radius
        image[:, inside] = 0.5 * image[:, inside] + 0.5 * rng.uniform(0, 255, (3, 1))
    return Image.fromarray(image.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def generate(folder, images):
    """Write photo-like JPEG files into a folder of one class."""
    rng = np.random.default_rng(0)
    (folder / 'class').mkdir()
    for i in range(images):
        photo_like(rng).save(folder / 'class' / f'{i:04d}.JPEG', quality=QUALITY)


def decoded(images, epoch):
    """Return a batch of all images."""
    return collate([images[epoch, i] for i in range(len(images))])


def time_workers(root, samples, args):
    """Return the median seconds per image by pipeline, and a batch of the --device_aug pipeline."""
    transforms = {'recipe': train_transform(args.img_size), 'device_aug': TrainPixels(args.img_size)}
    data = {name: ImageList(root, samples, transform, seed=0) for name, transform in transforms.items()}
    times = {name: [] for name in data}
    for turn in range(args.rounds + 1):
        for name, images in data.items():
            decode = partial(decoded, images, turn)
            took = seconds(decode, torch.device('cpu'))
            times[name] += [took / len(samples)] if turn else []  # the first turn warms up
    batch, _ = decoded(data['device_aug'], 0)
    return {name: statistics.median(values) for name, values in times.items()}, batch


def time_device(batch, device, rounds):
    """Return the median seconds per image to jitter and normalise a batch that is already on the device."""
    batch.pixels, batch.colours = batch.pixels.to(device), batch.colours.to(device)
    times = [seconds(lambda: batch.to(device), device) for _ in range(rounds + 1)]
    return statistics.median(times[1:]) / len(batch.pixels)  # the first time warms up


def main(args):
    """Generate images if none are given, time both pipelines alternately, print."""
    if bool(args.img_root) != bool(args.list):
        raise BadInput('give both --img_root and --list, or neither')
    device = pick_device(args.device)
    torch.set_num_threads(1)  # as in a worker
    with tempfile.TemporaryDirectory() as folder:
        root = Path(args.img_root or folder)
        if not args.img_root:
            generate(root, args.images)
        samples = read_list(args.list, root, None, warn=lambda _: None) if args.list else None
        samples = samples or [(path, 0) for path in ClassFolders(root).images('class')]
        samples = samples[: args.images]
        sizes = statistics.mean((root / path).stat().st_size for path, _ in samples)
        print(f'{len(samples)} images of {sizes / 1000:.0f} KB on average, size {args.img_size}, {args.rounds} rounds')
        medians, batch = time_workers(root, samples, args)
    for name, median in medians.items():
        ratio = medians['recipe'] / median
        print(f'{name}: {1 / median:.0f} images/s a worker core ({1000 * median:.2f} ms an image), {ratio:.2f} x')
    on_device = time_device(batch, device, args.rounds)
    where = f'{device_name(device)}, {torch.get_num_threads()} thread'
    print(f'then on the device ({where}): {1e6 * on_device:.0f} us an image')


if __name__ == '__main__':
    run_script(main, get_args())
