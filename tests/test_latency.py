"""Tables: sums, expected latency and its gradients, what is refused and what is repaired."""

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
from models.latency import expected_latency
from models.search_space import SPACE
from models.tables import load_table, save_table
from models.targeting import Target
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


@pytest.mark.parametrize('share', [0.5, 2.0])
def test_the_loss_is_the_relative_distance_from_the_target(small_space, share):
    """Of a one-hot mixture at full depth, on both sides of the target."""
    table, widths = make_table(small_space, 32), small_space.start_widths()
    one_hot = torch.zeros(5, 3)
    one_hot[:, 1] = 1
    sinks = [torch.tensor([0.0] * (len(stage.exit_depths) - 1) + [1.0]) for stage in small_space.stages]
    expected = table.total({name: [1] * stage.depth for name, stage in small_space.named_stages}, widths, small_space)
    target = Target(table, small_space, share * expected, 1)
    loss, latency = target.loss(widths, 0.3, torch.device('cpu'))(one_hot, sinks)
    assert latency.item() == pytest.approx(expected, rel=1e-5)
    assert loss.item() == pytest.approx(0.3 * abs(1 / share - 1), rel=1e-4)


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


def plain_table():
    """A table as published, a dict of plain values; and the table."""
    table = make_table(SMALL_SPACE, 32)
    curves = {key: dict(enumerate(curve.tolist(), start=1)) for key, curve in table.curves.items()}
    return OrderedDict(base=table.base, **curves), table


def write(path, **changes):
    """A table on disk with some entries changed; None removes one."""
    data, _ = plain_table()
    data |= changes
    data = {key: value for key, value in data.items() if value is not None}
    path.write_bytes(pickle.dumps(data) if path.suffix == '.pkl' else json.dumps(data).encode())
    return path


KEY = next(iter(SMALL_SPACE.table_widths(32)))
LOW, HIGH = SMALL_SPACE.table_widths(32)[KEY]


def test_tables_survive_saving_and_json(tmp_path):
    data, table = plain_table()
    data['meta'] = {'unit': 'ms', 'batch_size': 4, 'device': 'test'}
    save_table(table.base, table.curves, data['meta'], tmp_path / 't.pkl')
    (tmp_path / 't.json').write_text(json.dumps(data))
    for name in ('t.pkl', 't.json'):
        loaded = load_table(tmp_path / name, 32, SMALL_SPACE)
        assert loaded.base == table.base and loaded.meta == data['meta']
        assert all(np.array_equal(curve, table.curves[key]) for key, curve in loaded.curves.items())


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'base': None}, "'base' is None"),
        ({'base': float('nan')}, "'base' is nan"),
        ({'base': -1.0}, "'base' is -1"),
        ({KEY: None}, f'1 of 8 keys .* such as {KEY}.*make_lat_lut.py'),
        ({KEY: {w: 1.0 for w in range(1, HIGH - 8)}}, f'{KEY} lacks 9 widths of {LOW} to {HIGH}'),
        ({KEY: {w: float('nan') for w in range(1, HIGH + 1)}}, f'{KEY} at width'),
        ({KEY: {w: 'fast' for w in range(1, HIGH + 1)}}, f'{KEY} at width'),
        ({KEY: {'8': 1.0, 8: 1.0}}, 'has width 8 twice'),
        ({KEY: {'wide': 1.0}}, "has a width 'wide', should be a whole number"),
        ({KEY: {8.5: 1.0}}, 'has a width 8.5'),
        ({KEY: {True: 1.0}}, 'has a width True'),
        ({KEY: {}}, 'lacks'),
        ({'meta': 5}, "'meta' is a int"),
    ],
)
def test_bad_tables_are_refused_by_name(tmp_path, changes, message):
    with pytest.raises(BadInput, match=f'bad.pkl: .*{message}'):
        load_table(write(tmp_path / 'bad.pkl', **changes), 32, SMALL_SPACE)


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('t.json', b'{"base": 1, "base": 2}', 'not a latency table.*twice'),
        ('t.json', b'[1]', 'holds a list'),
        ('t.json', b'{', 'not a latency table'),
        ('t.txt', b'{"base": 1}', 'not a latency table, a pickle or .json'),
        ('t.pkl', pickle.dumps({'base': 1})[:-3], 'not a latency table'),
        ('t.pkl', b'version https://git-lfs.github.com/spec/v1\n', 'a Git LFS pointer.*git lfs pull'),
        ('absent.pkl', None, 'no latency table there'),
    ],
)
def test_files_that_are_no_table_are_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=f'{name}: .*{message}'):
        load_table(tmp_path / name, 224, SPACE)


@pytest.mark.parametrize('largest', [0.19, 0.21, 4_900, 5_100])
@pytest.mark.parametrize('meta', [{}, {'unit': 'ms'}])
def test_latencies_of_another_unit_are_refused(largest, meta, tmp_path):
    table = make_table()
    scale = largest / table.reach(SPACE)[2]
    curves = {key: curve * scale for key, curve in table.curves.items()}
    save_table(table.base * scale, curves, meta, tmp_path / 't.pkl')
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


def test_tables_cannot_run_code_and_hold_no_numpy(tmp_path):
    marker = tmp_path / 'ran'
    payloads = [
        (Payload(os.system, f'touch {marker}'), 'posix.system|nt.system'),
        (Payload(eval, f'open({str(marker)!r}, "w")'), 'builtins.eval'),
        (Payload(partial, os.system, f'touch {marker}'), 'functools.partial'),
        (np.float64(1.0), r'numpy[\w.]+scalar.*use float\(\)|numpy[\w.]+scalar.*by float\(\)'),
        (np.ones(3), r'numpy[\w.]+.*by float\(\)'),
    ]
    for payload, name in payloads:
        for data in (payload, OrderedDict(base=payload), OrderedDict(base=1.0, meta=[[payload]])):
            (tmp_path / 'evil.pkl').write_bytes(pickle.dumps(data))
            with pytest.raises(BadInput, match=f'refused, the file asks for ({name})'):
                load_table(tmp_path / 'evil.pkl', 224, SPACE)
    assert not marker.exists()


def test_a_small_file_of_many_references_is_refused_at_once(tmp_path):
    values, endless = [1.0], []
    for _ in range(60):
        values = [values, values]
    endless.append(endless)
    for many in (values, endless):
        for changed in ({KEY: many}, {KEY: {1: many}}, {'base': many}, {'meta': {'method': many}}):
            with pytest.raises(BadInput, match='holds more than 10000000 values'):
                load_table(write(tmp_path / 't.pkl', **changed), 32, SMALL_SPACE)


@pytest.mark.parametrize('start', [1, 5, 8])
def test_every_eighth_width_is_enough(start, tmp_path, caplog):
    """Curves with a kink at a given width are met exactly, and continue at their ends by a step at most."""
    data, truth, absent = {'base': 1.0}, {}, 0
    for key, (low, high) in SPACE.table_widths().items():
        kink = start + 8 * ((low + high) // 16)
        first = low + (start - low) % 8 if len(truth) < 3 else start
        widths = np.arange(1, high + 1)
        truth[key] = 0.5 + 0.01 * widths + 0.02 * np.maximum(widths - kink, 0)
        data[key] = {str(w): truth[key][w - 1] for w in range(first, high + 1, 8)}
        absent += high - low + 1 - sum(low <= int(w) for w in data[key])
    (tmp_path / 't.json').write_text(json.dumps(data))
    table = load_table(tmp_path / 't.json', 224, SPACE)
    for key, (low, _) in SPACE.table_widths().items():
        assert table.curves[key][low - 1 :] == pytest.approx(truth[key][low - 1 :])
    assert f'latencies of {absent} widths are interpolated' in caplog.text


def test_widths_off_the_grid_take_at_least_as_long_as_the_next_multiple(tmp_path):
    save_table(1.0, make_table(SMALL_SPACE, 32).curves, {'width_divisor': 5}, tmp_path / 't.pkl')
    table = load_table(tmp_path / 't.pkl', 32, SMALL_SPACE)
    assert table.width_divisor == 5
    for key, (low, high) in SMALL_SPACE.table_widths(32).items():
        for width in range(low, high // 5 * 5 + 1):
            assert table.curves[key][width - 1] >= table.curves[key][-(-width // 5) * 5 - 1]


def noisy_table(path, noise=0.0, spoil=lambda curves: None):
    """The true table, and one that was timed with noise (a share) and spoiled, as loaded from disk."""
    truth, generator = make_table(), np.random.default_rng(0)
    curves = {key: curve * generator.normal(1, noise, len(curve)) for key, curve in truth.curves.items()}
    spoil(curves)
    save_table(truth.base, curves, {}, path)
    return truth, load_table(path, 224, SPACE)


@pytest.mark.parametrize('noise', [0.02, 0.05])
def test_noise_does_not_become_bias(noise, tmp_path, caplog):
    truth, table = noisy_table(tmp_path / 't.pkl', noise)
    rng, ratios = random.Random(0), []
    for _ in range(400):
        network = random_arch(SPACE, rng)
        ratios.append(table.total(*network, SPACE) / truth.total(*network, SPACE))
    assert abs(np.mean(ratios) - 1) < 0.002 and np.std(ratios) < noise / 2
    for key, (low, _) in SPACE.table_widths().items():
        assert (np.diff(table.curves[key][low - 1 :]) >= 0).all()
    mean, most = (float(x) for x in re.findall(r'([0-9.]+) % (?:on average|at most)', caplog.text))
    assert 100 * noise * 0.6 < mean < 100 * noise and 300 * noise < most < 600 * noise  # of a normal distribution


@pytest.mark.parametrize('at', [0, 1, 40, -1])
@pytest.mark.parametrize('factor', [-1.0, 0.0, 1000.0])
def test_an_outlier_moves_no_other_width(at, factor, tmp_path):
    key, (low, high) = next(iter(SPACE.table_widths().items()))
    at = range(low - 1, high)[at]

    def spoil(curves):
        curves[key][at] *= factor

    truth, table = noisy_table(tmp_path / 't.pkl', 0.01, spoil)
    ratios = table.curves[key][low - 1 :] / truth.curves[key][low - 1 :]
    assert abs(ratios - 1).max() < 0.04 and abs(ratios.mean() - 1) < 0.003


@pytest.mark.parametrize('name', ['cpu', 'gpu', 'cpu_onnxruntime'])
def test_shipped_tables_load_bit_by_bit(name, caplog):
    path = ROOT / f'latency_pkl/latency_{name}.pkl'
    table, data = load_table(path, 224, SPACE), pickle.loads(path.read_bytes())  # noqa: S301  (ours)
    for key, (_, high) in SPACE.table_widths().items():
        assert table.curves[key].tolist() == list(data[key].values())[:high]
    assert 'moved' not in caplog.text


def test_many_latencies_below_zero_are_refused(tmp_path):
    key = next(iter(SPACE.table_widths()))
    with pytest.raises(BadInput, match=f'{key} has many latencies that are negative or 0'):
        noisy_table(tmp_path / 't.pkl', spoil=lambda curves: curves[key].__imul__(-1))
