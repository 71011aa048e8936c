"""Lists, loaders whose randomness has no state, the demo images."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from dataset.demo.unpack import unpack
from dataset.device_aug import TrainPixels, ValPixels
from dataset.folders import SUFFIXES
from dataset.images import load_pixels, load_rgb
from dataset.lists import list_folder, read_classes, read_list, split_by_class, warn_of_overlap, write_list
from dataset.loaders import Batches, EpochSampler, log_skipped, make_loader
from dataset.splits import read_train_val
from dataset.transforms import train_transform, val_transform
from tools.distributed import World
from tools.errors import BadInput
from tools.precision import Precision
from tools.training import evaluate

CPU = torch.device('cpu')


def test_lists_hold_paths_with_spaces_crlf_and_bom(tmp_path):
    (tmp_path / 'a b').mkdir()
    (tmp_path / 'a b' / 'c d.png').write_bytes(b'')
    (tmp_path / 'list.txt').write_bytes('\ufeffa b/c d.png 4\r\n\r\na b/c d.png\t0\r\n'.encode())
    assert read_list(tmp_path / 'list.txt', tmp_path, 5) == [('a b/c d.png', 4), ('a b/c d.png', 0)]


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('', 'is empty'),
        ('\n \n', 'is empty'),
        ('x.png 0\nx.png\n', r"list.txt:2: 'x.png' has no label"),
        ('x.png 0\nx.png -1\n', "list.txt:2: label '-1'.*from 0 to 2"),
        ('x.png one\n', "list.txt:1: label 'one'"),
        ('x.png 3\n', 'list.txt:1: label 3 should be at most 2'),
        ('/x.png 0\n', 'leaves the image root'),
        ('a/../../x.png 0\n', 'leaves the image root'),
        ('y.png 0\n', 'no file y.png under'),
    ],
)
def test_bad_lists_are_refused_by_line(tmp_path, text, message):
    (tmp_path / 'x.png').write_bytes(b'')
    (tmp_path / 'list.txt').write_text(text)
    with pytest.raises(ValueError, match=message):
        read_list(tmp_path / 'list.txt', tmp_path, 3)


def test_odd_but_legal_lists_are_read_with_a_warning(tmp_path):
    (tmp_path / 'x.png').write_bytes(b'')
    (tmp_path / 'list.txt').write_text('x.png 0\nx.png 0\ny z.png 3\nx.png 3\nx.png 0\n')
    warnings = []
    assert len(read_list(tmp_path / 'list.txt', tmp_path, 6, warnings.append)) == 5
    assert [line.replace(f'{tmp_path}/', '') for line in warnings] == [
        'warning: list.txt lists 1 images more than once, such as x.png',
        'warning: list.txt has no images of 4 of 6 classes: 1, 2, 4, 5',
    ]
    train, val = [('a', 0), ('b', 1), ('c', 0)], [('c', 0), ('d', 1), ('b', 1)]
    warn_of_overlap(train, val, ('t.txt', 'v.txt'), warnings.append)
    assert warnings[2] == 'warning: 2 images are both in t.txt and in v.txt, such as b'
    warn_of_overlap(train, val[1:2], ('t.txt', 'v.txt'), warnings.append)
    assert len(warnings) == 3


def test_the_number_of_classes_comes_from_the_training_list_and_is_said(images):
    said = []
    lists, roots = (images / 'train.txt', images / 'val.txt'), (images, images)
    read = read_train_val(lists, roots, None, said.append)
    assert read.num_classes == 3 and said == [f'--num_classes 3: from the labels in {lists[0]}']
    assert [len(samples) for samples in read.samples] == [20, 16]
    with pytest.raises(BadInput, match='label 2 should be at most 1'):
        read_train_val(lists, roots, 2, said.append)


def test_split_is_by_class_and_by_seed(images, tmp_path):
    by_class = list_folder(images)
    assert [len(samples) for samples in by_class] == [12, 12, 12]
    assert by_class[2][0] == ('class 2/0.png', 2)
    train, val = split_by_class(by_class, 0.75, seed=1)
    assert not set(train) & set(val) and len(train) == 27 and len(val) == 9
    assert [sum(label == c for _, label in val) for c in range(3)] == [3, 3, 3]
    assert split_by_class(by_class, 0.75, seed=1) == (train, val)
    assert split_by_class(by_class, 0.75, seed=2) != (train, val)
    write_list(train, tmp_path / 't.txt')
    assert read_list(tmp_path / 't.txt', images, 3) == train


def test_names_of_classes_may_hold_spaces_and_paths_must_be_utf8(tmp_path):
    (tmp_path / 'classes.txt').write_text('golden retriever\n\n n01440764\n')
    assert read_classes(tmp_path / 'classes.txt') == ['golden retriever', 'n01440764']
    for bad in ('a/\udcff.png', 'a/b\n.png'):
        with pytest.raises(BadInput, match='line break or not in UTF-8'):
            write_list([(bad, 0)], tmp_path / 'list.txt')
    assert not (tmp_path / 'list.txt').exists()


def loader(images, workers=0, world=None, batch_size=4):
    args = SimpleNamespace(batch_size=batch_size, workers=workers, seed=5)
    samples = read_list(images / 'train.txt', images, 3)
    return make_loader(images, samples, train_transform(32), args, world or World(CPU), 'train', for_training=True)


def test_batches_do_not_depend_on_workers_or_interruptions(images):
    def run(start, count, workers):
        stream = Batches(loader(images, workers), start)
        return [next(stream) for _ in range(count)]

    whole = run(0, 12, workers=0)  # 5 batches a pass
    parallel = run(0, 12, workers=2)
    later = run(7, 5, workers=0)
    for (a, la), (b, lb) in zip(whole + whole[7:], parallel + later, strict=True):
        assert torch.equal(a, b) and torch.equal(la, lb)
    assert not torch.equal(whole[0][1], whole[5][1]) or not torch.equal(whole[0][0], whole[5][0])
    state = torch.get_rng_state()
    run(0, 2, workers=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_processes_share_images_without_repeating_any():
    data = list(range(11))
    parts = [EpochSampler(data, 2, World(CPU, r, 4), seed=0, for_training=False) for r in range(4)]
    for part in parts:
        part.set_epoch(3)
    seen = sorted(index for part in parts for _, index in part)
    assert seen == data


def test_too_few_images_for_a_batch_are_refused(images):
    with pytest.raises(ValueError, match='20 images are fewer than one batch of --batch_size 64'):
        loader(images, batch_size=64)
    with pytest.raises(ValueError, match='multiple of 3'):
        loader(images, world=World(CPU, 0, 3))


def pixels_of(path):
    """Both ways to load an image, as arrays [height, width, 3] that agree up to the decoder of JPEG."""
    rgb, pixels = load_rgb(path), load_pixels(path)
    assert rgb.mode == 'RGB' and pixels.dtype == torch.uint8
    rgb, pixels = np.array(rgb).astype(int), pixels.permute(1, 2, 0).numpy().astype(int)
    assert rgb.shape == pixels.shape and np.abs(rgb - pixels).max() <= 2
    return rgb


MODES = [
    ('L', 'png', (200, 200, 200)),
    ('P', 'png', (200, 100, 50)),
    ('RGBA', 'png', (200, 100, 50)),
    ('LA', 'png', (200, 200, 200)),
    ('1', 'png', (255, 255, 255)),
    ('I;16', 'png', (200, 200, 200)),
    ('I;16', 'tif', (200, 200, 200)),
    ('I', 'tif', (200, 200, 200)),
    ('CMYK', 'tif', (200, 100, 50)),
    ('CMYK', 'jpg', (200, 100, 50)),
    ('L', 'jpg', (200, 200, 200)),
    ('RGB', 'jpg', (200, 100, 50)),
    ('RGB', 'webp', (200, 100, 50)),
    ('RGB', 'gif', (200, 100, 50)),
]


@pytest.mark.parametrize(('mode', 'kind', 'expected'), MODES)
def test_images_of_every_mode_are_read_as_rgb(tmp_path, mode, kind, expected):
    if mode.startswith('I'):
        image = Image.fromarray(np.full((6, 5), 200 * 257, np.uint16 if mode == 'I;16' else np.int32))
        assert image.mode == mode
    elif mode in ('L', 'LA', '1'):
        image = Image.new('L', (5, 6), expected[0]).convert(mode)
    else:
        image = Image.new('RGB', (5, 6), expected).convert(mode)
    image.save(tmp_path / f'x.{kind}', quality=95)
    got = pixels_of(tmp_path / f'x.{kind}')
    assert got.shape == (6, 5, 3) and np.abs(got - expected).max() <= 8  # JPEG and GIF are lossy


def test_sixteen_bits_keep_their_order_and_range(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None]
    Image.fromarray(ramp).save(tmp_path / 'ramp.png')
    assert pixels_of(tmp_path / 'ramp.png')[0, :, 0].tolist() == list(range(256))


def test_transparent_palettes_are_read_without_a_word(tmp_path, recwarn):
    image = Image.new('RGB', (4, 4), (0, 51, 102)).convert('P')
    image.save(tmp_path / 'x.png', transparency=bytes([0, 128]))
    assert pixels_of(tmp_path / 'x.png')[0, 0].tolist() == [0, 51, 102] and not recwarn.list


def test_an_orientation_in_exif_is_not_applied_as_in_imagenet_practice(tmp_path):
    image, exif = Image.new('RGB', (32, 16), 'black'), Image.Exif()
    image.paste('white', (0, 0, 16, 16))
    exif[0x0112] = 6  # 'rotate by 90 degrees'
    image.save(tmp_path / 'x.jpg', exif=exif)
    got = pixels_of(tmp_path / 'x.jpg')
    assert got.shape == (16, 32, 3) and got[8, 4, 0] > 200 and got[8, 28, 0] < 50


def test_the_name_of_an_image_does_not_matter(tmp_path):
    Image.new('RGB', (5, 6), (1, 2, 3)).save(tmp_path / 'x.png')
    (tmp_path / 'x.png').rename(tmp_path / 'x.JPEG')
    assert pixels_of(tmp_path / 'x.JPEG')[0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize('size', [(1, 1), (1, 20000), (20000, 3), (20000, 100)])
def test_extreme_sizes_pass_through_all_transforms(tmp_path, size):
    Image.new('RGB', size, (255, 0, 0)).save(tmp_path / 'x.png')
    image, pixels = load_rgb(tmp_path / 'x.png'), load_pixels(tmp_path / 'x.png')
    for result in (train_transform(32)(image), val_transform(32)(image)):
        assert result.shape == (3, 32, 32) and result.isfinite().all()
    for result, _ in (TrainPixels(32)(pixels), ValPixels(32)(pixels)):
        assert result.shape == (3, 32, 32) and result.float().mean((1, 2)).tolist() == [255, 0, 0]


def damaged(name, folder):
    """A file that is no whole image."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / 'whole.jpg')
    Image.fromarray(noise).save(folder / 'whole.png')
    jpeg, png = (folder / 'whole.jpg').read_bytes(), (folder / 'whole.png').read_bytes()
    huge = bytearray(jpeg)
    at = jpeg.index(b'\xff\xc0') + 5
    huge[at : at + 4] = b'\xff\xff\xff\xff'  # claims 65,535 x 65,535 pixels
    contents = {
        'text.JPEG': b'not an image',
        'empty.JPEG': b'',
        'truncated.JPEG': jpeg[: len(jpeg) // 2],
        'header.JPEG': jpeg[:100],
        'truncated.png': png[: len(png) // 2],
        'claims_4e9_pixels.JPEG': bytes(huge),
    }
    (folder / name).write_bytes(contents[name])
    return folder / name


BAD_IMAGES = ['text.JPEG', 'empty.JPEG', 'truncated.JPEG', 'header.JPEG', 'truncated.png', 'claims_4e9_pixels.JPEG']


@pytest.mark.parametrize('name', BAD_IMAGES)
def test_what_is_no_image_is_refused_by_name(tmp_path, name):
    path = damaged(name, tmp_path)
    for load in (load_rgb, load_pixels):
        with pytest.raises(ValueError, match=f'{name}: cannot be read as an image') as error:
            load(path)
        assert '\n' not in str(error.value)


def test_an_absent_image_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match='absent.JPEG: cannot be read as an image .No such file'):
        load_rgb(tmp_path / 'absent.JPEG')


def spoiled_loader(folder, bad, count=300, workers=0, replace=True, bad_images='skip', batch_size=10):
    """A loader over `count` small images of which those numbered `bad` cannot be read."""
    for i in range(count):
        path = folder / f'{i}.png'
        if i in bad:
            path.write_text('bad')
        elif not path.exists():
            Image.new('RGB', (8, 8), (i % 256, i // 256, 0)).save(path)
    args = SimpleNamespace(batch_size=batch_size, workers=workers, seed=1, bad_images=bad_images)
    samples = [(f'{i}.png', i % 7) for i in range(count)]
    return make_loader(folder, samples, val_transform(32), args, World(CPU), 'train', for_training=replace)


def test_bad_images_are_replaced_alike_by_any_number_of_workers(tmp_path):
    bad = {17, 18, 250}
    batches = {workers: list(spoiled_loader(tmp_path, bad, workers=workers)) for workers in (0, 2)}
    for (a, la), (b, lb) in zip(batches[0], batches[2], strict=True):
        assert torch.equal(a, b) and torch.equal(la, lb) and len(la) == 10
    assert sum(len(labels) for _, labels in batches[0]) == 300


@pytest.mark.parametrize('workers', [0, 2])
def test_skipped_images_are_counted_and_named_once(tmp_path, workers):
    loader, lines = spoiled_loader(tmp_path, {3, 77}, workers=workers, replace=False, batch_size=7), []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        assert sum(len(labels) for _, labels in loader) == 298  # left out where images are evaluated
        log_skipped(loader, log=lines.append, world=World(CPU))
    assert len(lines) == 3 and '3.png: cannot be read as an image (not an image)' in lines[0] and '77.png' in lines[1]
    assert lines[2] == '--bad_images skip: 2 of 300 images skipped so far'


@pytest.mark.parametrize('workers', [0, 2])
def test_a_batch_of_bad_images_alone_is_left_out(tmp_path, workers):
    data = spoiled_loader(tmp_path, {140}, count=141, workers=workers, replace=False, batch_size=20)
    net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 7))
    assert len(data) == 8 and evaluate(net, data, Precision(CPU), World(CPU)).numbers['images'] == 140


@pytest.mark.parametrize('workers', [0, 2])
def test_more_than_one_in_a_hundred_bad_images_end_the_run(tmp_path, workers):
    with pytest.raises(BadInput, match='4 of 300 images are bad, more than 1%; the last one: .*png: cannot be read'):
        list(spoiled_loader(tmp_path, {0, 100, 200, 299}, workers=workers))
    with pytest.raises(BadInput, match='png: cannot be read as an image'):
        list(spoiled_loader(tmp_path, {0}, workers=workers, bad_images='error'))


def test_batches_of_one_image_are_not_trained_on(images):
    with pytest.raises(BadInput, match='--batch_size 1: batch norm needs two images'):
        loader(images, batch_size=1)


def test_validation_transform_scales_then_crops_the_centre():
    image = Image.new('RGB', (200, 100))
    image.paste((255, 255, 255), (100, 0, 200, 100))
    result = val_transform(56)(image)  # short side to 64, centre 56: half black, half white
    assert result.shape == (3, 56, 56)
    assert result[0, 0, 0].item() == pytest.approx(-0.485 / 0.229, abs=1e-5)
    assert result[2, 30, 55].item() == pytest.approx((1 - 0.406) / 0.225, abs=1e-5)


def test_a_folder_of_images_has_what_torchvision_would_read():
    assert SUFFIXES == IMG_EXTENSIONS


def test_demo_images_unpack_into_class_folders(tmp_path):
    unpack(tmp_path, seed=2)
    train = read_list(tmp_path / 'train.txt', tmp_path / 'train', 10)
    test = read_list(tmp_path / 'test.txt', tmp_path / 'test', 10)
    parts = [read_list(tmp_path / f'search_{p}.txt', tmp_path / 'train', 10) for p in ('train', 'val')]
    assert [len(train), len(test), *map(len, parts)] == [6000, 1200, 4800, 1200]
    assert sorted(parts[0] + parts[1]) == sorted(train)
    trouser = np.array(load_rgb(tmp_path / 'train' / '1_trouser' / '0000.png')).astype(float)
    assert trouser.shape == (28, 28, 3)
    # a tile cut at the right place: trousers are bright in the middle columns and black at the sides
    assert trouser[:, 9:19].mean() > 60 and trouser[:, :5].mean() < 5


def folder_of(root, counts):
    """Class folders of empty image files, as many as `counts` says."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f'{i}.jpg').write_bytes(b'')


@pytest.mark.parametrize('pair', [True, False])
def test_all_lists_of_own_images_at_once(tmp_path, run_script, pair):
    photos, lists = tmp_path / 'my photos', tmp_path / 'lists'
    folder_of(photos / 'train' if pair else photos, {'cat': 10, 'dog': 20})
    if pair:
        folder_of(photos / 'valid', {'cat': 3, 'dog': 2})
    out = run_script('dataset/make_lists.py', '--img_root', photos, '--to', lists).stdout
    sizes = {path.stem: len(path.read_text().splitlines()) for path in lists.iterdir()}
    train, val = (30, 5) if pair else (24, 6)
    search = (24, 6) if pair else (19, 5)  # 0.8 of each class
    expected = zip(('train', 'val', 'search_train', 'search_val', 'classes'), (train, val, *search, 2), strict=True)
    assert sizes == dict(expected)
    roots = [photos / 'train', photos / 'valid'] if pair else [photos, photos]
    read = {name: read_list(lists / f'{name}.txt', roots[name == 'val'], None) for name in sizes if name != 'classes'}
    assert sorted(read['search_train'] + read['search_val']) == sorted(read['train'])
    assert not set(read['train']) & set(read['val']) or pair
    assert f"train_search.py --img_root '{roots[0]}' --train_list {lists}/search_train.txt" in (
        ' '.join(out.replace('\\\n', '').split())
    )
    assert (lists / 'classes.txt').read_text() == 'cat\ndog\n'


def test_a_pair_of_folders_with_other_classes_is_refused(tmp_path, run_script):
    folder_of(tmp_path / 'train', {'cat': 3, 'dog': 3})
    folder_of(tmp_path / 'val', {'cat': 3, 'fox': 3})
    error = run_script('dataset/make_lists.py', '--img_root', tmp_path, '--to', tmp_path / 'lists', code=2).stderr
    assert 'differ in 2 class folders: dog, fox' in error and not (tmp_path / 'lists').exists()
