"""Runtimes other than torch: tables and timings of ONNX models by block, the width grid, and what is missing."""

import itertools
import json
import random
import sys
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import parsing_model
import train_search
from conftest import make_table, physical_curves
from latency_pkl import make_lat_lut, measured
from latency_pkl.fit import Fit
from latency_pkl.measured import Turn
from latency_pkl.runtimes import RUNTIMES, Engine, engine_of, engine_of_table, standard_of
from latency_pkl.sampling import random_config, reference_config
from latency_pkl.timing import TOGETHER, Measured, Passes, measure_latency
from latency_pkl.width_grid import MULTIPLES, WidthGrid, on_grid, with_penalties
from models.config import dump_config, load_config
from models.elasticity import full_weights, start_masks
from models.meta import Meta
from models.parsing import mask_widths
from models.search_space import FREEDOMS, SPACE
from models.tables import load_table, save_table
from tools.distributed import World
from tools.errors import BadInput

CPU = torch.device('cpu')
pytest.importorskip('onnx')
HERE = [name for name in RUNTIMES if find_spec(name)]


@pytest.fixture
def config():
    return random_config(random.Random(1), ends=False, num_classes=10, space=SPACE)


@pytest.mark.parametrize('runtime', HERE)
def test_a_session_gives_the_logits_of_its_model(runtime, config):
    build = engine_of(runtime, None, CPU).build(config, 3, 32, 2)
    other = engine_of('onnxruntime' if runtime != 'onnxruntime' else 'openvino', None, CPU).build(config, 3, 32, 2)
    images = torch.randn(2, 3, 32, 32)
    logits = np.asarray(build()(images))
    assert logits.shape == (2, 10) and logits.std() > 1e-3
    np.testing.assert_allclose(logits, np.asarray(other()(images)), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('runtime', HERE)
def test_a_network_is_timed_as_a_whole(runtime, config):
    passes = engine_of(runtime, None, CPU).bench(config, 0, 64, 1, by_part=True)(4)
    assert passes.parts.shape == (4, 1) and passes.probes.shape == (4, 2) and passes.whole
    assert (passes.parts > 0).all() and (passes.probes > 0).all()


@pytest.mark.parametrize('runtime', HERE)
def test_a_latency_beside_the_tables_reference_network(runtime, config):
    torch.set_num_threads(1)
    engine = engine_of(runtime, None, CPU)
    meta = engine.meta | {'batch_size': 1, 'threads': 1, 'reference': dump_config(config), 'reference_ms': 7.0}
    table = SimpleNamespace(meta=meta, img_size=64)
    standard = standard_of(table, 1, engine)
    assert standard.ms == 7.0 and standard.build == engine.build(config, 0, 64, 1)
    latency = measure_latency(engine.build(config, 5, 64, 1), 1, 64, engine.clock, standard, rounds=1)
    assert latency.slowness > 0 and latency.ms > 0 and latency.error > 0
    for changed in ({'provider': 'Another'}, {'runtime': 'torch'}):
        assert standard_of(SimpleNamespace(meta=meta | changed, img_size=64), 1, engine) is None
    assert standard_of(SimpleNamespace(meta=meta | {'runtime_version': '0'}, img_size=64), 1, engine).ms == 7.0


def grid_of(*costs, noise=0.0):
    generator = np.random.default_rng(0)
    return WidthGrid(np.array(costs) * generator.normal(1, noise, (4, len(MULTIPLES))))


def test_the_divisor_is_the_least_over_which_coarser_multiples_gain_little():
    published = grid_of(25.7, 20.1, 16.4, 16.6, 16.3, 16.5)
    assert published.divisor == 4 and published.price == pytest.approx(25.7 / 16.4)
    assert 'width_divisor 4; ignoring it costs 56.7 %' in str(published)
    assert grid_of(25.7, 20.1, 16.4, 16.4, 15.9, 16.5).divisor == 16
    even = grid_of(18.1, 17.9, 17.9, 17.8, 17.9, 18.0)
    assert even.divisor == 1 and even.price == 1 and 'all widths are equally good' in str(even)
    assert grid_of(*[10.0] * 6, noise=0.2).divisor == 1


def test_no_network_off_the_grid_is_promised_less_than_it_took(tmp_path, caplog):
    """Kernels of 3 take 1.5, those of 5 take 2.5 times as long off the grid; one network takes longer than that."""
    table, rng, penalties = make_table(img_size=32), random.Random(4), {3: 1.5, 5: 2.5}
    for curve in table.curves.values():
        curve[:] = curve[np.minimum(np.arange(len(curve)) // 8 * 8 + 7, len(curve) - 1)]

    def ms_of(config):
        blocks = [
            (table.curves[key][spec.mid_channels - 1], penalties[spec.kernel_size] if spec.mid_channels % 8 else 1)
            for _, spec, key in config.table_keys(32)
        ]
        return table.base + sum(ms * penalty for ms, penalty in blocks)

    configs = [random_config(rng, False, 10, SPACE) for _ in range(20)]
    networks = [(config, ms_of(config)) for config in configs]
    grid = grid_of(2.8, 2.6, 2.4, 2, 2, 2)
    assert grid.divisor == 8 and grid.price == pytest.approx(1.4)
    fit = Fit(table.base, {name: curve.copy() for name, curve in table.curves.items()}, 1.0)
    raised = with_penalties(fit, networks, grid, 32)
    for name, curve in raised.curves.items():
        odd = np.arange(1, len(curve) + 1) % 8 > 0
        assert np.allclose(curve[~odd], table.curves[name][~odd])
        assert np.allclose(curve[odd] / table.curves[name][odd], penalties[3 if '_k3_' in name else 5])
    networks[3] = (configs[3], 1.1 * networks[3][1])
    raised = with_penalties(fit, networks, grid, 32)
    save_table(raised.base, raised.curves, {'unit': 'ms', 'width_divisor': 8}, tmp_path / 'table.pkl')
    read = load_table(tmp_path / 'table.pkl', 32, SPACE)
    assert read.width_divisor == 8 and 'moved' not in caplog.text
    assert all(read.of_config(config) >= ms * (1 - 1e-9) for config, ms in networks)
    without = with_penalties(fit, [], grid, 32)
    for name, curve in without.curves.items():
        odd = np.arange(1, len(curve) + 1) % 8 > 0
        assert np.allclose(curve[odd], 1.4 * table.curves[name][odd])
    dear = with_penalties(fit, networks, grid_of(8, 6, 4, 2, 2, 2), 32)
    assert all(dear.curves[name][:7] == pytest.approx(4 * table.curves[name][:7]) for name in dear.curves)
    cheap = with_penalties(fit, [], WidthGrid(np.array([[1.9, 2, 2, 2, 1.9, 2]])), 32)
    assert all((cheap.curves[name] >= fit.curves[name]).all() for name in fit.curves)
    assert with_penalties(fit, networks, grid_of(*[2.0] * 6), 32) is fit


def test_a_sparse_table_promises_the_next_width_of_its_grid(tmp_path):
    table = make_table(img_size=32)
    curves, data = table.curves, {'base': 1.0, 'meta': {'width_divisor': 8}}
    for name, curve in curves.items():
        data[name] = {str(width): curve[width - 1] for width in range(8, len(curve) + 1, 8)}
    (tmp_path / 'table.json').write_text(json.dumps(data))
    read = load_table(tmp_path / 'table.json', 32, SPACE)
    for name, (low, _) in SPACE.table_widths(32).items():
        above = low // 8 * 8 + 8
        assert read.curves[name][above - 8 :][:8] == pytest.approx(curves[name][above - 1])


def test_drawn_widths_are_on_the_grid_and_rounding_up_keeps_them():
    rng = random.Random(0)
    for divisor in MULTIPLES:
        config = random_config(rng, True, 10, SPACE, divisor)
        assert on_grid(config, divisor) and config.rounded_up(1) == config
    odd = random_config(random.Random(3), False, 10, SPACE)
    up = odd.rounded_up(16)
    pairs = [(a, b) for name in odd.stages for a, b in zip(odd.stages[name], up.stages[name], strict=True)]
    assert not on_grid(odd, 16) and on_grid(up, 16)
    assert all(0 <= b.mid_channels - a.mid_channels < 16 and b.mid_channels % 16 == 0 for a, b in pairs)


def test_a_search_takes_the_tables_divisor_unless_a_flag_is_given(tmp_path, caplog):
    table, world = make_table(img_size=32), World(torch.device('cpu'), 1, 2)
    save_table(table.base, table.curves, {'unit': 'ms', 'width_divisor': 8}, tmp_path / 'table.pkl')
    args = SimpleNamespace(
        lookup_path=str(tmp_path / 'table.pkl'), img_size=32, width_divisor=None, target_lat='40%', freedoms=FREEDOMS
    )
    state = SimpleNamespace(full=full_weights(10, CPU, SPACE), masks=start_masks(SPACE))
    for divisor in (8, 16):
        target = train_search.read_target(args, world, 10)
        assert target.divisor == divisor and caplog.messages[-1] == f'All widths are multiples of {divisor}'
        arch, widths, _ = train_search.scale_to_target(state, target, True)
        chosen = [widths[block.stage][block.name][index] for block, index in SPACE.chosen(arch)]
        assert widths != mask_widths(state.masks) and all(width % divisor == 0 for width in chosen)
        args.width_divisor = 16


def test_a_config_is_rounded_up_and_both_latencies_are_printed(tmp_path, monkeypatch, capsys):
    table = make_table(img_size=32)
    save_table(table.base, table.curves, {'unit': 'ms'}, tmp_path / 'table.pkl')
    odd = random_config(random.Random(3), False, 10, SPACE)
    latencies = {'table': 'other.pkl', 'target': 15.0, 'target_given': '50%', 'measured': 14.0, 'measured_on': 'x'}
    odd = replace(odd, meta=Meta.from_dict(latencies, ''))
    (tmp_path / 'odd.config').write_text(dump_config(odd))
    words = ['--config_path', tmp_path / 'odd.config', '--width_divisor', '8', '--save_path', tmp_path / 'up.config']
    words += ['--lookup_path', tmp_path / 'table.pkl', '--img_size', '32', '--device', 'cpu']
    parsing_model.main(parsing_model.get_args(list(map(str, words))))
    written = load_config(tmp_path / 'up.config')
    assert replace(written, meta=odd.meta) == odd.rounded_up(8)
    assert written.meta.target is written.meta.target_given is written.meta.measured is written.meta.measured_on is None
    table = load_table(tmp_path / 'table.pkl', 32, SPACE)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith('Lat_LUT')]
    assert not any('target' in line for line in printed)
    assert [line.split(',')[0] for line in printed] == [
        f'Lat_LUT: {table.of_config(one):.4f} ms' for one in (odd, odd.rounded_up(8))
    ]


@pytest.mark.parametrize('runtime', HERE)
def test_a_turn_has_networks_on_the_grid_and_one_off_it(runtime, config):
    args = SimpleNamespace(num_classes=10, batch_size=1, img_size=32, launch='eager')
    unseen = config.rounded_up(8)
    turn = measured.time_turn(random.Random(0), unseen, args, engine_of(runtime, None, CPU), 8)
    assert [on_grid(one, 8) for one, _ in turn.fitted] == [True] * 6 + [False]
    assert turn.unseen[0] is unseen and len(turn.reference) == measured.REFERENCES
    assert {one.parts.shape for one in turn.passes} == {(TOGETHER, 1)}


def fake_time_turn(rng, unseen, args, engine, divisor, decks):
    """Times of `physical_curves`, twice as long for blocks off the grid."""
    truth, generator = physical_curves(32), np.random.default_rng(rng.getrandbits(30))

    def passes(config):
        blocks = [
            truth[key][spec.mid_channels - 1] * (2 if spec.mid_channels % 8 else 1)
            for _, spec, key in config.table_keys(32)
        ]
        ms = (0.2 + sum(blocks)) * generator.normal(1, 0.01, (TOGETHER, 1))
        return Passes(ms, np.full((TOGETHER, 2), 0.03), whole=True)

    configs = [random_config(rng, i % 2 == 0, 10, SPACE, divisor if i else 1) for i in range(7)]
    references = [reference_config(10, SPACE)] * measured.REFERENCES
    return Turn(
        [(config, passes(config)) for config in configs], (unseen, passes(unseen)), list(map(passes, references))
    )


def test_a_table_of_networks_on_the_grid(monkeypatch, tmp_path):
    """Off the grid, networks take twice as long, and the table never gives less."""
    args = SimpleNamespace(num_classes=10, batch_size=1, img_size=32, threads=1, seed=2, budget=25)
    monkeypatch.setattr(measured, 'time_turn', fake_time_turn)
    monkeypatch.setattr(measured, 'time_grid', lambda *_: grid_of(2, 2, 2, 1, 1, 1))
    monkeypatch.setattr(measured, 'time', SimpleNamespace(monotonic=partial(next, itertools.count())))
    engine = Engine('onnxruntime', 'CPUExecutionProvider', CPU)
    base, curves, meta = measured.measured_table(args, engine)
    assert meta['width_divisor'] == 8 and meta['provider'] == engine.provider and meta['runtime'] == 'onnxruntime'
    assert meta['residual_mean_percent'] < 4 and 'whole' in meta['method']
    save_table(base, curves, meta, tmp_path / 'table.pkl')
    table, rng, truth = load_table(tmp_path / 'table.pkl', 32, SPACE), random.Random(5), physical_curves(32)
    for divisor in [8, 1] * 10:
        config = random_config(rng, False, 10, SPACE, divisor)
        took = [(truth[key][spec.mid_channels - 1], spec.mid_channels % 8) for _, spec, key in config.table_keys(32)]
        ms = 0.2 + sum(ms * (2 if off else 1) for ms, off in took)
        assert (
            table.of_config(config) == pytest.approx(ms, rel=0.12)
            if divisor == 8
            else 0.97 * ms < table.of_config(config) < 1.3 * ms
        )


def test_too_few_whole_networks_are_one_line(monkeypatch):
    args = SimpleNamespace(num_classes=10, batch_size=1, img_size=32, threads=1, seed=2, budget=1)
    monkeypatch.setattr(measured, 'time_turn', fake_time_turn)
    monkeypatch.setattr(measured, 'PATIENCE', 2)
    monkeypatch.setattr(measured, 'time_grid', lambda *_: grid_of(2, 2, 2, 1, 1, 1))
    monkeypatch.setattr(measured, 'time', SimpleNamespace(monotonic=partial(next, itertools.count())))
    with pytest.raises(BadInput, match='--budget 1: 12 networks were timed in 2 times that, at least 30 are needed'):
        measured.measured_table(args, Engine('onnxruntime', 'CPUExecutionProvider', CPU))


def test_check_draws_networks_on_the_grid_and_names_the_runtime(monkeypatch, tmp_path, capsys):
    table, drawn = make_table(img_size=32), []

    def measure_in_turns(builds, batch_size, img_size, device, standard, rounds, launch):
        drawn.extend(build.config for build in builds)
        return [Measured(table.of_config(build.config), 0.001) for build in builds], 1.0

    monkeypatch.setattr(make_lat_lut, 'measure_in_turns', measure_in_turns)
    meta = {'unit': 'ms', 'width_divisor': 16, 'runtime': 'onnxruntime', 'provider': 'CPUExecutionProvider'}
    save_table(table.base, table.curves, meta, tmp_path / 'table.pkl')
    words = ['--check', tmp_path / 'table.pkl', '--device', 'cpu', '--img_size', '32', '--networks', '4']
    make_lat_lut.main(make_lat_lut.get_args(list(map(str, words))))
    out = capsys.readouterr().out
    assert len(drawn) == 4 and all(on_grid(config, 16) for config in drawn)
    assert 'onnxruntime' in out and 'widths: multiples of 16' in out and 'mean error 0.00 %' in out


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['--runtime', 'onnxruntime', '--provider', 'NoProvider'], '--provider NoProvider: the installed onnxruntime'),
        (['--provider', 'CPUExecutionProvider'], '--provider CPUExecutionProvider: only for --runtime'),
        (['--runtime', 'openvino', '--metric', 'flops'], '--runtime openvino: only for a table that is measured'),
    ],
)
def test_what_a_runtime_lacks_is_one_line_before_any_work(words, message, monkeypatch):
    monkeypatch.setattr(measured, 'time_turn', lambda *_: pytest.fail('worked'))
    with pytest.raises(BadInput, match=message):
        make_lat_lut.main(make_lat_lut.get_args([*words, '--device', 'cpu']))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'openvino', None)
    with pytest.raises(BadInput, match='--runtime openvino needs a package that is not here: pip install openvino'):
        engine_of('openvino', None, CPU)


def test_the_runtime_is_the_tables_unless_a_flag_names_another():
    meta = {'runtime': 'onnxruntime', 'provider': 'CPUExecutionProvider'}
    assert engine_of_table(meta, None, None, CPU) == Engine('onnxruntime', 'CPUExecutionProvider', CPU)
    assert (
        engine_of_table(meta, 'torch', None, CPU) == Engine('torch', None, CPU) == engine_of_table({}, None, None, CPU)
    )
    with pytest.raises(BadInput, match="runtime is 'tflite', should be one of torch, onnxruntime, openvino"):
        engine_of_table({'runtime': 'tflite'}, None, None, CPU)
