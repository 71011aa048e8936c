"""Tables: sums, expected latency and its gradients, what is refused and what is repaired."""

import csv
import json
import os
import pickle
import random
import re
from collections import OrderedDict
from functools import partial

import numpy as np
import pytest
import torch

from conftest import ROOT, SMALL_SPACE, make_table, random_arch
from models.config import build_config
from models.latency import expected_latency, load_table, save_table
from models.search_space import SPACE
from tools.errors import BadInput


def test_expected_latency_by_hand(small_space):
    # stage 1: one block; stage 2: exits after 0, 1, 2 blocks; stage 3: exits after 1, 2 blocks
    matrix = torch.tensor([[1.0, 2, 3], [10, 20, 30], [100, 200, 300], [4, 5, 6], [40, 50, 60]])
    weights = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0, 0, 1], [0, 1, 0], [0.25, 0.25, 0.5]])
    sinks = [torch.tensor([1.0]), torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.6, 0.4])]
    # blocks: 1, 15, 300, 5, 52.5
    expected = 7 + 1 + (0.2 * 0 + 0.3 * 15 + 0.5 * 315) + (0.6 * 5 + 0.4 * 57.5)
    assert expected_latency(7.0, matrix, weights, sinks, small_space).item() == pytest.approx(expected, abs=1e-4)


def test_one_hot_mixture_has_the_latency_of_the_network(small_space):
    table, rng = make_table(small_space, 32), random.Random(0)
    for _ in range(20):
        arch, widths = random_arch(small_space, rng)
        weights, sinks = torch.zeros(5, 3), []
        row = 0
        for name, stage in small_space.named_stages:
            for i in range(stage.depth):
                weights[row, arch[name][i] if i < len(arch[name]) else 0] = 1
                row += 1
            sink = torch.zeros(len(stage.exit_depths))
            sink[stage.exit_depths.index(len(arch[name]))] = 1
            sinks.append(sink)
        mixture = expected_latency(table.base, table.matrix(widths, small_space), weights, sinks, small_space)
        assert mixture.item() == pytest.approx(table.total(arch, widths, small_space), rel=1e-5)
        assert table.of_config(build_config(arch, widths, 10, small_space)) == pytest.approx(
            table.total(arch, widths, small_space)
        )


def test_gradients_of_latency_by_finite_differences(small_space):
    table = make_table(small_space, 32)
    matrix = table.matrix(small_space.start_widths(), small_space).double()
    alphas = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    betas = [torch.randn(len(s.exit_depths), dtype=torch.float64, requires_grad=True) for s in small_space.stages]

    def latency(alphas, *betas):
        return expected_latency(1.0, matrix, alphas.softmax(1), [b.softmax(0) for b in betas], small_space)

    assert torch.autograd.gradcheck(latency, (alphas, *betas))


def test_reach_brackets_random_networks_and_is_reached(small_space):
    table, rng = make_table(small_space, 32), random.Random(1)
    least, shallow, most = table.reach(small_space)
    assert least < shallow < most
    totals = [table.total(*random_arch(small_space, rng), small_space) for _ in range(300)]
    assert least <= min(totals) and max(totals) <= most
    biggest = {n: [2] * s.depth for n, s in small_space.named_stages}
    candidates = [
        table.total({n: [i] * len(v) for n, v in biggest.items()}, small_space.max_widths(), small_space)
        for i in range(3)
    ]
    assert max(candidates) <= most
    assert table.target('0%', small_space) == pytest.approx(least) and table.target(
        '50%', small_space
    ) == pytest.approx((least + most) / 2)
    for end in (least, most):  # as they are printed, in whichever way they were rounded
        assert least <= table.target(f'{end:.4f}', small_space) <= most and table.target(
            f'{end:.4f}', small_space
        ) == pytest.approx(end, abs=1e-4)
    assert table.target('100%', small_space) == most
    for text in ('0', '-3', 'nan', 'fast', '101%', f'{most + 0.01}'):
        with pytest.raises(ValueError, match='--target_lat'):
            table.target(text, small_space)


def write(path, **changes):
    """A published-format table on disk with some entries changed; None removes one."""
    table = make_table()
    data = OrderedDict(base=table.base)
    for key, curve in table.curves.items():
        data[key] = OrderedDict((w, float(ms)) for w, ms in enumerate(curve, start=1))
    for key, value in changes.items():
        if value is None:
            del data[key]
        else:
            data[key] = value
    path.write_bytes(pickle.dumps(data))
    return path


def test_tables_survive_saving(tmp_path):
    table = make_table()
    save_table(table.base, table.curves, {'unit': 'ms', 'device': 'test'}, tmp_path / 't.pkl')
    loaded = load_table(tmp_path / 't.pkl', 224, SPACE)
    assert loaded.base == table.base and loaded.meta['device'] == 'test'
    assert all(np.array_equal(curve, table.curves[key]) for key, curve in loaded.curves.items())


def test_bad_tables_are_refused_by_name(tmp_path):
    key, second = list(SPACE.table_widths())[:2]
    good = make_table().curves[key]
    cases = [
        ({'base': None}, 'base'),
        ({'base': float('nan')}, 'base'),
        ({'base': -1.0}, 'base'),
        ({key: None, second: None}, f'2 of 66 keys.*{key}, {second}.*make_lat_lut.py'),
        ({key: {w: 1.0 for w in range(1, 100)}}, rf'{key} lacks 29 widths of 32 to 128: 100, 101, 102'),
        ({key: dict(enumerate(good, start=1)) | {50: float('nan')}}, f'{key} at width 50'),
        ({key: dict(enumerate(good, start=1)) | {50: 'fast'}}, f'{key} at width 50'),
        ({'base': 10**400}, 'base'),
        ({'meta': 5}, "'meta' is a int"),
    ]
    for changes, message in cases:
        changes = {k: {w: x if isinstance(x, str) else float(x) for w, x in v.items()} if isinstance(v, dict) else v
                   for k, v in changes.items()}  # fmt: skip
        with pytest.raises(ValueError, match=message):
            load_table(write(tmp_path / 'bad.pkl', **changes), 224, SPACE)
    with pytest.raises(ValueError, match='66 of 66 keys of input size 64.*--img_size 64'):
        load_table(write(tmp_path / 'size.pkl'), 64, SPACE)
    with pytest.raises(ValueError, match='not a pickled latency table'):
        (tmp_path / 'cut.pkl').write_bytes((tmp_path / 'size.pkl').read_bytes()[:1000])
        load_table(tmp_path / 'cut.pkl', 224, SPACE)
    with pytest.raises(ValueError, match='no latency table there'):
        load_table(tmp_path / 'absent.pkl', 224, SPACE)
    with pytest.raises(ValueError, match='seconds'):
        table = make_table()
        save_table(table.base / 1000, {k: c / 1000 for k, c in table.curves.items()}, {}, tmp_path / 's.pkl')
        load_table(tmp_path / 's.pkl', 224, SPACE)


def plain_table():
    """A table as published: a dict of plain values, and the table."""
    table = make_table(SMALL_SPACE, 32)
    return {'base': table.base} | {
        key: dict(enumerate(curve.tolist(), start=1)) for key, curve in table.curves.items()
    }, table


def numpy_scalars(data):
    """Every number and width as a NumPy scalar, of several types."""
    curves = {
        key: {(np.int64 if w % 2 else np.uint16)(w): np.float64(ms) for w, ms in curve.items()}
        for key, curve in data.items()
        if key != 'base'
    }
    return curves | {'base': np.array(data['base']), 'meta': {'batch_size': np.int32(8), 'unit': 'ms'}}


def numpy_arrays(data):
    """Curves as arrays from width 1 on, in C order, in Fortran order, as big-endian numbers."""
    curves = {key: np.array(list(curve.values())) for key, curve in data.items() if key != 'base'}
    last = list(curves)[-1]
    curves[last] = curves[last].astype('>f8')
    return OrderedDict(curves, base=np.float64(data['base']))


@pytest.mark.parametrize('protocol', range(6))
@pytest.mark.parametrize('form', [dict, numpy_scalars, numpy_arrays])
@pytest.mark.parametrize('core', ['numpy._core', 'numpy.core'])
def test_pickles_with_numpy_values_are_read(form, protocol, core, tmp_path):
    data, table = plain_table()
    raw = pickle.dumps(form(data), protocol=protocol)
    named = b'cnumpy._core' if protocol < 4 else b'numpy._core'
    if form is not dict:
        assert named in raw
    if protocol < 4:  # protocol 4 gives the lengths of names
        raw = raw.replace(b'numpy._core', core.encode())
    (tmp_path / 't.pkl').write_bytes(raw)
    loaded = load_table(tmp_path / 't.pkl', 32, SMALL_SPACE)
    assert loaded.base == table.base and type(loaded.base) is float
    assert all(np.array_equal(curve, table.curves[key]) for key, curve in loaded.curves.items())
    if form is numpy_scalars:
        assert loaded.setting('batch_size', 1) == 8


def test_half_precision_and_whole_numbers_are_read_by_value(tmp_path):
    data, table = plain_table()
    key, other = list(table.curves)[:2]
    data[key] = np.arange(1, len(data[key]) + 1, dtype=np.int16)
    data[other] = np.sqrt(np.arange(1, len(data[other]) + 1)).astype(np.float16)
    (tmp_path / 't.pkl').write_bytes(pickle.dumps(data))
    loaded = load_table(tmp_path / 't.pkl', 32, SMALL_SPACE)
    assert loaded.curves[key].tolist() == list(range(1, len(data[key]) + 1))
    assert loaded.curves[other][3] == 2.0 and loaded.curves[other][1] == np.float16(2**0.5)


def text_table(path, data, header=True):
    """A table as CSV or JSON."""
    if path.suffix == '.json':
        path.write_text(json.dumps(data))
        return
    rows = [(key, w, ms) for key, curve in data.items() if key not in ('base', 'meta') for w, ms in curve.items()]
    rows += [('base', '', data['base'])] + [('meta', *item) for item in data.get('meta', {}).items()]
    with open(path, 'w', newline='') as f:
        csv.writer(f).writerows([('key', 'width', 'ms')] * header + rows)


@pytest.mark.parametrize(('name', 'header'), [('t.json', True), ('t.csv', True), ('t.CSV', False)])
def test_json_and_csv_tables_are_read(name, header, tmp_path):
    data, table = plain_table()
    data['meta'] = {'unit': 'ms', 'batch_size': 4, 'device': 'Pixel, of 2026'}
    text_table(tmp_path / name, data, header)
    loaded = load_table(tmp_path / name, 32, SMALL_SPACE)
    assert loaded.base == table.base and loaded.meta == data['meta']
    assert all(np.array_equal(curve, table.curves[key]) for key, curve in loaded.curves.items())


def test_text_tables_that_are_none_are_refused_by_line(tmp_path):
    key = next(iter(SPACE.table_widths()))
    for name, text, message in (
        ('t.csv', f'{key};32;1\n', 'line 1 has 1 columns, should have 3: key, width, ms'),
        ('t.csv', f'key,width,ms\n\nbase,,1\n{key},32,fast\n', "line 4: 'fast' should be a latency in ms"),
        ('t.csv', 'base,,fast\n', "line 1: 'fast' should be"),
        ('t.csv', f'{key},32,fast\n', "line 1: 'fast' should be"),
        ('t.csv', f'base,,1\n{key},32,1\n{key},32,2\n', f'line 3: {key},32 is there twice'),
        ('t.csv', 'base,,1\nbase,,1\n', 'line 2: base, is there twice'),
        ('t.csv', '', "'base' is None"),
        ('t.json', '{"base": 1, "base": 2}', 'not a JSON latency table .*twice'),
        ('t.txt', '{"base": 1}', 'not a pickled latency table .*; name JSON and CSV tables .json and .csv'),
        ('t.json', '[1]', 'holds a list'),
        ('t.json', '{', 'not a JSON latency table'),
        ('t.json', '{"base": NaN}', "'base' is nan"),
        ('t.pkl', 'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n', 'a Git LFS pointer.*git lfs pull'),
        ('t.csv', 'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n', 'a Git LFS pointer.*git lfs pull'),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(BadInput, match=f'{name}: {message}'):
            load_table(tmp_path / name, 224, SPACE)


@pytest.mark.parametrize(
    ('widths', 'message'),
    [
        ({'32': 1.0, 32: 1.0}, 'has width 32 twice'),
        ({'wide': 1.0}, "has a width 'wide', should be a whole number"),
        ({32.5: 1.0}, 'has a width 32.5, should be'),
        ({10**400: 1.0}, 'has a width 1000'),
        ({1e300: 1.0}, 'has a width 1e'),
        ({True: 1.0}, 'has a width True'),
        ({}, 'lacks 97 widths of 32 to 128: 32, 33, 34, ...'),
        ({80: 1.0}, 'lacks 96 widths'),
        ({w: 1.0 for w in range(48, 129, 8)}, 'lacks 16 widths of 32 to 128: 32, 33, 34, ...'),
        ({w: 1.0 for w in range(32, 113, 8)}, 'lacks 16 widths of 32 to 128: 113, 114, 115, ...'),
    ],
)
def test_widths_that_cannot_be_are_refused(widths, message, tmp_path):
    key = next(iter(SPACE.table_widths()))
    with pytest.raises(BadInput, match=f'{key} {re.escape(message)}'):
        load_table(write(tmp_path / 't.pkl', **{key: widths}), 224, SPACE)


@pytest.mark.parametrize('start', [1, 5, 8])
def test_every_eighth_width_is_enough(start, tmp_path):
    """Curves with a kink at a given width are met exactly, and continue at their ends, for three keys by a step."""
    data, truth, lines = {'base': 1.0}, {}, []
    for key, (low, high) in SPACE.table_widths().items():
        kink = start + 8 * ((low + high) // 16)
        first = low + (start - low) % 8 if len(truth) < 3 else start
        widths = np.arange(1, high + 1)
        truth[key] = 0.5 + 0.01 * widths + 0.02 * np.maximum(widths - kink, 0)
        data[key] = {str(w): truth[key][w - 1] for w in range(first, high + 1, 8)}
    text_table(tmp_path / 't.csv', data)
    table = load_table(tmp_path / 't.csv', 224, SPACE, lines.append)
    for key, (low, _) in SPACE.table_widths().items():
        assert table.curves[key][low - 1 :] == pytest.approx(truth[key][low - 1 :])
    absent = sum(
        high - low + 1 - sum(low <= int(w) <= high for w in data[key])
        for key, (low, high) in SPACE.table_widths().items()
    )
    assert lines == [f'{tmp_path / "t.csv"}: latencies of {absent} widths are interpolated between the given widths']


def test_noise_of_every_eighth_width_is_no_bias(tmp_path):
    truth, generator, ratios = make_table(), np.random.default_rng(0), []
    data = {'base': truth.base} | {
        key: {w: curve[w - 1] * generator.normal(1, 0.03) * (4 if w == 96 else 1) for w in range(8, len(curve) + 1, 8)}
        for key, curve in truth.curves.items()
    }
    text_table(tmp_path / 't.json', data)
    lines = []
    table, rng = load_table(tmp_path / 't.json', 224, SPACE, lines.append), random.Random(0)
    for _ in range(300):
        network = random_arch(SPACE, rng)
        ratios.append(table.total(*network, SPACE) / truth.total(*network, SPACE))
    assert abs(np.mean(ratios) - 1) < 0.005 and len(lines) == 2


@pytest.mark.parametrize('largest', [0.19, 0.21, 4_900, 5_100])
@pytest.mark.parametrize('meta', [{}, {'unit': 'ms'}])
def test_latencies_of_another_unit_are_refused(largest, meta, tmp_path):
    table = make_table()
    scale = largest / sum([table.base, *(max(table.curves[b.key(op)][op.max_width(b.in_ch) - 1] for op in SPACE.ops)
                                         for b in SPACE.blocks())])  # fmt: skip
    save_table(
        table.base * scale, {key: curve * scale for key, curve in table.curves.items()}, meta, tmp_path / 't.pkl'
    )
    word = 'seconds' if largest == 0.19 else 'microseconds' if largest == 5_100 and not meta else None
    if word:
        with pytest.raises(BadInput, match=f'are these {word}'):
            load_table(tmp_path / 't.pkl', 224, SPACE)
    else:
        assert load_table(tmp_path / 't.pkl', 224, SPACE).reach(SPACE)[2] == pytest.approx(largest)


class Payload:
    """Runs a command when unpickled by a careless reader."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def test_tables_cannot_run_code(tmp_path):
    marker = tmp_path / 'ran'
    payloads = [
        (Payload(os.system, f'touch {marker}'), 'posix.system|nt.system'),
        (Payload(eval, f'open({str(marker)!r}, "w")'), 'builtins.eval'),
        (Payload(partial, os.system, f'touch {marker}'), 'functools.partial'),
        (Payload(np.load, str(marker)), 'numpy.load'),
        (np.array([Payload(os.system, f'touch {marker}')]), 'posix.system|nt.system'),
        (np.array(['a']), "NumPy data of type 'U1'"),
        (np.zeros(2, dtype='f8,f8'), "NumPy data of type 'V16'"),
        (np.array([1, None]), "NumPy data of type 'O8'"),
    ]
    for payload, name in payloads:
        for data in (payload, OrderedDict(base=payload), OrderedDict(base=1.0, meta=[[payload]])):
            (tmp_path / 'evil.pkl').write_bytes(pickle.dumps(data))
            with pytest.raises(ValueError, match=f'refused, the file asks for ({name})'):
                load_table(tmp_path / 'evil.pkl', 224, SPACE)
    assert not marker.exists()


def test_a_small_file_of_many_references_is_refused_at_once(tmp_path):
    values, endless = [1.0], []
    for _ in range(60):
        values = [values, values]
    endless.append(endless)
    data, table = plain_table()
    key = next(iter(table.curves))
    for many in (values, endless):
        for changed in ({key: many}, {key: {1: many}}, {'base': many}, {'meta': {'method': many}}):
            (tmp_path / 't.pkl').write_bytes(pickle.dumps(data | changed))
            with pytest.raises(ValueError, match='holds more than 10000000 values'):
                load_table(tmp_path / 't.pkl', 32, SMALL_SPACE)


def noisy_table(path, noise=0.0, spoil=lambda curves: None):
    """A table on disk whose widths were timed with noise (a share), and whose curves `spoil` may change; the truth, and
    the table as loaded, with what was logged."""
    truth, generator, lines = make_table(), np.random.default_rng(0), []
    curves = {key: curve * generator.normal(1, noise, len(curve)) for key, curve in truth.curves.items()}
    spoil(curves)
    save_table(truth.base, curves, {}, path)
    return truth, load_table(path, 224, SPACE, lines.append), lines


@pytest.mark.parametrize('noise', [0.02, 0.05])
def test_noise_does_not_become_bias(noise, tmp_path):
    truth, table, lines = noisy_table(tmp_path / 't.pkl', noise)
    rng, ratios = random.Random(0), []
    for _ in range(400):
        network = random_arch(SPACE, rng)
        ratios.append(table.total(*network, SPACE) / truth.total(*network, SPACE))
    assert abs(np.mean(ratios) - 1) < 0.002 and np.std(ratios) < noise / 2
    for key, (low, _) in SPACE.table_widths().items():
        assert (np.diff(table.curves[key][low - 1 :]) >= 0).all()
    assert len(lines) == 1
    mean, most = (float(x) for x in re.findall(r'([\d.]+) % (?:on average|at most)', lines[0]))
    assert 100 * noise * 0.6 < mean < 100 * noise and 300 * noise < most < 600 * noise  # of a normal distribution


@pytest.mark.parametrize('at', [0, 1, 40, -2, -1])
@pytest.mark.parametrize('factor', [-1.0, 0.0, 3.0, 1000.0])
def test_an_outlier_moves_no_other_width(at, factor, tmp_path):
    key, (low, high) = next(iter(SPACE.table_widths().items()))
    at = range(low - 1, high)[at]

    def spoil(curves):
        curves[key][at] *= factor

    truth, table, lines = noisy_table(tmp_path / 't.pkl', 0.01, spoil)
    ratios = table.curves[key][low - 1 :] / truth.curves[key][low - 1 :]
    assert abs(ratios - 1).max() < 0.04 and abs(ratios.mean() - 1) < 0.003 and len(lines) == 1


def test_some_outliers_side_by_side_are_found(tmp_path):
    """What slows the machine down for a while meets widths that are timed one after the other."""
    key, (low, _) = next(iter(SPACE.table_widths().items()))

    def spoil(curves):
        curves[key][60:66] *= 3

    truth, table, _ = noisy_table(tmp_path / 't.pkl', spoil=spoil)
    assert table.curves[key][low - 1 :].mean() == pytest.approx(truth.curves[key][low - 1 :].mean(), rel=0.005)


def test_rising_values_stay_as_they_are_whatever_their_steps(tmp_path):
    def spoil(curves):
        for curve in curves.values():
            curve[::7] *= 1 + 1e-9
            curve[:] = np.sort(curve)
            curve[40:] *= 2
            curve[50:] = 4 * curve[50]

    _, table, lines = noisy_table(tmp_path / 't.pkl', spoil=spoil)
    curves = make_table().curves
    spoil(curves)
    assert not lines and all(np.array_equal(curve, curves[key]) for key, curve in table.curves.items())


@pytest.mark.parametrize('name', ['cpu', 'gpu'])
def test_shipped_tables_load_bit_by_bit(name):
    path, lines = ROOT / f'latency_pkl/latency_{name}.pkl', []
    table, data = load_table(path, 224, SPACE, lines.append), pickle.loads(path.read_bytes())  # noqa: S301  (ours)
    for key, (_, high) in SPACE.table_widths().items():
        assert table.curves[key].tolist() == list(data[key].values())[:high]
    assert not any('moved' in line for line in lines)


def test_repairs_are_within_reach_and_counted(tmp_path):
    key = next(iter(SPACE.table_widths()))
    low = 32

    def spoil(curves):
        curves[key][3 - 1] = -5.0  # below the reach of a search: left alone
        curves[key][low - 1] = -1.0
        curves[key][60] = curves[key][59] - 1e-4

    truth, table, lines = noisy_table(tmp_path / 't.pkl', spoil=spoil)
    assert len(lines) == 1 and ': 3 of 21954 ' in lines[0]
    fitted, true = table.curves[key], truth.curves[key]
    assert fitted[3 - 1] == -5.0 and fitted[low - 1] == pytest.approx(true[low - 1], rel=0.02)
    assert fitted[59] == fitted[60] == pytest.approx(true[59] - 5e-5)
    with pytest.raises(ValueError, match=f'{key} has many latencies that are negative or 0'):
        noisy_table(tmp_path / 't.pkl', spoil=lambda curves: curves[key].__imul__(-1))
