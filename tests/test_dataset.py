"""Lists, loaders whose randomness has no state, the demo images."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.demo.unpack import unpack
from dataset.lists import list_folder, read_list, split_by_class, write_list
from dataset.loaders import Batches, EpochSampler, load_rgb, make_loader
from dataset.transforms import train_transform, val_transform
from tools.distributed import World

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


def loader(images, workers=0, world=None, batch_size=4, shuffle=True, drop_last=True):
    args = SimpleNamespace(batch_size=batch_size, workers=workers, seed=5)
    samples = read_list(images / 'train.txt', images, 3)
    return make_loader(images, samples, train_transform(32), args, world or World(CPU), shuffle, drop_last, 'train')


def test_batches_do_not_depend_on_workers_or_interruptions(images):
    def run(start, count, workers):
        stream = Batches(loader(images, workers), start)
        return [stream.next(CPU) for _ in range(count)]

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
    parts = [EpochSampler(data, 2, World(CPU, r, 4), shuffle=True, drop_last=False, seed=0) for r in range(4)]
    for part in parts:
        part.set_epoch(3)
    seen = sorted(index for part in parts for _, index in part)
    assert seen == data


def test_too_few_images_for_a_batch_are_refused(images):
    with pytest.raises(ValueError, match='20 images are fewer than one batch of --batch_size 64'):
        loader(images, batch_size=64)
    with pytest.raises(ValueError, match='multiple of 3'):
        loader(images, world=World(CPU, 0, 3))


@pytest.mark.parametrize('mode', ['L', 'P', 'RGBA', 'CMYK', '1', 'LA', 'I;16'])
def test_images_of_every_mode_are_read_as_rgb(tmp_path, mode):
    pixels = np.full((6, 5, 3), 200, np.uint8)
    if mode == 'I;16':
        image = Image.fromarray(np.full((6, 5), 200 * 257, np.uint16))
    else:
        image = Image.fromarray(pixels).convert(mode)
    path = tmp_path / ('x.tif' if mode == 'CMYK' else 'x.png')
    image.save(path)
    rgb = load_rgb(path)
    assert rgb.mode == 'RGB' and rgb.size == (5, 6)
    assert abs(np.array(rgb).astype(float).mean() - 200) < 60


def test_what_is_no_image_is_refused_by_name(tmp_path):
    (tmp_path / 'x.JPEG').write_bytes(b'not an image')
    for name in ('x.JPEG', 'absent.JPEG'):
        with pytest.raises(ValueError, match=f'{name}: cannot be read as an image'):
            load_rgb(tmp_path / name)


def test_validation_transform_scales_then_crops_the_centre():
    image = Image.new('RGB', (200, 100))
    image.paste((255, 255, 255), (100, 0, 200, 100))
    result = val_transform(56)(image)  # short side to 64, centre 56: half black, half white
    assert result.shape == (3, 56, 56)
    assert result[0, 0, 0].item() == pytest.approx(-0.485 / 0.229, abs=1e-5)
    assert result[2, 30, 55].item() == pytest.approx((1 - 0.406) / 0.225, abs=1e-5)


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
