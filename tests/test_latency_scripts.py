"""The table maker, its check, and the parser's targets, from the shell."""

import itertools
import math
import random
import re
import sys
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import parsing_model
from conftest import make_table, physical_curves
from latency_pkl import closed_loop, make_lat_lut
from latency_pkl import measured as measuring
from latency_pkl.measured import (
    LEAST_SAMPLES,
    REFERENCES,
    TURN,
    Turn,
    measured_table,
    missing,
    speed_of,
    time_turn,
)
from latency_pkl.runtimes import Engine
from latency_pkl.sampling import Decks, Sample, random_config, reference_config
from latency_pkl.timing import QUEUED, TOGETHER, UNCONFIRMED, WAITED, Measured, Passes, pool_timings, take_turns
from latency_pkl.width_grid import MULTIPLES, WidthGrid
from models.config import dump_config, load_config
from models.elasticity import full_weights, start_masks
from models.fitting import Fitter
from models.latency import LatencyTable
from models.parsing import MASKS_KEY, read_searched
from models.search_space import SPACE
from models.tables import load_table, save_table
from models.targeting import Target
from tools.errors import BadInput
from tools.files import save_checkpoint

MAKER = 'latency_pkl/make_lat_lut.py'
SIZE = ['--img_size', '32']
CPU = Engine('torch', None, torch.device('cpu'))
NO_GRID = WidthGrid(np.ones((1, len(MULTIPLES))))


@pytest.fixture(scope='module')
def measured(tmp_path_factory, run_script):
    """A table measured in a few seconds, and what its maker printed."""
    path = tmp_path_factory.mktemp('tables') / 'cpu.pkl'
    out = run_script(
        MAKER, '--device', 'cpu', *SIZE, '--num_classes', '10', '--budget', '12', '--save_path', path
    ).stdout
    return path, out


@pytest.fixture(scope='module')
def searched(tmp_path_factory):
    """A search checkpoint with probabilities that differ."""
    torch.manual_seed(3)
    full = full_weights(10, torch.device('cpu'), SPACE)
    for name, value in full.items():
        if name.endswith(('log_alphas', 'betas')):
            value.copy_(torch.randn_like(value))
    path = tmp_path_factory.mktemp('searched') / 'searched_model_00.pth.tar'
    save_checkpoint({'state_dict': full, MASKS_KEY: start_masks(SPACE)}, path)
    return path


def test_measured_table_covers_the_space_and_records_how_it_was_made(measured):
    path, out = measured
    table = load_table(path, 32, SPACE)
    assert table.curves.keys() == SPACE.table_widths(32).keys()
    for name in ('device', 'batch_size', 'threads', 'img_size', 'torch', 'date', 'samples', 'residual_mean_percent'):
        assert name in table.meta
    assert table.meta['batch_size'] == 1 and table.meta['img_size'] == 32 and table.meta['samples'] >= LEAST_SAMPLES
    assert f'Reference network: {table.meta["reference_ms"]:.4f} ms' in out
    least, shallow, most = table.reach(SPACE)
    assert 0 < table.base < least < shallow < most
    assert re.search(r'unseen networks: mean error \d+\.\d\d %, worst \d+\.\d\d %, bias [+-]\d+\.\d\d %', out)
    assert not list(path.parent.glob('.*'))  # no temporary file left


def test_check_prints_what_it_measures_and_exits_by_its_tolerance(measured, run_script):
    words = [MAKER, '--check', measured[0], '--device', 'cpu', '--networks', '2', '--rounds', '2']
    out = run_script(*words, '--tolerance', '0', code=1).stdout
    assert len(re.findall(r'predicted +\d+\.\d+ ms  measured +\d+\.\d+ ms', out)) == 2
    assert 'Measured by the reference network: the machine took' in out and ', batch 1, threads 1, torch, ' in out
    assert re.search(r'Timings with an undisturbed core, which are those that count: \d+ %', out)


def test_check_refuses_what_no_clock_measures_and_takes_the_settings_of_the_table(tmp_path, run_script):
    table = make_table(img_size=32, seed=1)
    for meta, code, message in (
        ({'unit': 'M parameters'}, 2, 'counts M parameters'),
        ({'unit': 'ms', 'device': 'another', 'batch_size': 2, 'threads': 2}, 1, 'Table of: another; timed on: '),
        ({'unit': 'ms', 'threads': 'many'}, 2, "threads is 'many', should be a whole number"),
    ):
        save_table(table.base, table.curves, meta, tmp_path / 'table.pkl')
        words = ['--check', tmp_path / 'table.pkl', '--device', 'cpu', *SIZE, '--networks', '2', '--rounds', '1']
        done = run_script(MAKER, *words, '--tolerance', '0', code=code)
        assert message in (done.stderr if code == 2 else done.stdout)
        if code == 1:
            assert 'batch 2, threads 2' in done.stdout and 'the clock alone' in done.stdout


def sample(rng, fixed=1.0):
    """A random network whose blocks took a millisecond each."""
    config = random_config(rng, ends=True, num_classes=10, space=SPACE)
    return Sample(fixed, [(key, spec.mid_channels, 1.0) for _, spec, key in config.table_keys(32)])


def test_what_a_fit_lacks_is_named():
    rng, samples = random.Random(0), []
    while missing(samples, 32):
        assert len(samples) < 20 * LEAST_SAMPLES
        samples.append(sample(rng))
    seen = {key for one in samples for key, _, _ in one.blocks}
    assert seen == SPACE.table_widths(32).keys() and len(samples) >= LEAST_SAMPLES
    few = samples[: LEAST_SAMPLES - 1] * 2
    shapes = len({key for one in few for key, _, _ in one.blocks})
    assert shapes < 66 and missing(few, 32) == f'{len(few)} networks showed {shapes} of 66 block shapes'
    unfixed = [replace(one, fixed=math.nan) for one in samples]
    assert missing(unfixed, 32) == f'{len(samples)} networks showed 66 of 66 block shapes and no fixed layers'


def test_a_fit_soon_sees_every_block_shape():
    counts = []
    for seed in range(20):
        rng, samples = random.Random(seed), []
        decks = Decks(rng)
        while missing(samples, 32):
            config = random_config(rng, len(samples) % 2 == 0, 10, SPACE, 8, decks)
            samples.append(Sample(1.0, [(key, spec.mid_channels, 1.0) for _, spec, key in config.table_keys(32)]))
        counts.append(len(samples))
    assert max(counts) <= 30  # independent draws need 45 on average


def disturbed_turns(share, seed):
    """A fake `time_turn` on a core that is contended in bursts, for a share of the time; if `share` is None, at every
    second probe. A contended core takes 1.5 times as long."""
    generator, reference, truth = np.random.default_rng(seed), reference_config(10, SPACE), physical_curves(32)

    def passes(config, count):
        blocks = [truth[key][spec.mid_channels - 1] for _, spec, key in config.table_keys(32)]
        parts = np.tile([0.1, *blocks, 0.1], (count, 1)) * generator.normal(1, 0.02, (count, len(blocks) + 2))
        probes = generator.normal(0.03, 0.0003, (count, len(blocks) + 3))
        if share is None:
            burst = np.broadcast_to(np.arange(probes.shape[1]) % 2 == 0, probes.shape)
        else:
            burst = np.repeat(generator.random((count, 20)) < share, 2, axis=1)[:, : probes.shape[1]]
        disturbed = burst[:, :-1] | burst[:, 1:]
        return Passes(parts * np.where(disturbed, 1.5, 1), probes * np.where(burst, 1.9, 1))

    def time_turn(rng, unseen, args, engine, divisor, decks):
        configs = [random_config(rng, i % 2 == 0, 10, SPACE, divisor, decks) for i in range(TURN - 1)]
        fitted = [(config, passes(config, TOGETHER)) for config in configs]
        return Turn(fitted, (unseen, passes(unseen, 16)), [passes(reference, 2) for _ in range(TURN)])

    return time_turn


def table_of(share, monkeypatch, budget=1, patience=1000):
    """Make a table from `disturbed_turns` that take a second each: (base and mean of each curve over their true values,
    meta)."""
    args = SimpleNamespace(num_classes=10, batch_size=1, img_size=32, threads=1, seed=2, budget=budget)
    monkeypatch.setattr(measuring, 'time_turn', disturbed_turns(share, seed=0))
    monkeypatch.setattr(measuring, 'time_grid', lambda *_: NO_GRID)
    monkeypatch.setattr(measuring, 'time', SimpleNamespace(monotonic=partial(next, itertools.count())))
    monkeypatch.setattr(measuring, 'PATIENCE', patience)
    base, curves, meta = measured_table(args, CPU)
    truth, widths = physical_curves(32), SPACE.table_widths(32)
    ratios = [np.mean(curves[key][low - 1 :] / truth[key][low - 1 :]) for key, (low, _) in widths.items()]
    return base / 0.2, np.array(ratios), meta


@pytest.mark.parametrize('share', [0.0, 0.8])
def test_a_short_look_at_a_disturbed_machine_gives_the_tables_own_error(share, monkeypatch, capsys):
    """Parts that were never undisturbed are neither fitted nor compared; the maker goes on until all shapes were."""
    base, ratios, meta = table_of(share, monkeypatch)
    assert base == pytest.approx(1.0, rel=0.03) and ratios.mean() == pytest.approx(1.0, rel=0.02)
    assert abs(ratios - 1).mean() < 0.04
    assert meta['residual_mean_percent'] < 3 and meta['unseen_networks'] >= 3
    truth = physical_curves(32)
    blocks = [truth[key][spec.mid_channels - 1] for _, spec, key in reference_config(10, SPACE).table_keys(32)]
    assert meta['reference_ms'] == pytest.approx(sum(blocks) + 0.2, rel=0.01)  # at which a check takes the table
    out, err = capsys.readouterr()
    assert f'mean error {meta["residual_mean_percent"]:.2f} %' in out and 'counted too' not in out
    assert not err  # the bar is for terminals


def test_a_turn_is_as_slow_as_the_undisturbed_parts_of_the_reference():
    parts, quiet = np.array([[3.0, 1.0]] * 4), np.full((4, 3), 0.03)
    half, busy = np.array([[0.03, 0.03, 0.06]] * 4), np.full((4, 3), 0.06)
    of_turns = [
        Passes(parts, quiet),
        Passes(1.6 * parts, busy),  # nothing seen: midway between the turns beside it
        Passes(parts * [1.1, 1.5], half),  # its second part was disturbed
        Passes(1.2 * parts, quiet),
    ]
    turns = [Turn([], (None, one), [one]) for one in of_turns]
    ms, slowness = speed_of(turns, 0.03)
    first, second = 3 * (1 + 1.1 + 1.2) / 3, (1 + 1.2) / 2
    assert ms == pytest.approx(first + second)
    known = [4 / ms, 3.3 / first, 4.8 / ms]
    assert slowness == pytest.approx([known[0], (known[0] + known[1]) / 2, *known[1:]])
    ms, slowness = speed_of(turns[1:2], 0.03)
    assert ms == pytest.approx(1.6 * 4) and slowness == pytest.approx([1.0])
    turns[2] = Turn([], (None, None), [Passes(parts, half[:, ::-1])])  # only its smaller part was not disturbed
    ms, slowness = speed_of(turns, 0.03)
    assert ms == pytest.approx(3 * (1 + 1.2) / 2 + (1 + 1 + 1.2) / 3)
    assert slowness == pytest.approx(np.linspace(4, 4.8, 4) / ms)


def test_a_machine_never_undisturbed_gets_a_table_of_its_least_disturbed_timings(monkeypatch, capsys):
    base, ratios, meta = table_of(None, monkeypatch, budget=12, patience=1)
    assert base == pytest.approx(1.5, rel=0.03) and ratios.mean() == pytest.approx(1.5, rel=0.03)
    assert 'count: 0 %; probes up to 2 times as slow counted too' in capsys.readouterr().out
    assert meta['probe_slack'] == 2


def test_a_turn_times_networks_as_a_check_does(monkeypatch):
    args = SimpleNamespace(num_classes=10, batch_size=1, img_size=32, launch='queued')  # which a CPU ignores
    unseen = random_config(random.Random(1), ends=False, num_classes=10, space=SPACE)
    together = []
    monkeypatch.setattr(
        measuring, 'take_turns', lambda benches, rng: together.append(benches) or take_turns(benches, rng)
    )
    turn = time_turn(random.Random(0), unseen, args, CPU)
    [benches] = together
    assert len(benches) == TURN + REFERENCES and {bench.launch for bench in benches} == {'queued'}
    assert [bench.by_part for bench in benches] == [False] + [True] * (TURN - 1) + [False] * REFERENCES
    assert turn.unseen[0] is unseen and len(turn.fitted) == TURN - 1 and len(turn.reference) == REFERENCES
    reference = sum(map(len, reference_config(10, SPACE).stages.values())) + 2  # its stem, and what follows its blocks
    assert {one.parts.shape for one in turn.reference} == {(TOGETHER, reference)}
    for config, passes in turn.fitted:
        assert passes.parts.shape == (TOGETHER, sum(map(len, config.stages.values())) + 2)
        assert passes.probes.shape == (TOGETHER, passes.parts.shape[1] + 1) and (passes.probes > 0).all()
    assert len(turn.passes) == TURN + REFERENCES


@pytest.fixture
def card(monkeypatch):
    """Run a script in this process as if it had a card; all timings are fakes. Returns the launches and standards.

    Two of three networks are bound by their host, and a tenth of the passes cannot be queued.
    """
    asked = []

    def time_turn(rng, unseen, args, engine, divisor, decks):
        turn = disturbed_turns(0.0, rng.getrandbits(30))(rng, unseen, args, engine, divisor, decks)
        asked.append((engine.device.type, args.batch_size, args.launch))

        def on_card(one, ratio):
            held = rng.random() < 0.9
            probes = np.full_like(one.probes, 0.0 if args.launch == 'eager' else QUEUED if held else WAITED)
            return Passes(one.parts, probes, np.full(len(one.parts), ratio if held else math.nan))

        fitted = [(config, on_card(one, 1.0 + i % 3)) for i, (config, one) in enumerate(turn.fitted)]
        unseen = turn.unseen[0], on_card(turn.unseen[1], 1.0)
        return Turn(fitted, unseen, [on_card(one, 1.0) for one in turn.reference])

    def measure_latency(build, batch_size, img_size, device, standard, rounds, launch):
        asked.append((device.type, batch_size, launch, standard and standard.ms))
        return Measured(5.0, 0.001, 1.0 if standard else None, 1.5 if device.type == 'cuda' else None)

    def measure_in_turns(builds, *setting):
        measured = [measure_latency(build, *setting) for build in builds]
        return [replace(one, host=1.0 + i) for i, one in enumerate(measured)], 0.9

    def run(script, *words):
        asked.clear()
        monkeypatch.setattr(sys, 'argv', ['script', *map(str, words), *SIZE, '--num_classes', '10'])
        script.main(script.get_args())
        return list(asked)

    for script in (make_lat_lut, parsing_model):
        monkeypatch.setattr(script, 'pick_device', lambda choice: torch.device('cpu' if choice == 'cpu' else 'cuda'))
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'a card')
    monkeypatch.setattr(measuring, 'time_turn', time_turn)
    monkeypatch.setattr(measuring, 'time_grid', lambda *_: NO_GRID)
    monkeypatch.setattr(make_lat_lut, 'measure_in_turns', measure_in_turns)
    for module in (parsing_model, closed_loop):
        monkeypatch.setattr(module, 'measure_latency', measure_latency)
    clock = SimpleNamespace(monotonic=partial(next, itertools.count()), strftime=time.strftime)
    for module in (make_lat_lut, measuring):
        monkeypatch.setattr(module, 'time', clock)
    return run


@pytest.mark.parametrize('launch', ['queued', 'eager'])
def test_a_table_of_a_card_has_its_launch_and_all_that_compares_follows_it(launch, card, searched, tmp_path, capsys):
    path, network = tmp_path / 'card.pkl', ['--model_path', searched, '--save_path', tmp_path / 'n.config']
    flag = [] if launch == 'queued' else ['--launch', 'eager']
    assert {one for one in card(make_lat_lut, '--budget', '30', '--save_path', path, *flag)} == {('cuda', 32, launch)}
    table, out = load_table(path, 32, SPACE), capsys.readouterr().out
    assert table.meta['launch'] == launch
    share, count = map(int, re.search(f'Timed {launch}; bound by the host: (\\d+) % of (\\d+) networks', out).groups())
    assert count >= 0.8 * table.meta['samples'] > 100 and share == pytest.approx(200 / 3.5, abs=8)
    assert 'eager over queued time: 2.00 (median), 3.00 (most)' in out
    assert ('The host was too slow to queue' in out) == (launch == 'queued')
    assert (table.meta['undisturbed_percent'] < 95) == (launch == 'queued')

    standard = table.meta['reference_ms']
    check = [make_lat_lut, '--check', path, '--networks', '4', '--tolerance', '1e9']
    assert card(*check) == [('cuda', 32, launch, standard)] * 4
    line = f'Timed {launch}; bound by the host: 75 % of 4 networks; eager over queued time: 2.50 (median), 4.00 (most)'
    assert line in capsys.readouterr().out
    other = 'eager' if launch == 'queued' else 'queued'
    assert card(*check, '--launch', other) == [('cuda', 32, other, None)] * 4  # no standard of the other kind

    words = [parsing_model, *network, '--lookup_path', path]
    timed = card(*words, '--print_lat')
    assert timed == [('cuda', 32, launch, standard), ('cuda', 1, launch, None), ('cpu', 1, 'eager', None)]
    lines = re.findall(r'Lat_\w+ bs=.*', capsys.readouterr().out)
    bound = f'5.0000 ms, {launch} (bound by the host: eager over queued time is 1.50)'
    by = [', relative to the reference network of the table', *[', by the clock alone'] * 2]
    shown = f'Lat_GPU bs=32: {bound}', f'Lat_GPU bs=1: {bound}', 'Lat_CPU bs=1: 5.0000 ms'
    assert lines == [line + how for line, how in zip(shown, by, strict=True)]
    assert set(card(*words, '--target_lat', '50%', '--fit_measured')) == {('cuda', 32, launch, standard)}
    assert f'measured {bound}, target' in capsys.readouterr().out


def test_a_card_is_timed_eagerly_beside_a_table_without_launch(card, searched, tmp_path, capsys):
    table, path = make_table(img_size=32, seed=1), tmp_path / 'old.pkl'
    save_table(table.base, table.curves, {'unit': 'ms', 'device': 'a card', 'batch_size': 8}, path)
    checked = card(make_lat_lut, '--check', path, '--networks', '2', '--tolerance', '1e9')
    assert checked == [('cuda', 8, 'eager', None)] * 2
    words = ['--model_path', searched, '--save_path', tmp_path / 'n.config', '--lookup_path', path, '--print_lat']
    assert {one[2] for one in card(parsing_model, *words)} == {'eager'}
    assert load_config(tmp_path / 'n.config').meta.measured_on == 'a card, batch 8'
    save_table(table.base, table.curves, {'unit': 'ms', 'launch': 'graph'}, path)
    with pytest.raises(BadInput, match="launch is 'graph', should be queued or eager"):
        card(make_lat_lut, '--check', path)


@pytest.mark.parametrize(
    ('device', 'meta', 'fitted', 'timed'),
    [
        ('cuda', {'device': 'a card', 'batch_size': 8}, False, 'GPU 8, GPU 32, GPU 1, CPU 1'),
        ('cuda', {'device': 'a card', 'batch_size': 1}, False, 'GPU 1, GPU 32, CPU 1'),
        ('cuda', {'device': 'another', 'batch_size': 8}, False, 'GPU 32, GPU 1, CPU 1'),
        ('cuda', {'device': 'another', 'batch_size': 8}, True, 'GPU 8, GPU 32, GPU 1, CPU 1'),
        ('cuda', {}, False, 'GPU 32, GPU 1, CPU 1'),
        ('cpu', {'batch_size': 4}, False, 'CPU 4, CPU 1'),
        ('cpu', {}, True, 'CPU 1'),
    ],
)
def test_the_batch_size_of_a_table_is_timed_first(device, meta, fitted, timed, monkeypatch):
    """That of another device's table is not, unless the network was fitted by the clock beside it."""
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'a card')
    engine = Engine('torch', None, torch.device(device))
    places = parsing_model.timings_of(LatencyTable(1.0, {}, meta, 32), engine, fitted)
    assert ', '.join(f'{name} {batch_size}' for name, _, batch_size in places) == timed
    assert all(place.device.type == {'GPU': 'cuda', 'CPU': 'cpu'}[name] for name, place, _ in places)


def test_a_launch_is_of_a_gpu(measured, tmp_path, capsys):
    """On a CPU, and for what is not timed, the flag ends in one line; tables of a CPU have no such entry."""
    assert 'launch' not in load_table(measured[0], 32, SPACE).meta
    made = ['--save_path', tmp_path / 't.pkl']
    for words in (
        ['--device', 'cpu', *made],
        ['--metric', 'flops', *made],
        ['--device', 'cpu', '--check', measured[0]],
    ):
        words = map(str, [*words, '--launch', 'queued', *SIZE])
        with pytest.raises(BadInput, match='--launch queued: only for times that torch measures on a GPU'):
            make_lat_lut.main(make_lat_lut.get_args(list(words)))
        lines = capsys.readouterr().out.splitlines()  # a table measured on a busy machine may have a warning
        assert not any(line.startswith(('Table of', 'Timing')) for line in lines) and not list(tmp_path.iterdir())


def test_several_targets_give_several_configs(measured, searched, tmp_path, run_script):
    words = ['parsing_model.py', '--model_path', searched, '--lookup_path', measured[0], *SIZE, '--num_classes', '10']
    out = run_script(
        *words, '--save_path', tmp_path / 'net.config', '--target_lat', '20%', '45%', '--width_divisor', '8'
    ).stdout
    targets = [float(t) for t in re.findall(r'Target: (\d+\.\d+) ms', out)]
    predicted = [float(t) for t in re.findall(r'Lat_LUT: (\d+\.\d+) ms', out)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ['net_20pc.config', 'net_45pc.config']
    for target, latency, share in zip(targets, predicted, ('20pc', '45pc'), strict=True):
        assert 0.97 * target <= latency <= target + 1e-4
        config = load_config(tmp_path / f'net_{share}.config')
        assert all(s.mid_channels % 8 == 0 for blocks in config.stages.values() for s in blocks)
        assert load_table(measured[0], 32, SPACE).of_config(config) == pytest.approx(latency, abs=1e-4)


def fit_by(clock, searched, monkeypatch):
    """Fit a network to the middle of a table's range by a fake clock.

    Args:
        clock: called with the number of the timing and the network's latency in the table, returns a `Measured`.

    Returns:
        The table's latency of the fitted network, the target, and the measured latencies.
    """
    table, measured = make_table(img_size=32), []

    def measure_latency(build, *_):
        measured.append(clock(len(measured), table.of_config(build.args[0])))
        return measured[-1]

    monkeypatch.setattr(closed_loop, 'measure_latency', measure_latency)
    found = read_searched(searched, SPACE)
    least, _, most = table.reach(SPACE)
    target = (least + most) / 2
    fit = Fitter(found.state, found.widths, Target(table, SPACE, target, 1), 10)
    config = closed_loop.fit_to_clock(fit, target, CPU, 1)
    return table.of_config(config), target, [one.ms for one in measured]


@pytest.mark.parametrize('slower', [0.9, 1.05, 1.2])
def test_a_clock_that_differs_from_the_table_moves_the_aim(slower, searched, monkeypatch, capsys):
    """A network that takes a multiple of its latency in the table is fitted to the target over that multiple."""
    ms, target, measured = fit_by(lambda _, ms: Measured(slower * ms, 0.001), searched, monkeypatch)
    assert measured[0] == pytest.approx(slower * target, rel=0.005)  # fitted to the table
    assert measured[1:] == pytest.approx([target] * (len(measured) - 1), rel=0.005) and len(measured) in (2, 3)
    assert slower * ms == measured[-1]
    out = capsys.readouterr().out
    assert re.search(r'within 0\.\d\d % of the target, standard error 0\.\d\d % \(mean over 2 of \d rounds\)\n$', out)


def test_of_two_architectures_that_alternate_one_is_kept(monkeypatch, capsys):
    """Up to 10.5 ms the network is wide, and faster than its table; above it is deep, and nearly as slow as its table.
    So the corrected aim of each is in the range of the other."""

    def fit(aim, arch=None):
        arch = arch or ('wide' if aim <= 10.5 else 'deep')
        return arch, (arch, aim), aim

    def measure_latency(build, *_):
        arch, ms = build.args[0]
        return Measured({'wide': 0.9, 'deep': 0.98}[arch] * ms, 0.001)

    fit.target, fit.nearest = Target(make_table(img_size=32), SPACE, 10.0, 1), lambda aim: aim
    monkeypatch.setattr(closed_loop, 'measure_latency', measure_latency)
    assert closed_loop.fit_to_clock(fit, 10.0, CPU, 1) == ('wide', pytest.approx(10 / 0.9))
    assert 'Round 3: its architecture is kept' in capsys.readouterr().out


@pytest.mark.parametrize('at', range(5))
@pytest.mark.parametrize('factor', [0.8, 1.26, 3.0])
def test_an_outlying_time_is_not_followed(at, factor, searched, monkeypatch, capsys):
    noise = itertools.cycle([1.014, 0.986, 1.008, 0.992])  # too much for the goal within four rounds

    def clock(number, ms):
        return Measured(ms * next(noise) * (factor if number == at else 1), 0.007)

    ms, target, measured = fit_by(clock, searched, monkeypatch)
    out = capsys.readouterr().out
    assert ms == pytest.approx(target, rel=0.01)
    assert len(measured) <= 8 and (len(measured) <= at or at == 0 or out.count('does not fit with the others') >= 1)


def test_timings_count_by_their_standard_errors(searched, monkeypatch):
    """A precise timing outweighs one that is not."""
    times = [(1.0, 0.002), (1.06, 0.05)]
    ms, target, measured = fit_by(lambda i, ms: Measured(ms * times[i][0], times[i][1]), searched, monkeypatch)
    assert ms == pytest.approx(target, rel=0.001) and len(measured) == 2


def test_a_machine_too_noisy_for_the_goal_is_reported(searched, monkeypatch, capsys):
    generator = np.random.default_rng(0)
    ms, target, measured = fit_by(lambda _, ms: Measured(ms * generator.normal(1, 0.05), 0.05), searched, monkeypatch)
    out = capsys.readouterr().out
    error = float(re.search(r'standard error (\d\.\d\d) %', out).group(1))
    assert 'This misses the goal of 0.5 %' in out and error > 1.0 and len(measured) >= 4
    assert ms == pytest.approx(target, rel=0.1)


def test_a_pool_is_the_weighted_mean_without_outliers():
    def pool(*timings):
        return pool_timings([(10.0, Measured(10 * ratio, error)) for ratio, error in timings])

    two = pool((1.0, 0.01), (1.02, 0.02))
    assert two.ratio == pytest.approx(1.004) and two.error == pytest.approx(12500**-0.5) and two.fits.all()
    three = pool((1.0, 0.005), (1.3, 0.005), (1.01, 0.005))
    assert three.ratio == pytest.approx(1.005) and three.fits.tolist() == [True, False, True]
    assert 0.0035 < three.error < 0.006
    apart = pool((1.0, 0.005), (1.3, 0.005))
    assert apart.ratio == pytest.approx(1.15) and not apart.fits.any() and apart.error > 0.1
    assert pool((1.1, 0.001)).ratio == pytest.approx(1.1) and pool((1.1, 0.001)).error == UNCONFIRMED
    assert pool((1.1, math.inf), (0.9, 0.0)).ratio == pytest.approx(0.9, rel=0.001)
    assert pool((1.0, 0.01), (1.2, 0.01), (1.01, 0.01), (1.21, 0.01)).fits.tolist() == [False] * 4


@pytest.mark.slow
def test_fit_by_the_clock_reports_its_rounds(measured, searched, tmp_path, run_script):
    words = ['parsing_model.py', '--model_path', searched, '--lookup_path', measured[0], *SIZE, '--num_classes', '10']
    clock = ['--fit_measured', '--rounds', '4']
    out = run_script(*words, '--save_path', tmp_path / 'n.config', '--target_lat', '40%', *clock).stdout
    rounds = re.findall(r'Round (\d): predicted (\d+\.\d+), measured (\d+\.\d+) ms.*, target (\d+\.\d+) ms', out)
    assert [int(number) for number, *_ in rounds] == list(range(1, len(rounds) + 1)) and 1 <= len(rounds) <= 8
    assert re.search(r'Measured latency is within \d+\.\d\d % of the target', out)
    if len(rounds) > 1:  # the second aim moves against the first error, if that is more than a gap between widths
        (_, first, slow, target), (_, second, *_) = rounds[:2]
        error = float(slow) / float(target) - 1
        assert abs(error) < 0.02 or (float(second) < float(first)) == (error > 0)


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['--target_lat', '5%', '--config_path', 'models/zoo/tf_nas_a.config'], 'needs a searched model'),
        (['--fit_measured', '--config_path', 'models/zoo/tf_nas_a.config'], '--fit_measured needs a --target_lat'),
        (['--target_lat', '150%'], '--target_lat 150%: should be from'),
        (['--target_lat', '1/2', '3/4'], '--target_lat 1/2: expected a number, or a share such as 60%'),
    ],
)
def test_bad_targets_end_in_one_line(words, message, measured, searched, tmp_path, run_script):
    network = [] if '--config_path' in words else ['--model_path', searched]
    shared = ['--lookup_path', measured[0], *SIZE, '--save_path', tmp_path / 'n.config']
    done = run_script('parsing_model.py', *network, *words, *shared, code=2)
    assert message in done.stderr and len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_a_config_is_written_though_the_images_of_the_search_are_gone(searched, tmp_path, monkeypatch, capsys):
    def gone(flags, folder):
        raise BadInput('train.txt: no such list')

    monkeypatch.setattr(parsing_model, 'training_flags', gone)
    words = ['--model_path', str(searched), '--img_size', '32', '--save_path', str(tmp_path / 'n.config')]
    parsing_model.main(parsing_model.get_args([*words, '--device', 'cpu']))
    assert (tmp_path / 'n.config').exists() and 'no command to train it: train.txt: no such' in capsys.readouterr().out


def test_a_table_that_is_given_predicts_the_latency_of_a_config_without_timing_it(tmp_path, capsys):
    table, config = make_table(img_size=32), reference_config(10, SPACE)
    save_table(table.base, table.curves, {'unit': 'ms'}, tmp_path / 'table.pkl')
    (tmp_path / 'n.config').write_text(dump_config(config))
    words = ['--config_path', str(tmp_path / 'n.config'), *SIZE, '--device', 'cpu']
    parsing_model.main(parsing_model.get_args([*words, '--lookup_path', str(tmp_path / 'table.pkl')]))
    printed = capsys.readouterr().out
    assert f'Lat_LUT: {table.of_config(config):.4f} ms, predicted by' in printed and 'Timing' not in printed
    parsing_model.main(parsing_model.get_args(words))
    assert 'Lat_LUT' not in capsys.readouterr().out


def test_times_of_found_networks_correct_the_next_fit(searched, tmp_path, capsys):
    table, path = make_table(img_size=32, seed=1), tmp_path / 'found.config'
    save_table(table.base, table.curves, {'unit': 'ms'}, tmp_path / 'table.pkl')
    words = ['--model_path', str(searched), '--lookup_path', str(tmp_path / 'table.pkl'), *SIZE, '--device', 'cpu']
    words += ['--num_classes', '10', '--target_lat', '50%']

    def latency_of(*more):
        parsing_model.main(parsing_model.get_args([*words, *more]))
        return float(re.search(r'Lat_LUT: ([\d.]+) ms', capsys.readouterr().out)[1])

    first = latency_of('--save_path', str(path))
    (tmp_path / 'found.csv').write_text(f'network,ms\n{path.name},{1.1 * first}\n')
    timings = ['--timings', str(tmp_path / 'found.csv'), '--save_path', str(tmp_path / 'again.config')]
    assert latency_of(*timings) == pytest.approx(first / 1.1, rel=0.005)
    assert load_config(tmp_path / 'again.config') != load_config(path)
    with pytest.raises(SystemExit):
        parsing_model.get_args([*words[:-2], *timings])
    assert '--timings needs a --target_lat' in capsys.readouterr().err
