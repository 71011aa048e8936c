"""Kits of networks for another device: what is in them, the program that times them, tables from their times."""

import ast
import json
import random
import re
import zipfile
import zlib
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import SMALL_SPACE, physical_curves
from latency_pkl import closed_loop, make_lat_lut, time_networks
from latency_pkl.closed_loop import fit_to_timings
from latency_pkl.kit import (
    REFERENCE,
    Found,
    found_networks,
    kit_networks,
    random_weights,
    read_kit,
    read_timings,
    timed_table,
    write_kit,
)
from models.config import dump_config
from models.fitting import Fitter
from models.latency import LatencyTable
from models.meta import Meta
from models.search_space import SPACE
from models.tables import load_table
from models.targeting import Target
from tools.errors import BadInput

onnxruntime = pytest.importorskip('onnxruntime')
onnx = pytest.importorskip('onnx')

TRUTH = LatencyTable(0.1, physical_curves(32), {}, 32)
SETTINGS = {'img_size': 32, 'num_classes': 10, 'batch_size': 1, 'width_divisor': 8, 'opset': 17, 'seed': 2}


def networks_of(count=120, divisor=8, seed=2, space=SPACE):
    return kit_networks(count, 10, space, divisor, random.Random(seed))


def test_networks_show_every_shape_and_width_about_equally_often():
    networks = networks_of()
    assert list(networks)[:2] == [REFERENCE, 'net_000'] and len(networks) == 121
    fitted = [config for name, config in networks.items() if name != REFERENCE][:100]
    ranges = SPACE.table_widths(32)
    seen = Counter(key for config in fitted for _, _, key in config.table_keys(32))
    assert seen.keys() == ranges.keys() and min(seen.values()) >= 8
    positions = []
    for config in fitted:
        for _, spec, key in config.table_keys(32):
            low, high = ranges[key]
            assert spec.mid_channels % 8 == 0 and low <= spec.mid_channels <= high
            positions.append((spec.mid_channels - low) / (high - low))
    shares = np.histogram(positions, 4, (0, 1))[0] / len(positions)
    assert shares.min() > 0.15
    depths = [len(config.stages['stage3']) for config in fitted]
    assert 0.5 < np.mean(np.array(depths) == 4) < 0.75 and set(depths) == set(SPACE.stages[2].exit_depths)


def test_networks_are_those_of_the_seed_and_their_sums_of_time_differ_widely():
    first, again, other = (networks_of(40, seed=seed) for seed in (1, 1, 2))
    assert first == again and first['net_000'] != other['net_000']
    times = [TRUTH.of_config(config) for config in networks_of().values()]
    assert max(times) > 3 * min(times)


@pytest.fixture(scope='module')
def small_kit(tmp_path_factory):
    """A kit of four networks of a small space."""
    folder = tmp_path_factory.mktemp('kit') / 'phone_kit'
    networks = dict(list(networks_of(40, 2, space=SMALL_SPACE).items())[:4])
    size = write_kit(folder, networks, SETTINGS, 1)
    return folder, networks, size


def test_a_kit_has_all_that_a_device_needs(small_kit):
    folder, networks, size = small_kit
    with zipfile.ZipFile(folder.with_name('phone_kit.zip')) as archive:
        assert sum(one.compress_size for one in archive.infolist()) < size < 100_000
        files = {name.removeprefix('phone_kit/') for name in archive.namelist() if not name.endswith('/')}
    models = {f'networks/{name}.onnx' for name in networks}
    assert files == {'README.md', 'networks.json', 'time_networks.py', 'networks/weights.bin'} | models
    kit = read_kit(folder)
    assert kit.networks == networks and kit.held_back == {'net_002'}
    data = json.loads((folder / 'networks.json').read_text())
    assert [data['networks'][name]['use'] for name in networks] == ['reference', 'fit', 'fit', 'held back']


def test_networks_share_a_file_of_weights_and_no_layers_share_any(small_kit):
    folder, networks, _ = small_kit
    for name, config in networks.items():
        path = folder / 'networks' / f'{name}.onnx'
        model = onnx.load(path, load_external_data=False)
        parts = [{entry.key: entry.value for entry in t.external_data} for t in model.graph.initializer]
        spans = sorted((int(one['offset']), int(one['length'])) for one in parts if one)
        assert all(a + length <= b for (a, length), (b, _) in zip(spans, spans[1:], strict=False)) and len(spans) > 10
        assert all(offset % 4096 == 0 for offset, _ in spans)
        values = np.concatenate([onnx.numpy_helper.to_array(t).ravel() for t in onnx.load(path).graph.initializer])
        assert np.unique(values).size > 0.2 * values.size and np.abs(values).min() > 1e-30
        assert values.std() == pytest.approx(0.1 / 3**0.5, rel=0.05) and np.abs(values).max() <= 0.1
        session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
        logits = session.run(None, {'images': np.ones((2, 3, 32, 32), np.float32)})[0]
        assert logits.shape == (2, config.classifier.out_features) and logits.std() > 1e-3


def test_weights_can_be_compressed_to_about_half():
    data = random_weights(100_000).tobytes()
    assert len(zlib.compress(data, 1)) < 0.55 * len(data)


def test_a_kit_overwrites_nothing(small_kit, tmp_path):
    folder, networks, _ = small_kit
    with pytest.raises(BadInput, match='phone_kit exists; choose another name'):
        write_kit(folder, networks, SETTINGS)
    with pytest.raises(BadInput, match='its folder does not exist'):
        write_kit(tmp_path / 'none' / 'kit', networks, SETTINGS)
    assert read_kit(folder).networks == networks


# ---- the program that times them


def test_the_program_runs_on_python_3_8_with_onnxruntime_and_numpy_alone():
    tree = ast.parse(Path(time_networks.__file__).read_text(), feature_version=(3, 8))
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    standard = {'argparse', 'json', 'os', 'platform', 'random', 'statistics', 'sys', 'time', 'pathlib'}
    assert imported == standard | {'numpy', 'onnxruntime'}


class Device:
    """A device that slows down after some passes, with noise; replaces the program's `Network` and clock."""

    def __init__(self, slow=lambda passes: 1.0, stop=10**9):
        self.passes, self.slow, self.stop = 0, slow, stop
        self.generator, self.pauses = np.random.default_rng(0), 0

    def network(self, path, settings, size):
        device, ms = self, 10.0 + int('0' + re.sub(r'\D', '', Path(path).stem))

        class One:
            def run(self, passes):
                device.passes += passes + 1
                if device.passes > device.stop:
                    raise KeyboardInterrupt
                noise = device.generator.normal(1, 0.01, passes)
                return (ms * device.slow(device.passes) * noise).tolist()

        return One()


@pytest.fixture
def on_device(small_kit, monkeypatch, tmp_path):
    """Run the program on a simulated device; returns its exit code and the times by network."""

    def run(device, *words, output=tmp_path / 'timings.csv'):
        monkeypatch.setattr(time_networks, 'HERE', small_kit[0])
        monkeypatch.setattr(time_networks, 'Network', device.network)
        monkeypatch.setattr(time_networks, 'WARM_UP_SECONDS', 0)
        monkeypatch.setattr(time_networks, 'COOL_DOWN_SECONDS', 0)
        code = time_networks.main(time_networks.get_args(['--output', str(output), *words]))
        return code, {row.name: row.ms for row in read_timings(output).rows}

    return run


def test_times_of_a_steady_device(on_device, tmp_path):
    code, times = on_device(Device(), '--note', 'a phone', '--threads', '2')
    assert code == 0 and times.keys() == {REFERENCE, 'net_000', 'net_001', 'net_002'}
    for name, ms in {REFERENCE: 10, 'net_000': 10, 'net_001': 11, 'net_002': 12}.items():
        assert times[name] == pytest.approx(ms, rel=0.02)
    meta = read_timings(tmp_path / 'timings.csv').meta
    assert meta['device'] == 'a phone' and meta['threads'] == '2' and meta['batch_size'] == '1'
    assert not list(tmp_path.glob('*.part'))


@pytest.mark.parametrize('slowdown', [1.3, 2.0])
def test_a_device_that_throttles_gives_the_same_times_and_repeats_turns(on_device, slowdown, capsys):
    steady = Device()
    on_device(steady)
    hot = Device(slow=lambda passes: slowdown if 100 < passes < 200 else 1.0)
    _, times = on_device(hot, '--again')
    assert 'slowed down; to be repeated' in capsys.readouterr().out
    assert hot.passes > 1.2 * steady.passes
    for name, ms in {'net_000': 10, 'net_001': 11, 'net_002': 12}.items():
        assert times[name] == pytest.approx(ms, rel=0.02)


def test_a_stopped_program_goes_on(on_device, tmp_path, capsys):
    whole = Device()
    on_device(whole)
    half = Device(stop=whole.passes // 2)
    code, times = on_device(half, output=tmp_path / 'other.csv')
    assert code == 130 and len(times) == 4 and 'the same command goes on' in capsys.readouterr().out
    rest = Device()
    code, times = on_device(rest, output=tmp_path / 'other.csv')
    assert code == 0 and rest.passes < 0.7 * whole.passes
    assert times['net_002'] == pytest.approx(12, rel=0.02)


def test_timings_of_other_settings_are_not_mixed(on_device, capsys):
    on_device(Device())
    with pytest.raises(SystemExit) as stopped:
        on_device(Device(), '--threads', '4')
    assert stopped.value.code == 2 and 'with threads 1, now 4; give --again' in capsys.readouterr().err
    assert on_device(Device(), '--threads', '4', '--again')[0] == 0


def test_the_program_runs_here(small_kit, tmp_path, monkeypatch):
    monkeypatch.setattr(time_networks, 'HERE', small_kit[0])
    monkeypatch.setattr(time_networks, 'WARM_UP_SECONDS', 0)
    monkeypatch.setattr(time_networks, 'COOL_DOWN_SECONDS', 0)
    words = ['--output', str(tmp_path / 'timings.csv'), '--rounds', '1', '--batch_size', '2']
    assert time_networks.main(time_networks.get_args(words)) == 0
    timings = read_timings(tmp_path / 'timings.csv')
    assert timings.meta['runtime'].startswith('onnxruntime ') and timings.setting('batch_size', 1) == 2
    assert all(0.001 < row.ms < 1000 for row in timings.rows) and len(timings.rows) == 4


# ---- tables from their times


@pytest.fixture(scope='module')
def kit(tmp_path_factory):
    """A kit of 120 networks, without their ONNX files."""
    folder = tmp_path_factory.mktemp('whole')
    networks = networks_of()
    entries = {}
    for number, (name, config) in enumerate(networks.items()):
        use = REFERENCE if name == REFERENCE else 'held back' if number > 100 else 'fit'
        entries[name] = {'file': '', 'use': use, 'config': config.to_dict()}
    (folder / 'networks.json').write_text(json.dumps({'kit': 'abc', **SETTINGS, 'networks': entries}))
    return folder, networks


def lines_of(networks, noise=0.01):
    generator = np.random.default_rng(0)
    return [f'{name},{TRUTH.of_config(config) * generator.normal(1, noise):.6g}' for name, config in networks.items()]


def table_of(folder, lines, tmp_path, note=None):
    """Return the table's fit and meta, and what was logged."""
    log = []
    (tmp_path / 'timings.csv').write_text('\n'.join(lines) + '\n')
    timings = read_timings(tmp_path / 'timings.csv', log.append)
    return *timed_table(timings, read_kit(folder), SPACE, note, log.append), log


def test_the_residual_of_a_table_is_its_error(kit, tmp_path):
    folder, networks = kit
    lines = ['# device: a phone', '# threads: 4', 'network,ms', *lines_of(networks)]
    fit, meta, log = table_of(folder, lines, tmp_path)
    assert meta['device'] == 'a phone' and meta['threads'] == 4 and meta['batch_size'] == 1 and meta['unit'] == 'ms'
    assert meta['samples'] == 100 and meta['unseen_networks'] == 20 and meta['width_divisor'] == 8
    assert 0.3 < meta['residual_mean_percent'] < 1.5 and len(log) == 2
    table, rng = LatencyTable(fit.base, fit.curves, {}, 32), random.Random(7)
    fresh = list(kit_networks(40, 10, SPACE, 8, rng).values())
    errors = [abs(table.of_config(config) / TRUTH.of_config(config) - 1) for config in fresh]
    assert 100 * np.mean(errors) < 1.2 and 100 * np.max(errors) < 4
    assert table_of(folder, lines, tmp_path, note='mine')[1]['device'] == 'mine'


def test_a_table_that_is_not_worth_searching_with_is_a_warning(kit, tmp_path, capsys):
    rng = random.Random(0)
    for spread, warned in ((0.01, False), (0.6, True)):
        rows = (line.split(',') for line in lines_of(kit[1]))
        lines = [f'{name},{float(ms) * (1 + spread * rng.random())}' for name, ms in rows]
        (tmp_path / 'timings.csv').write_text('\n'.join(lines))
        words = ['--timings', tmp_path / 'timings.csv', '--kit', kit[0], '--save_path', tmp_path / 't.pkl']
        make_lat_lut.main(make_lat_lut.get_args([str(word) for word in words]))
        assert ('its predictions for unseen networks' in capsys.readouterr().out) == warned
        meta = load_table(tmp_path / 't.pkl', 32, SPACE).meta
        assert (meta['residual_mean_percent'] > 10) == warned
        assert ('time its kit again on an idle device' in meta.get('warning', '')) == warned


def test_the_smallest_kit_has_room_for_wild_timings():
    held_back = make_lat_lut.held_back_of(make_lat_lut.LEAST_NETWORKS)
    assert held_back >= 5 + 2 and make_lat_lut.LEAST_NETWORKS - held_back >= 30 + 2
    assert make_lat_lut.held_back_of(make_lat_lut.NETWORKS) == 20


def test_held_back_networks_are_not_fitted(kit, tmp_path):
    folder, networks = kit
    lines, held_back = lines_of(networks, 0.0), read_kit(folder).held_back
    pairs = [line.split(',') for line in lines]
    slower = [f'{name},{(1 + 0.1 * (name in held_back)) * float(ms):.6g}' for name, ms in pairs]
    honest, biased = (table_of(folder, each, tmp_path) for each in (lines, slower))
    assert biased[0].base == honest[0].base
    assert biased[1]['residual_bias_percent'] == pytest.approx(honest[1]['residual_bias_percent'] - 9.1, abs=0.3)


def test_every_line_that_is_left_out_is_named(kit, tmp_path):
    folder, networks = kit
    lines = lines_of(networks)
    good = table_of(folder, lines, tmp_path)[0]
    lines[3] = lines[3].replace(',', ' ')
    lines[5] = 'net_004,fast'
    lines[7] = 'net_006,-3'
    lines[9] = f'net_008,{float(lines[9].split(",")[1]) / 1000:.6g}'
    lines[11] = f'net_010,{1.7 * float(lines[11].split(",")[1]):.6g}'
    lines[13] = 'net_999,14.2'
    lines[15] = lines[14]
    lines[17] = 'net_016,inf'
    lines[19] = f'networks/{lines[19].replace(",", ".onnx, ")}'
    fit, meta, log = table_of(folder, lines, tmp_path)
    text = '\n'.join(log)
    for line, reason in (
        (4, "'net_002 .*' is not network,ms"),
        (6, "'net_004,fast' is not network,ms"),
        (8, "'net_006,-3' is not network,ms"),
        (10, 'net_008 took .* is it in seconds'),
        (12, 'net_010 took .* by all others .*; left out'),
        (14, 'net_999 is no network of the kit'),
        (16, 'net_013 is there already, in line 15'),
        (18, "'net_016,inf' is not network,ms"),
    ):
        assert re.search(rf'line {line}: {reason}', text), (line, text)
    assert 'line 20' not in text
    assert '6 networks have no timing: net_002, net_004, net_006, net_012, net_014, ...' in text
    assert meta['samples'] == 92 and fit.base == pytest.approx(good.base, rel=0.1)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda lines: [re.sub(r',(.*)', lambda m: f',{float(m[1]) / 1000}', x) for x in lines], 'are these seconds'),
        (lambda lines: [re.sub(r',(.*)', lambda m: f',{float(m[1]) * 1e4}', x) for x in lines], 'are these microsec'),
        (lambda lines: lines[:20], '19 good timings for the fit and 0 of networks that are held back; should be at'),
        (lambda lines: [], 'no timing of a network of the kit'),
        (lambda lines: ['# kit: another', *lines], 'of another kit'),
        (lambda lines: ['# batch_size: many', *lines], "batch_size is 'many', should be a whole number"),
    ],
)
def test_timings_that_give_no_table(kit, change, message, tmp_path):
    with pytest.raises(BadInput, match=message):
        table_of(kit[0], change(lines_of(kit[1])), tmp_path)


def test_broken_kits_are_refused(kit, tmp_path):
    data = json.loads((kit[0] / 'networks.json').read_text())
    for broken, message in (
        ('', 'not a list of networks'),
        (json.dumps({**data, 'img_size': '32'}), "img_size is '32'"),
        (json.dumps({**data, 'networks': [1]}), 'not a list of networks'),
        (json.dumps({**data, 'networks': {'a': {'use': 'fit', 'config': {}}}}), "a: key 'first_stem' is missing"),
    ):
        (tmp_path / 'networks.json').write_text(broken)
        with pytest.raises(BadInput, match=message):
            read_kit(tmp_path)
    with pytest.raises(BadInput, match='--kit names the folder'):
        read_kit(tmp_path / 'none')


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        ('--width_divisor 8', '--width_divisor is of --kit: give --kit too'),
        ('--configs a.config', '--configs is of --kit: give --kit too'),
        ('--note phone', '--note is of --timings: give --timings too'),
        ('--check t.pkl --width_divisor 8', '--width_divisor is of --kit: leave it out with --check'),
        ('--check t.pkl --save_path u.pkl', '--save_path is not used with --check: leave one of them out'),
        ('--check t.pkl --metric flops', '--metric is not used with --check: leave one of them out'),
        ('--kit k --runtime onnxruntime', '--runtime is not used with --kit: leave one of them out'),
        ('--kit k --check t.pkl', '--check is not used with --kit: leave one of them out'),
        ('--kit k --save_path t.pkl', '--save_path is not used with --kit: leave one of them out'),
        ('--kit k --note phone', '--note is of --timings: leave it out with --kit'),
        ('--kit k --no-tf32', '--tf32 is not used with --kit: leave one of them out'),
        ('--timings t.csv --metric flops', '--metric is not used with --timings: leave one of them out'),
    ],
)
def test_flags_of_the_maker_that_would_be_ignored_are_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        make_lat_lut.get_args(words.split())
    assert ended.value.code == 2 and capsys.readouterr().err.endswith(f': error: {message}\n')


@pytest.mark.parametrize(
    'words',
    [
        '--kit k --width_divisor 4 --configs a.config --img_size 32 --num_classes 3 --seed 1 --batch_size 2',
        '--timings t.csv --kit k --note phone --save_path t.pkl',
        '--check t.pkl --runtime onnxruntime --launch eager --no-tf32 --networks 4 --rounds 2 --tolerance 3',
        '--runtime onnxruntime --save_path t.pkl --metric latency --budget 30',
    ],
)
def test_flags_of_the_maker_that_go_together(words):
    make_lat_lut.get_args(words.split())


def test_the_maker_writes_kits_and_tables(kit, tmp_path, capsys):
    folder = tmp_path / 'phone_kit'
    words = ['--kit', str(folder), '--configs', str(tmp_path / 'found.config'), '--img_size', '32']
    (tmp_path / 'found.config').write_text(dump_config(kit[1]['net_000']))
    make_lat_lut.main(make_lat_lut.get_args(words))
    assert list(read_kit(folder).networks) == [REFERENCE, 'found'] and (folder / 'networks' / 'found.onnx').exists()
    sized = replace(kit[1]['net_000'], meta=Meta(img_size=64))
    (tmp_path / 'found.config').write_text(dump_config(sized))
    make_lat_lut.main(make_lat_lut.get_args(['--kit', str(tmp_path / 'sized'), *words[2:-2]]))
    assert read_kit(tmp_path / 'sized').settings['img_size'] == 64 and '--img_size 64: from' in capsys.readouterr().out
    (tmp_path / 'timings.csv').write_text('\n'.join(lines_of(kit[1])))
    words = ['--timings', str(tmp_path / 'timings.csv'), '--kit', str(kit[0]), '--save_path', str(tmp_path / 'a.pkl')]
    make_lat_lut.main(make_lat_lut.get_args(words))
    assert 'Against 20 held-back networks: mean error ' in capsys.readouterr().out
    table = load_table(tmp_path / 'a.pkl', 32, SPACE)
    assert table.meta['kit_reference_ms'] == pytest.approx(TRUTH.of_config(kit[1][REFERENCE]), rel=0.05)
    with pytest.raises(BadInput, match='--networks 39: a --kit needs at least 40'):
        make_lat_lut.main(make_lat_lut.get_args(['--kit', str(tmp_path / 'b'), '--networks', '39']))
    with pytest.raises(BadInput, match='--width_divisor 65'):
        make_lat_lut.main(make_lat_lut.get_args(['--kit', str(tmp_path / 'b'), '--width_divisor', '65']))


# ---- the loop by hand


def test_times_of_found_networks_correct_the_next_fit():
    log, table = [], LatencyTable(TRUTH.base, {key: 0.8 * curve for key, curve in TRUTH.curves.items()}, {}, 32)

    state = {f'{block.stage}.{block.name}.log_alphas': 10 * torch.eye(8)[2] for block in SPACE.blocks()}
    for name, stage in SPACE.named_stages:
        state[f'{name}.betas'] = torch.arange(float(len(stage.exit_depths)))
    fit = Fitter(state, SPACE.start_widths(), Target(table, SPACE, 0.0, 1), 10)
    target = 0.9 * table.of_config(fit(0.9)[1])
    first = fit(target)[1]
    assert TRUTH.of_config(first) > 1.05 * target
    found = [Found(first, table.of_config(first), TRUTH.of_config(first))]
    config = fit_to_timings(fit, target, found, log.append)
    assert TRUTH.of_config(config) == pytest.approx(target, rel=0.01)
    assert re.fullmatch(r'Corrected by 1 timings of this architecture: .* ms expected', log[0])


def test_of_two_timed_architectures_that_alternate_the_last_is_kept(monkeypatch):
    """Above 14 ms a network takes 1.2 times as long as in the table, below as long. Each aim leads to the other."""

    def fit(aim, arch=None):
        arch = arch or ('deep' if aim > 14 else 'wide')
        return arch, (arch, aim), aim

    table = LatencyTable(TRUTH.base, TRUTH.curves, {}, 32)
    fit.target, fit.nearest, said = Target(table, SPACE, 0.0, 1), lambda aim: aim, []
    monkeypatch.setattr(closed_loop, '_architecture', lambda config, _: config[0])
    found = [Found(('deep', 15.0), 15.0, 18.0), Found(('wide', 12.0), 12.0, 12.0)]
    assert fit_to_timings(fit, 15.0, found, said.append) == ('wide', 15.0) and len(said) == 1
    narrow = partial(fit, arch=None)
    narrow.target, narrow.nearest = fit.target, lambda aim: min(aim, 13.0)
    fit_to_timings(narrow, 15.0, found[1:], said.append)
    assert said[-1] == 'warning: this is 13.3 % off the target of 15.0000 ms: no width is nearer'


def test_found_networks_are_named_by_their_files(kit, tmp_path):
    table = LatencyTable(TRUTH.base, TRUTH.curves, {'kit_reference_ms': 2.0, 'batch_size': 1, 'threads': 1}, 32)
    table.meta.update(img_size=32, num_classes=10)
    config = kit[1]['net_001']
    (tmp_path / 'model_12.5.config').write_text(dump_config(config))
    ms = TRUTH.of_config(config)
    log = []
    lines = [f'model_12.5.onnx,{ms * 1.1}', 'other.config,3', f'net_000,{1000 * ms}']
    (tmp_path / 'net_000.config').write_text(dump_config(kit[1]['net_000']))
    (tmp_path / 'found.csv').write_text('\n'.join(lines))
    (found,) = found_networks(read_timings(tmp_path / 'found.csv'), table, log.append)
    assert found.config == config and found.ms == pytest.approx(1.1 * ms) and found.predicted == pytest.approx(ms)
    assert 'line 2: other: no such config' in log[0] and 'line 3: net_000 took' in log[1]
    meta = [f'# {name}: {table.meta[name]}' for name in ('batch_size', 'threads', 'img_size', 'num_classes')]
    (tmp_path / 'found.csv').write_text('\n'.join([*meta, 'reference,2.2', *lines]))
    (found,) = found_networks(read_timings(tmp_path / 'found.csv'), table, log.append)
    assert found.ms == pytest.approx(ms) and '1.100 times as long' in log[2]
    for name, value in (('img_size', 64), ('batch_size', 2)):
        (tmp_path / 'found.csv').write_text('\n'.join([f'# {name}: {value}', *lines]))
        with pytest.raises(BadInput, match=f'timed with {name} {value}, the table has {table.meta[name]}'):
            found_networks(read_timings(tmp_path / 'found.csv'), table)
    (tmp_path / 'found.csv').write_text('other.config,3')
    with pytest.raises(BadInput, match='no timing of a found network'):
        found_networks(read_timings(tmp_path / 'found.csv'), table)
