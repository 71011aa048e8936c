"""Image files, batches whose randomness has no state, and the images of a run from lists or folders."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from bad_files import run_here
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from conftest import ROOT
from dataset.data import Source, evaluation_images, is_imagenet, load_search_data, search_images, training_images
from dataset.lists import SUFFIXES, find_roots, list_text, parse_list, split_folder
from dataset.loaders import EpochSampler, ImageList, ImageSet, Loading, endless, fitting_batch, make_loader
from dataset.transforms import TrainPixels, ValPixels, load_pixels, load_rgb, train_transform, val_transform
from tools.distributed import World
from tools.errors import BadInput

CPU = torch.device('cpu')
NAMES = ["a's red", 'green', 'pale blue']
LOADING = Loading(32, 4, 0, seed=5)


# --- image files


def pixels_of(path):
    """Both ways to load an image, as arrays [height, width, 3] that agree up to the decoder of JPEG."""
    rgb, pixels = load_rgb(path), load_pixels(path)
    assert rgb.mode == 'RGB' and pixels.dtype == torch.uint8
    rgb, pixels = np.array(rgb).astype(int), pixels.permute(1, 2, 0).numpy().astype(int)
    assert rgb.shape == pixels.shape and np.abs(rgb - pixels).max() <= 2
    return rgb


MODES = [
    'L png',
    'P png',
    'RGBA png',
    'LA png',
    '1 png',
    'CMYK tif',
    'CMYK jpg',
    'L jpg',
    'RGB jpg',
    'RGB webp',
    'RGB gif',
]


@pytest.mark.parametrize('mode', MODES)
def test_images_of_every_8_bit_mode_are_read_as_rgb(tmp_path, mode, recwarn):
    mode, kind = mode.split()
    colour = (255, 255, 255) if mode == '1' else (200, 200, 200) if mode in ('L', 'LA') else (200, 100, 50)
    path = tmp_path / f'x.{kind}'
    more = {'transparency': bytes([0, 128])} if mode == 'P' else {}
    Image.new('RGB', (5, 6), colour).convert(mode).save(path, quality=95, **more)
    got = pixels_of(path.rename(tmp_path / 'x.JPEG'))  # the name does not matter
    assert got.shape == (6, 5, 3) and np.abs(got - colour).max() <= 8 and not recwarn.list  # JPEG is lossy


@pytest.mark.parametrize('kind', ['uint16 png', 'uint16 pgm', 'uint16 tif', 'int32 tif', 'float32 tif'])
def test_greys_of_more_than_8_bits_are_refused(tmp_path, kind):
    dtype, suffix = kind.split()
    Image.fromarray(np.arange(20, dtype=dtype).reshape(4, 5)).save(tmp_path / f'x.{suffix}')
    for load in (load_rgb, load_pixels):
        with pytest.raises(BadInput, match=rf'x.{suffix}: .* convert to 8 bits'):
            load(tmp_path / f'x.{suffix}')


def test_an_orientation_in_exif_is_not_applied_as_in_imagenet_practice(tmp_path):
    image, exif = Image.new('RGB', (32, 16), 'black'), Image.Exif()
    image.paste('white', (0, 0, 16, 16))
    exif[0x0112] = 6  # 'rotate by 90 degrees'
    image.save(tmp_path / 'x.jpg', exif=exif)
    got = pixels_of(tmp_path / 'x.jpg')
    assert got.shape == (16, 32, 3) and got[8, 4, 0] > 200 and got[8, 28, 0] < 50


@pytest.mark.parametrize('size', [(1, 1), (20000, 3)])
def test_extreme_sizes_pass_through_all_transforms(tmp_path, size):
    Image.new('RGB', size, (255, 0, 0)).save(tmp_path / 'x.png')
    image, pixels = load_rgb(tmp_path / 'x.png'), load_pixels(tmp_path / 'x.png')
    for result in (train_transform(32)(image), val_transform(32)(image)):
        assert result.shape == (3, 32, 32) and result.isfinite().all()
    for result, _ in (TrainPixels(32)(pixels), ValPixels(32)(pixels)):
        assert result.shape == (3, 32, 32) and result.float().mean((1, 2)).tolist() == [255, 0, 0]


def test_validation_transform_scales_then_crops_the_centre():
    image = Image.new('RGB', (200, 100))
    image.paste((255, 255, 255), (100, 0, 200, 100))
    result = val_transform(56)(image)  # short side to 64, centre 56: half black, half white
    assert result.shape == (3, 56, 56)
    assert result[0, 0, 0].item() == pytest.approx(-0.485 / 0.229, abs=1e-5)
    assert result[2, 30, 55].item() == pytest.approx((1 - 0.406) / 0.225, abs=1e-5)


@pytest.mark.parametrize(
    'name', ['text.JPEG', 'empty.JPEG', 'half.JPEG', 'start.JPEG', 'half.png', 'huge.JPEG', 'no.png']
)
def test_what_is_no_image_is_refused_by_name(tmp_path, name):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    noise.save(tmp_path / 'whole.png' if name.endswith('png') else tmp_path / 'whole.jpg')
    (whole,) = (path.read_bytes() for path in tmp_path.iterdir())
    at = whole.find(b'\xff\xc0') + 5
    contents = {
        'text': b'not an image',
        'empty': b'',
        'half': whole[: len(whole) // 2],
        'start': whole[:100],
        'huge': whole[:at] + b'\xff\xff\xff\xff' + whole[at + 4 :],  # claims 65,535 x 65,535 pixels
    }
    if name != 'no.png':
        (tmp_path / name).write_bytes(contents[name.split('.')[0]])
    for load in (load_rgb, load_pixels):
        with pytest.raises(BadInput, match=f'{name}: cannot be read as an image') as error:
            load(tmp_path / name)
        assert '\n' not in str(error.value)


def test_a_folder_of_images_has_what_torchvision_would_read():
    assert SUFFIXES == IMG_EXTENSIONS


# --- batches


def loader(images, world=World(CPU), **changes):  # noqa: B008
    samples = parse_list(images / 'train.txt')
    loading = replace(LOADING, **changes)
    return make_loader(ImageSet(images, samples, 'train'), train_transform(32), loading, world, for_training=True)


def test_batches_do_not_depend_on_workers_or_interruptions(images):
    def run(start, count, workers):
        stream = endless(loader(images, workers=workers), start)
        return [next(stream) for _ in range(count)]

    whole = run(0, 17, workers=0)  # 5 batches a pass
    for (a, la), (b, lb) in zip(whole + whole[7:], run(0, 17, workers=2) + run(7, 10, workers=0), strict=True):
        assert torch.equal(a, b) and torch.equal(la, lb)
    assert any(not torch.equal(whole[i][1], whole[5 + i][1]) for i in range(5))  # each pass has its own order
    state = torch.get_rng_state()
    run(0, 2, workers=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_augmentation_depends_on_seed_and_epoch(images):
    samples = parse_list(images / 'train.txt')
    first, other = (ImageList(images, samples, train_transform(32), seed) for seed in (1, 2))
    assert torch.equal(first[3, 0][0], first[3, 0][0])
    assert not torch.equal(first[3, 0][0], first[4, 0][0]) and not torch.equal(first[3, 0][0], other[3, 0][0])


@pytest.mark.parametrize('count', [11, 12])
def test_processes_share_images_without_repeating_any(count):
    data = list(range(count))
    parts = [EpochSampler(data, 2, World(CPU, r, 4), seed=0, for_training=False) for r in range(4)]
    assert sorted(index for part in parts for _, index in part) == data


def test_batches_that_cannot_be_trained_on_are_refused(images):
    for size, message in ((64, '20 images are fewer than one batch of --batch_size 64'), (1, 'needs two images')):
        with pytest.raises(BadInput, match=message):
            loader(images, batch_size=size)
    with pytest.raises(BadInput, match='multiple of 3'):
        loader(images, world=World(CPU, 0, 3))


@pytest.mark.parametrize('workers', [0, 2])
def test_a_bad_image_ends_a_run_with_its_name(tmp_path, workers):
    (tmp_path / 'bad.png').write_text('bad')
    images = ImageSet(tmp_path, [('bad.png', 0)], 'list')
    with pytest.raises(BadInput, match='bad.png: cannot be read as an image'):
        list(make_loader(images, None, replace(LOADING, workers=workers), World(CPU), for_training=False))


@pytest.mark.parametrize(
    ('counts', 'processes', 'given', 'batch'),
    [((100, 30), 1, 32, 30), ((100, 40), 1, 32, 32), ((25, 99), 2, 32, 24), ((3, 99), 2, 32, 32), ((9, 9), 1, 8, 8)],
)
def test_a_batch_is_at_most_what_there_is(counts, processes, given, batch, caplog):
    sets = [ImageSet('r', [('x.png', 0)] * count, 'list') for count in counts]
    assert fitting_batch(given, sets, World(CPU, size=processes)) == batch
    assert len(caplog.messages) == (batch != given)


# --- images of a run


@pytest.fixture
def photos(tmp_path):
    """Class folders of noisy images of one colour each."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(NAMES):
        (tmp_path / 'photos' / name).mkdir(parents=True)
        for i in range(12):
            pixels = np.clip(rng.normal(60 + 60 * label, 40, (36, 40, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / 'photos' / name / f'{i}.png')
    return tmp_path / 'photos'


def source(root, val_root=None, **more):
    return Source(str(root), str(val_root or root), **more)


def test_search_and_training_split_a_folder_alike_whatever_their_seed(photos):
    lists = split_folder(find_roots(photos))
    trained = training_images(source(photos), None)
    assert (trained.train.samples, trained.val.samples, trained.names) == (lists['train'], lists['val'], NAMES)
    assert trained.flags == {'num_classes': 3, 'train_list': None, 'val_list': None}
    for seed in (2, 5):
        loaded = load_search_data(source(photos), replace(LOADING, seed=seed, batch_size=30), World(CPU), None)
        assert (loaded.train.samples, loaded.val.samples) == (lists['search_train'], lists['search_val'])
        assert loaded.batch_size == len(lists['search_val']) == loaded.loaders[0].batch_size
        assert loaded.run_files == {f'{name}.txt': list_text(part) for name, part in lists.items()} | {
            'classes.txt': ''.join(f'{name}\n' for name in NAMES)
        }


def test_a_run_goes_on_with_its_own_lists_when_its_folder_has_grown(photos, tmp_path):
    first, kept = search_images(source(photos), 2, World(CPU), None), tmp_path / 'run'
    kept.mkdir()
    for name, text in first.files.items():
        (kept / name).write_text(text)
    Image.new('RGB', (40, 40)).save(photos / 'green' / 'new.png')
    again, fresh = (search_images(source(photos), 2, World(CPU), folder) for folder in (kept, None))
    assert again.train.samples == first.train.samples and again.digest == first.digest != fresh.digest
    assert training_images(source(photos), kept).train.samples == parse_list(kept / 'train.txt')


def test_classes_are_counted_and_lists_compared(images, caplog):
    def read(**more):
        return training_images(source(images, train_list=str(images / 'train.txt'), **more), None)

    caplog.set_level('INFO')
    lists = {'val_list': str(images / 'val.txt')}
    found = read(**lists)
    assert (len(found.train.samples), len(found.val.samples), found.num_classes) == (20, 16, 3)
    assert f'--num_classes 3: from the labels in {images}/train.txt' in caplog.text
    assert 'images are both in' not in caplog.text and read(val_list=str(images / 'train.txt')).digest != found.digest
    assert '20 images are both in' in caplog.text
    for bad, message in ((lists | {'num_classes': 2}, "label '2'"), ({}, '--val_list is missing')):
        with pytest.raises(BadInput, match=message):
            read(**bad)
    with pytest.raises(BadInput, match='3 class folders, --num_classes 2 is fewer'):
        training_images(source(images, num_classes=2), None)


def test_a_test_folder_has_the_labels_of_the_weights(photos, caplog):
    (photos / NAMES[0]).rename(photos.parent / 'away')

    def found(names, count):
        where = source(photos, num_classes=count)
        return {label for _, label in evaluation_images(where, names, 'w.pth.tar', {}).samples}

    assert found(NAMES, 3) == {1, 2} and found(None, 3) == {0, 1} and 'name no classes' in caplog.text
    for names, count, message in ((['x', 'y'], 2, 'none of the 2 class folders'), (None, 1, 'more than the 1')):
        with pytest.raises(BadInput, match=message):
            found(names, count)


def test_training_images_are_never_tested_on_unasked(photos, tmp_path, monkeypatch):
    """A training's flags lead to its images from any folder, though it was started beside them."""
    monkeypatch.chdir(photos.parent)
    words = ['--train_root', photos.name, '--config_path', ROOT / 'models' / 'zoo' / 'tf_nas_a.config', '--epochs', 1]
    words += ['--max_steps', 1, '--batch_size', 4, '--img_size', 32, '--device', 'cpu', '--save', tmp_path / 'runs']
    assert run_here(monkeypatch, 'train_eval.py', [*words, '--workers', 0]) == 0
    (weights,) = (tmp_path / 'runs').glob('*/checkpoint.pth.tar')
    trained = torch.load(weights, weights_only=True)['flags']
    monkeypatch.chdir(ROOT)
    where = source(photos, num_classes=3)
    kept = weights.with_name('val.txt')
    assert evaluation_images(where, NAMES, weights, trained).samples == parse_list(kept)
    kept.unlink()
    with pytest.raises(BadInput, match='trained on images of this folder; name the others with --val_list'):
        evaluation_images(where, NAMES, weights, trained)


def test_the_default_lists_are_imagenets(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not is_imagenet(photos)
    names = (ROOT / 'dataset' / 'imagenet100_classes.txt').read_text().split()
    for count in (49, 50):  # Imagenette has a few of them
        for name in names[:count]:
            (tmp_path / 'x' / name).mkdir(parents=True, exist_ok=True)
        assert is_imagenet(tmp_path / 'x') == (count == 50)
    (tmp_path / 'dataset').mkdir()
    (tmp_path / 'dataset' / 'ImageNet-100-effb0_train_cls_ratio0.8.txt').write_text('green/0.png 0\n')
    assert is_imagenet(photos)
