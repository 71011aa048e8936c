"""Tables: sums, expected latency and its gradients, what is refused and what is repaired."""

import os
import pickle
import random
from collections import OrderedDict
from functools import partial

import numpy as np
import pytest
import torch

from conftest import make_table, random_arch
from models.config import build_config
from models.latency import expected_latency, load_table, save_table
from models.search_space import SPACE


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
        for name, stage in zip(small_space.stage_names, small_space.stages, strict=True):
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
    biggest = {n: [2] * s.depth for n, s in zip(small_space.stage_names, small_space.stages, strict=True)}
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
    ]
    for payload, name in payloads:
        for data in (payload, OrderedDict(base=payload), OrderedDict(base=1.0, meta=[[payload]])):
            (tmp_path / 'evil.pkl').write_bytes(pickle.dumps(data))
            with pytest.raises(ValueError, match=f'refused, the file asks for ({name})'):
                load_table(tmp_path / 'evil.pkl', 224, SPACE)
    assert not marker.exists()


def test_falling_and_negative_values_in_reach_are_repaired_and_counted(tmp_path):
    key = next(iter(SPACE.table_widths()))
    curve = dict(enumerate(map(float, make_table().curves[key]), start=1))
    low = 32
    curve[3] = -5.0  # below the reach of a search: left alone
    curve[low] = -1.0
    curve[60], curve[61] = curve[59] - 0.02, curve[59] - 0.01
    lines = []
    table = load_table(write(tmp_path / 't.pkl', **{key: curve}), 224, SPACE, lines.append)
    assert len(lines) == 1 and ' 3 values' in lines[0]
    mended = table.curves[key]
    assert mended[3 - 1] == -5.0 and mended[low - 1] == 0
    assert mended[60 - 1] == mended[61 - 1] == curve[59]
    assert (np.diff(mended[low - 1 :]) >= 0).all()
