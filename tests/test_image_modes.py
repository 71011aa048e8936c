"""Images of more than 8 bits: what is black and what is white, what is refused, what is warned of."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dataset.images import load_pixels, load_rgb
from dataset.splits import read_train_val
from tools.errors import BadInput


def grey(path):
    """The grey values of an image, [height, width], the same by both ways to load it."""
    pixels = load_pixels(path).numpy()
    assert (pixels == np.asarray(load_rgb(path)).transpose(2, 0, 1)).all() and (pixels == pixels[:1]).all()
    return pixels[0]


def write_tiff(path, data, bits, *, sample_format=1, photometric=1):
    """A grey TIFF file of one row, little-endian, uncompressed, `bits` a value; `data`: its bytes."""
    width = len(data) * 8 // bits
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 200, 277: 1, 278: 1, 279: len(data)}
    tags[339] = sample_format
    entries = b''.join(struct.pack('<HHII', tag, 4, 1, value) for tag, value in sorted(tags.items()))
    header = struct.pack('<2sHIH', b'II', 42, 8, len(tags)) + entries + struct.pack('<I', 0)
    path.write_bytes(header.ljust(200, b'\0') + data)
    return path


UNSIGNED, SIGNED, FLOAT = 1, 2, 3
RAMP16 = np.array([0, 255, 256, 4095, 32768, 65280, 65535], '<u2')
EIGHT = [0, 0, 1, 15, 128, 255, 255]

CASES = [
    ('16 bits', RAMP16, 16, UNSIGNED, EIGHT),
    ('16 bits, dark', RAMP16[:4], 16, UNSIGNED, EIGHT[:4]),
    ('16 bits, signed', RAMP16[:5] // 2, 16, SIGNED, [0, 0, 0, 7, 64]),
    ('32 bits of 16', RAMP16.astype('<i4'), 32, SIGNED, EIGHT),
    ('32 bits of 16, unsigned', RAMP16.astype('<u4'), 32, UNSIGNED, EIGHT),
    ('32 bits of 8', np.array([0, 1, 128, 255], '<i4'), 32, SIGNED, [0, 1, 128, 255]),
    ('32 bits, black', np.array([0, 0], '<i4'), 32, SIGNED, [0, 0]),
    ('floats to 1', np.array([0, 0.25, 0.5, 0.999, 1], '<f4'), 32, FLOAT, [0, 64, 128, 255, 255]),
    ('floats to 255', np.array([0, 0.25, 1, 128, 254.6, 255], '<f4'), 32, FLOAT, [0, 0, 1, 128, 255, 255]),
]


@pytest.mark.parametrize(
    ('values', 'bits', 'kind', 'expected'), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
def test_deep_images_are_scaled_by_their_meaning(tmp_path, values, bits, kind, expected):
    path = write_tiff(tmp_path / 'x.tif', values.tobytes(), bits, sample_format=kind)
    assert grey(path)[0].tolist() == expected


def test_twelve_bits_that_the_file_declares_fill_the_range(tmp_path):
    values = [0, 15, 16, 2048, 4095, 4080]
    pairs = zip(values[::2], values[1::2], strict=True)
    packed = b''.join(((a << 12) | b).to_bytes(3, 'big') for a, b in pairs)
    assert grey(write_tiff(tmp_path / 'x.tif', packed, 12))[0].tolist() == [0, 0, 1, 128, 255, 255]


def test_white_is_zero_if_the_file_declares_it(tmp_path):
    path = write_tiff(tmp_path / 'x.tif', RAMP16.tobytes(), 16, photometric=0)
    assert grey(path)[0].tolist() == [(65535 - value) >> 8 for value in RAMP16.tolist()]
    path = write_tiff(tmp_path / 'x.tif', np.array([0, 0.25, 1], '<f4').tobytes(), 32, sample_format=3, photometric=0)
    assert grey(path)[0].tolist() == [255, 191, 0]
    path = write_tiff(tmp_path / 'x.tif', bytes([0, 10, 255]), 8, photometric=0)  # PIL does this one
    assert grey(path)[0].tolist() == [255, 245, 0]


def test_a_dark_image_of_16_bits_stays_dark_in_every_format(tmp_path):
    dark = np.array([[0, 100, 255], [200, 255, 255]], np.uint16)
    for name in ('x.png', 'x.pgm', 'x.tif'):
        Image.fromarray(dark).save(tmp_path / name)
        assert grey(tmp_path / name).max() == 0, name
    (tmp_path / 'x.pgm').write_bytes(b'P5 3 1 4095\n' + struct.pack('>3H', 0, 2048, 4095))  # PIL scales by the header
    assert grey(tmp_path / 'x.pgm')[0].tolist() == [0, 128, 255]


@pytest.mark.parametrize('mode', ['RGB', 'LA'])
def test_deep_colours_in_png_keep_their_high_byte(tmp_path, mode):
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    pixel = struct.pack('>3H', 0x1234, 0x1234, 0x1234) if mode == 'RGB' else struct.pack('>2H', 0x1234, 0xFFFF)
    header = struct.pack('>2I5B', 1, 1, 16, {'RGB': 2, 'LA': 4}[mode], 0, 0, 0)
    body = chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(b'\0' + pixel)) + chunk(b'IEND', b'')
    (tmp_path / 'x.png').write_bytes(b'\x89PNG\r\n\x1a\n' + body)
    assert grey(tmp_path / 'x.png')[0].tolist() == [0x12]


REFUSED = [
    ([-1, 300], '<i4', SIGNED, 'grey values from -1 to 300, of mode I; expected 0 to 255 or 0 to 65535'),
    ([0, 65536], '<i4', SIGNED, 'from 0 to 65536'),
    ([0, 2**32 - 1], '<u4', UNSIGNED, 'from -1 to 0'),  # as PIL reads it
    ([-0.5, 0.5], '<f4', FLOAT, 'grey values from -0.5 to 0.5, of mode F; expected 0 to 1 or 0 to 255'),
    ([0, 4095], '<f4', FLOAT, 'from 0 to 4095'),
    ([0, np.nan], '<f4', FLOAT, 'from nan to nan'),
    ([0, np.inf], '<f4', FLOAT, 'from 0 to inf'),
    ([-100, 100], '<i2', SIGNED, 'from -100 to 100'),
]


@pytest.mark.parametrize(('values', 'dtype', 'kind', 'message'), REFUSED)
def test_values_without_a_meaning_are_refused_by_name_and_range(tmp_path, values, dtype, kind, message):
    data = np.array(values, dtype)
    path = write_tiff(tmp_path / 'x.tif', data.tobytes(), data.itemsize * 8, sample_format=kind)
    for load in (load_rgb, load_pixels):
        with pytest.raises(BadInput, match='x.tif: cannot be read as an image .grey values') as error:
            load(path)
        assert message in str(error.value) and '\n' not in str(error.value)


def warnings_of(folder, images):
    """The warnings of range of `read_train_val` about two lists: of noise, and of `images` in turn."""
    noise = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    for name, arrays in (('train', [noise] * 8), ('val', images)):
        for i, array in enumerate(arrays):
            Image.fromarray(array).save(folder / f'{name}{i}.png')
        (folder / f'{name}.txt').write_text(''.join(f'{name}{i}.png {i % 2}\n' for i in range(len(arrays))))
    lines = []
    read_train_val((folder / 'train.txt', folder / 'val.txt'), (folder, folder), None, lines.append)
    return [line for line in lines if 'nearly' in line]


def test_lists_of_flat_or_black_images_are_warned_of(tmp_path):
    rng = np.random.default_rng(1)
    twelve = [rng.integers(0, 4096, (8, 8)).astype(np.uint16) for _ in range(5)]
    (line,) = warnings_of(tmp_path, twelve)
    assert line.startswith(f'warning: the first 4 images of {tmp_path}/val.txt are nearly constant or black')
    assert 'values up to 15, of 255), such as val0.png' in line
    flat = [np.full((8, 8), 200, np.uint8) + rng.integers(0, 3, (8, 8), dtype=np.uint8) for _ in range(5)]
    (line,) = warnings_of(tmp_path, flat)
    assert 'standard deviation up to 0.' in line and 'values up to 202' in line


def test_one_flat_image_among_the_first_is_not_warned_of(tmp_path):
    ramp, flat = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4, np.zeros((8, 8), np.uint8)
    assert not warnings_of(tmp_path, [flat, flat, ramp, flat])
    assert warnings_of(tmp_path, [flat, flat, flat, flat, ramp])
    colour = np.broadcast_to(np.array([200, 40, 40], np.uint8), (8, 8, 3))
    assert warnings_of(tmp_path, [colour] * 4)  # constant in each channel


def test_images_that_cannot_be_read_are_no_matter_of_the_warning(tmp_path):
    ramp = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    warnings_of(tmp_path, [ramp] * 4)
    for i in range(4):
        (tmp_path / f'val{i}.png').write_text('no image')
    lines = []
    read_train_val((tmp_path / 'train.txt', tmp_path / 'val.txt'), (tmp_path, tmp_path), None, lines.append)
    assert not [line for line in lines if 'nearly' in line]


def test_a_tiff_of_an_unknown_kind_is_not_called_no_image(tmp_path):
    data = np.linspace(0, 1, 4, dtype='<f8').tobytes()
    with pytest.raises(BadInput, match='a TIFF file of a kind that PIL cannot read'):
        load_rgb(write_tiff(tmp_path / 'x.tif', data, 64, sample_format=FLOAT))
    (tmp_path / 'x.tif').write_text('no image')
    with pytest.raises(BadInput, match='not an image'):
        load_rgb(tmp_path / 'x.tif')
