"""Properties of what reads files and scales widths, on generated input (hypothesis)."""

import copy
import json
import pickle
import random
from collections import OrderedDict

import pytest
import torch
from bad_files import write_searched
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from training_runs import small_config

from conftest import SMALL_SPACE, make_table, random_arch
from dataset.lists import read_list, write_list
from dataset.transforms import load_pixels, load_rgb
from models.config import NetworkConfig, dump_config, load_config, parse_config
from models.model_eval import NetworkEval
from models.parsing import load_architecture, read_searched
from models.search_space import SPACE
from models.tables import load_table, save_table
from models.targeting import Target
from tools.errors import BadInput
from tools.files import load_checkpoint

quick = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

NAME = st.text(
    st.characters(codec='utf-8', exclude_characters='/\0', exclude_categories=['Cs', 'Cc', 'Zl', 'Zp', 'Zs'])
)
NAMES = st.lists(NAME.filter(lambda name: name not in ('', '.', '..')), min_size=1, max_size=3).map(' '.join)


@pytest.fixture
def no_files(monkeypatch):
    """Lists whose images are taken to exist."""
    monkeypatch.setattr('pathlib.Path.is_file', lambda path: True)


@quick
@given(st.lists(st.tuples(NAMES, st.integers(0, 9)), min_size=1, max_size=8))
def test_a_list_that_is_written_is_read_back(tmp_path, no_files, samples):
    write_list(samples, tmp_path / 'list.txt')
    assert read_list(tmp_path / 'list.txt', tmp_path, 10) == samples
    text = (tmp_path / 'list.txt').read_text()
    (tmp_path / 'list.txt').write_bytes(('\ufeff' + text.replace('\n', '\r\n')).encode())
    assert read_list(tmp_path / 'list.txt', tmp_path, None) == samples


@quick
@given(st.binary(max_size=200))
@example('a\u2028b 0\n'.encode())
@example(b'x \xc2\xb2\n')
@example(b'x\x00y 0\n')
def test_any_bytes_are_a_list_or_bad_input(tmp_path, raw):
    (tmp_path / 'list.txt').write_bytes(raw)
    try:
        samples = read_list(tmp_path / 'list.txt', tmp_path, 10)
    except BadInput as e:
        assert 'list.txt' in str(e)
    else:
        assert samples and all(0 <= label < 10 for _, label in samples)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
GOOD = json.loads(dump_config(small_config()))


def places(value, path=()):
    """The way to every value in a config."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


@quick
@given(st.sampled_from([path for path in places(GOOD) if path]), JSON)
@example(('first_stem', 'out_channels'), True)
@example(('first_stem', 'out_channels'), 8.0)
@example(('first_stem', 'out_channels'), float('nan'))
@example(('first_stem', 'out_channels'), 10**400)
@example(('first_stem', 'out_channels'), 10**9)
@example(('classifier', 'out_features'), 10**9)
@example(('stage1', 0, 'kernel_size'), 4)
@example(('stage1', 0, 'act_func'), ['relu'])
@example(('stage1',), [])
def test_a_config_with_any_value_changed_is_good_or_bad_input(path, value):
    data = copy.deepcopy(GOOD)
    holder = data
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    try:
        config = parse_config(json.dumps(data), 'changed.config')
    except BadInput as e:
        assert str(e).startswith('changed.config: ') and len(str(e)) < 1000
    else:
        assert json.loads(dump_config(config)) == data
        NetworkEval(config)(torch.zeros(2, 3, 32, 32))


@pytest.mark.parametrize(
    'text',
    [
        '[' * 100_000,
        '{"a":' * 100_000,
        '{"first_stem": ' + '9' * 5000 + '}',
        '{"first_stem": 1e999}',
        dump_config(small_config()).replace('"groups": 1', '"groups": 1, "groups": 1', 1),
        dump_config(small_config())[:-3],
        dump_config(small_config()) + '{}',
        '\x00',
        'NaN',
        '',
    ],
)
def test_odd_json_is_bad_input(text):
    with pytest.raises(BadInput, match='odd.config'):
        parse_config(text, 'odd.config')


def test_configs_of_absurd_size_are_refused_before_memory_is_asked_for():
    """Each value is within its own bounds; together they would be terabytes."""
    data = copy.deepcopy(GOOD)
    data['first_stem']['out_channels'] = data['second_stem']['in_channels'] = 65536
    data['second_stem'] |= {'mid_channels': 65536, 'out_channels': 65536}
    block = data['stage1'][0] | {'in_channels': 65536, 'mid_channels': 65536, 'out_channels': 65536, 'stride': 1}
    data['stage1'], data['stage2'] = [dict(block) for _ in range(1000)], [dict(block)]
    data['feature_mix_layer'] |= {'in_channels': 65536}
    with pytest.raises(BadInput, match='parameters'):
        NetworkConfig.from_dict(data, 'absurd.config')


VALUES = (
    st.floats(allow_nan=True, allow_infinity=True) | st.integers() | st.booleans() | st.none() | st.text(max_size=3)
)


@quick
@given(st.integers(0, 10**6), VALUES)
def test_a_table_with_any_value_changed_is_repaired_or_bad_input(tmp_path, seed, value):
    rng, table = random.Random(seed), make_table(SMALL_SPACE, 32)
    save_table(1.0, table.curves, {}, tmp_path / 't.pkl')
    data = pickle.loads((tmp_path / 't.pkl').read_bytes())  # noqa: S301  (our own file)
    key = rng.choice(list(table.curves))
    at = rng.choice(['base', key, *list(data[key])])
    (data if at in ('base', key) else data[key])[at] = value
    (tmp_path / 't.pkl').write_bytes(pickle.dumps(data))
    try:
        loaded = load_table(tmp_path / 't.pkl', 32, SMALL_SPACE)
    except BadInput as e:
        assert 't.pkl' in str(e)
    else:
        low, high = SMALL_SPACE.table_widths(32)[key]
        used = loaded.curves[key][low - 1 : high]
        assert (used >= 0).all() and (used[1:] >= used[:-1]).all() and loaded.base > 0


@quick
@given(JSON)
def test_any_pickled_value_is_a_table_or_bad_input(tmp_path, value):
    (tmp_path / 't.pkl').write_bytes(pickle.dumps(value))
    with pytest.raises(BadInput, match='t.pkl'):
        load_table(tmp_path / 't.pkl', 32, SMALL_SPACE)


@quick
@given(st.integers(0, 10**6), st.floats(0, 1), st.sampled_from([1, 2]))
def test_scaled_widths_stay_in_range_and_meet_feasible_targets(seed, share, divisor):
    rng, table = random.Random(seed), make_table(SMALL_SPACE, 32, seed)
    arch, widths = random_arch(SMALL_SPACE, rng)
    target = Target(table, SMALL_SPACE, 0.0, divisor)
    least, most = target.reach(arch)
    target = target.at(least + share * (most - least))
    chosen = {(block.stage, block.name, index) for block, index in SMALL_SPACE.chosen(arch)}
    for scaled in (target.scaler(arch).scale(widths, target.value), target.fitted(arch, widths)):
        for block, index, op in SMALL_SPACE.positions():
            width, before = scaled[block.stage][block.name][index], widths[block.stage][block.name][index]
            if (block.stage, block.name, index) in chosen:
                low, high = op.min_width(block.in_ch), op.max_width(block.in_ch)
                assert low <= width <= high and width % divisor == 0
            else:
                assert width == before
        assert target.latency(arch, scaled) <= target.value * (1 + 1e-9)


def broken(raw, rng):
    """A file with some bytes flipped, cut off, repeated or put in."""
    data = bytearray(raw)
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        at = rng.randrange(len(data)) if data else 0
        what = rng.randrange(5)
        if what == 0 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif what == 1 and data:
            data[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF])
        elif what == 2:
            del data[at : at + rng.randrange(1, 50)]
        elif what == 3:
            data[at:at] = data[at : at + rng.randrange(1, 50)]
        elif rng.random() < 0.3:
            del data[at:]
    return bytes(data)


def write_good(kind, path):
    """A good file of a kind, small where the kind allows it."""
    if kind in ('jpeg', 'png', 'gif', 'tiff', 'webp', 'bmp'):
        Image.effect_noise((40, 30), 60).convert('RGB').save(path, kind)
    elif kind == 'list':
        path.write_text('a b.png 0\nc/d.png 3\n' * 5)
    elif kind == 'config':
        path.write_text(dump_config(small_config()))
    elif kind == 'table':
        table = make_table(SMALL_SPACE, 32)
        save_table(1.0, table.curves, {'unit': 'ms'}, path)
    elif kind == 'checkpoint':
        torch.save({'state_dict': OrderedDict(a=torch.ones(5), b=torch.zeros(2, 2)), 'epoch': 3, 'flags': {}}, path)
    elif kind == 'legacy checkpoint':
        torch.save({'state_dict': {'a': torch.ones(5)}}, path, _use_new_zipfile_serialization=False)
    else:
        write_searched(path)


READERS = {
    'list': lambda path: read_list(path, path.parent, 10),
    'config': load_config,
    'table': lambda path: load_table(path, 32, SMALL_SPACE),
    'checkpoint': load_checkpoint,
    'legacy checkpoint': load_checkpoint,
    'searched model': lambda path: read_searched(path, SPACE),
    **dict.fromkeys(['jpeg', 'png', 'gif', 'tiff', 'webp', 'bmp'], lambda path: (load_rgb(path), load_pixels(path))),
}


@pytest.fixture
def small_images(monkeypatch):
    """Images that claim more pixels than this are refused, which keeps broken ones from taking gigabytes."""
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1_000_000)


def fuzz(kind, folder, rounds, seed=0):
    """Read broken files of a kind; returns how many were refused. Any other exception than BadInput comes out."""
    path, rng, refused = folder / 'file', random.Random(seed), 0
    write_good(kind, path)
    raw = path.read_bytes()
    READERS[kind](path) if kind != 'list' else None
    for _ in range(rounds):
        path.write_bytes(broken(raw, rng))
        try:
            READERS[kind](path)
        except BadInput as e:
            refused += 1
            assert '\n' not in str(e).strip()
    return refused


@pytest.mark.parametrize('kind', [kind for kind in READERS if kind != 'searched model'])
def test_a_few_broken_files_of_each_kind_are_read_or_refused(kind, tmp_path, small_images):
    assert fuzz(kind, tmp_path, 60) > 0


@pytest.mark.slow
@pytest.mark.parametrize('kind', READERS)
def test_many_broken_files_of_each_kind_are_read_or_refused(kind, tmp_path, small_images):
    assert fuzz(kind, tmp_path, 60 if kind == 'searched model' else 1000, seed=1) > 0


@pytest.mark.slow
def test_broken_models_are_no_architecture(tmp_path):
    rng, path = random.Random(2), tmp_path / 'model'
    path.write_text(dump_config(small_config()))
    raw = path.read_bytes()
    for _ in range(3000):
        path.write_bytes(broken(raw, rng))
        try:
            load_architecture(path, SPACE)
        except BadInput:
            pass
