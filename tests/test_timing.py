"""Timing of networks by simulated clocks, and curves from timings."""

import itertools
import math
import platform
import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import SMALL_SPACE, make_table, physical_curves
from latency_pkl import timing as profiling
from latency_pkl.fit import fit_table
from latency_pkl.runtimes import Engine, standard_of
from latency_pkl.sampling import Sample, build_network, random_config, reference_config, sample_of
from latency_pkl.timing import (
    PRECISION,
    ROUNDS,
    TOGETHER,
    TURNS,
    Bench,
    Passes,
    Round,
    Standard,
    bench_apart,
    fastest_probe,
    measure_in_turns,
    measure_latency,
    summary_of,
    take_turns,
    typical_parts,
    undisturbed_share,
)
from models.config import dump_config
from models.latency import LatencyTable
from models.model_eval import NetworkEval
from models.search_space import SPACE
from tools.environment import device_name
from tools.errors import BadInput


def timed_networks(count, noise, seed, img_size=64):
    """Samples of blocks with known times, by a noisy clock, from a machine that is slower every third time."""
    rng, generator = random.Random(seed), np.random.default_rng(seed)
    truth = physical_curves(img_size)
    samples = []
    for i in range(count):
        slow = 1.35 if i % 3 == 0 else 1.0
        config = random_config(rng, ends=True, num_classes=10, space=SPACE)
        blocks = [
            (key, spec.mid_channels, truth[key][spec.mid_channels - 1] * slow * generator.normal(1, noise))
            for _, spec, key in config.table_keys(img_size)
        ]
        fixed = 0.5 * slow * generator.normal(1, noise)
        samples.append(Sample(fixed, blocks))
    return truth, samples


def without_parts(samples, share):
    """Samples of which some parts were never timed undisturbed."""
    rng = random.Random(0)
    return [
        Sample(math.nan if rng.random() < share else one.fixed, [b for b in one.blocks if rng.random() >= share])
        for one in samples
    ]


@pytest.mark.parametrize('share', [0.0, 0.3])
def test_table_recovers_the_truth_behind_disturbances(share):
    truth, samples = timed_networks(200, noise=0.03, seed=0)
    samples = without_parts(samples, share) if share else samples
    # the reference network is timed during half of the disturbances
    slowness = np.where(np.arange(200) % 6 == 0, 1.35, 1.0)
    fit = fit_table(samples, slowness, 64, SPACE)
    assert fit.base == pytest.approx(0.5, rel=0.06)
    usual = np.array([sample.total for sample in samples]) / slowness
    table = [sample.predicted(fit.base, fit.curves) for sample in samples]
    known = (np.arange(200) % 3 != 0) | (slowness > 1)
    assert (usual / table)[known].mean() == pytest.approx(1, abs=0.002)
    errors = []
    for key, (low, high) in SPACE.table_widths(64).items():
        assert len(fit.curves[key]) == high and (np.diff(fit.curves[key]) >= 0).all() and fit.curves[key][0] > 0
        errors.append(np.abs(fit.curves[key][low - 1 :] / truth[key][low - 1 :] - 1).mean())
    assert np.mean(errors) < 0.04 and max(errors) < 0.1


def fake_benches(monkeypatch, factors):
    """Networks are numbers: their ms in two parts, each round times the next factor, on a core never disturbed."""

    def take_turns(benches, order):
        factor = next(factors)
        return [[Passes(np.full((2, 2), bench.build() * factor() / 2), np.ones((2, 3)))] for bench in benches]

    monkeypatch.setattr(profiling, 'take_turns', take_turns)


def test_a_standard_takes_out_the_speed_of_the_machine(monkeypatch):
    """A machine whose speed alternates and has dropped for good: the network takes 1.5 times the standard's 8 ms."""
    speeds = [lambda: 1.1, lambda: 1.1 * 1.4, lambda: 1.1 * 1.2]
    fake_benches(monkeypatch, itertools.cycle(speeds))
    standard = Standard(lambda: 10.0, 8.0)
    measured = measure_latency(lambda: 15.0, 1, 64, torch.device('cpu'), standard)
    assert measured.ms == pytest.approx(12.0) and measured.slowness == pytest.approx(1.2 * 1.1 * 10 / 8)
    assert measured.error == pytest.approx(0, abs=1e-9)
    assert (
        str(measured)
        == '12.0000 ms (19.8000 by the clock, the machine being 1.65 times as slow as when its table was made)'
    )
    alone = measure_latency(lambda: 15.0, 1, 64, torch.device('cpu'))
    assert alone.slowness is None and alone.ms == pytest.approx(1.2 * 1.1 * 15) and str(alone) == '19.8000 ms'


@pytest.mark.parametrize(('spread', 'rounds'), [(0.001, ROUNDS), (0.03, None), (0.2, 2 * ROUNDS)])
def test_a_noisy_machine_is_timed_more_often(monkeypatch, spread, rounds):
    generator, count = np.random.default_rng(3), itertools.count()
    fake_benches(monkeypatch, itertools.repeat(lambda: generator.normal(1, spread / 2**0.5)))
    measured = measure_latency(lambda: 10.0 + 0 * next(count), 1, 64, torch.device('cpu'), Standard(lambda: 5.0, 5.0))
    made = next(count)
    assert made == rounds or (rounds is None and ROUNDS < made < 2 * ROUNDS)
    assert rounds == 2 * ROUNDS or measured.error <= PRECISION
    assert measured.ms == pytest.approx(10.0, rel=4 * 1.2533 * spread / made**0.5)


def test_what_many_are_compared_with_is_built_more_often(monkeypatch):
    """The memory layout of a build is noise; that of one standard would be in all ratios."""
    generator, built = np.random.default_rng(0), []

    def take_turns(benches, order):
        built.append([bench.build() for bench in benches])
        return [[Passes(np.full((2, 2), ms * generator.normal(1, 0.02) / 2), np.ones((2, 3)))] for ms in built[-1]]

    monkeypatch.setattr(profiling, 'take_turns', take_turns)
    builds = [partial(float, 5 + i) for i in range(13)]
    measured, share = measure_in_turns(builds, 1, 64, torch.device('cpu'), Standard(lambda: 2.0, 4.0))
    assert [len(one) for one in built[: 2 * ROUNDS]] == [10 + 3, 3 + 3] * ROUNDS and share == 1
    assert len(built) > 2 * ROUNDS and all(one.count(2.0) == 3 for one in built)  # also in rounds with few networks
    ratios = np.array([one.ms / (2 * (5 + i)) for i, one in enumerate(measured)])
    assert ratios.mean() == pytest.approx(1, abs=0.007) and abs(ratios - 1).max() < 0.02


def test_only_what_an_undisturbed_core_did_counts():
    """Probes find the passes in which the core was contended."""
    generator = np.random.default_rng(0)
    disturbed = generator.random((400, 4)) < 0.6  # at each of the four probes beside three parts
    parts = np.array([1.0, 2.0, 4.0]) * generator.normal(1, 0.02, (400, 3))
    parts *= np.where(disturbed[:, :-1] | disturbed[:, 1:], 1.5, 1.0)
    passes = Passes(parts, 0.03 * np.where(disturbed, 1.9, 1.0) * generator.normal(1, 0.01, (400, 4)))
    fastest = fastest_probe([passes])
    assert fastest == pytest.approx(0.03, rel=0.05)
    assert undisturbed_share([passes]) == pytest.approx(0.4**2, abs=0.04)
    halves = [Passes(parts[i::2], passes.probes[i::2]) for i in range(2)]
    assert typical_parts(halves, fastest) == pytest.approx([1.0, 2.0, 4.0], rel=0.01)
    assert typical_parts([Passes(parts, np.zeros((400, 4)))], 0.0).sum() > 1.3 * 7  # without probes all count


def test_a_core_always_disturbed_gives_its_least_disturbed_times():
    ms, probes = (
        np.array([[3.0], [4.0], [5.0], [6.0]]) * [1, 2],
        np.array([[0.06, 0.05], [0.05, 0.05], [0.06, 0.07], [0.05, 0.04]])[:, [0, 1, 0]],
    )
    assert typical_parts([Passes(ms, probes)], 0.03) == pytest.approx([5.0, 10.0])  # the second and the fourth
    spike = Passes(np.array([[1.0, 2.0]] * 9 + [[100.0, 2.0]]), np.full((10, 3), 0.03))
    assert typical_parts([spike], 0.03) == pytest.approx([(9 + 1.5) / 10, 2.0])


def test_of_whole_passes_the_faster_half_of_each_build_counts():
    """A fast build among slow ones counts as they do, so that the mean does not depend on the number of builds."""
    slow, fast = np.arange(10.0, 18)[:, None], np.arange(8.0, 16)[::-1, None]
    passes = [Passes(ms, np.full((8, 2), 0.06), whole=True) for ms in (slow, fast, slow)]
    means = [10 + 1.5, 8 + 1.5, 10 + 1.5]
    assert typical_parts(passes, 0.03) == pytest.approx([np.mean(means)])
    assert all(one.seen(0.03).all() for one in passes) and Passes.joined(passes).whole
    outlier = Passes(np.full((8, 1), 100.0), np.full((8, 2), 0.06), whole=True)
    assert typical_parts([*passes, outlier], 0.03) == pytest.approx([np.mean([*means, 1.5 * 11.5])])
    assert typical_parts([replace(passes[0], whole=False)], 0.06) == pytest.approx([13.5])


def test_a_fast_network_is_warmed_up_for_a_time_not_for_a_pass(monkeypatch):
    """Each look at the clock takes a tick, so a pass takes four, and five with the look after it; 10 ms are 41 ticks.

    Building the network takes a second, which is no warm-up."""
    calls, ticks = [], itertools.count(0, 1 / 4096)
    net = SimpleNamespace(parts=lambda: [lambda x: calls.append(x)])
    net.eval = net.to = lambda *_: net
    monkeypatch.setattr(profiling, 'time', SimpleNamespace(perf_counter=partial(next, ticks)))
    bench = Bench(lambda: [net, list(itertools.islice(ticks, 4096))][0], 1, 8, torch.device('cpu'))
    assert [len(bench(2).parts), len(calls)] == [2, 9 + 2]
    assert [len(bench(2).parts), len(calls) - 11] == [2, 9 + 2]


def test_only_a_network_without_parts_on_a_cpu_is_timed_as_a_whole():
    for parts in (1, 2):
        net = SimpleNamespace(parts=lambda parts=parts: [lambda x: x] * parts)
        net.eval = net.to = lambda *_, net=net: net
        assert Bench(lambda net=net: net, 1, 8, torch.device('cpu'))(2).whole == (parts == 1)


def test_networks_take_turns_and_are_built_once_a_round():
    builds = [partial(build_network, reference_config(10, SMALL_SPACE), torch.device('cpu'), seed) for seed in (0, 1)]
    own, other = take_turns([Bench(build, 1, 32, torch.device('cpu')) for build in builds], random.Random(0))
    assert len(own) == len(other) == TURNS and {one.parts.shape[0] for one in own + other} == {profiling.PASSES}
    assert len({one.parts.shape[1] for one in own + other}) == 1 and min(one.parts.min() for one in own) > 0


def test_networks_on_a_gpu_are_rebuilt_each_round():
    bench = Bench(lambda: torch.nn.Identity(), 1, 32, torch.device('cuda'))
    bench.__dict__['parts'] = ['built in an earlier round']
    with bench_apart(bench) as again:
        assert 'parts' not in again.__dict__ and again.build is bench.build


def test_standard_error_by_leaving_rounds_out():
    generator, standard = np.random.default_rng(1), Standard(lambda: None, 5.0)

    def passes(ms):
        return [Passes(np.full((TOGETHER, 1), ms), np.ones((TOGETHER, 2)), whole=True)]

    rounds = [[Round(passes(ms), passes(4.0)) for ms in generator.normal(10, 0.5, 24)] for _ in range(400)]
    found = [summary_of(own, standard, 1.0) for own in rounds]
    assert np.mean([one.ms for one in found]) == pytest.approx(12.5, rel=0.003) and found[0].slowness == 4 / 5
    assert np.std([one.ms for one in found]) / 12.5 == pytest.approx(np.mean([one.error for one in found]), rel=0.1)
    assert summary_of(rounds[0][:1], standard, 1.0).error == float('inf')


def test_a_table_gives_a_standard_on_its_own_device_alone():
    cpu = Engine('torch', None, torch.device('cpu'))
    meta = {'device': device_name(cpu.device), 'batch_size': 2, 'threads': torch.get_num_threads(), 'reference_ms': 9.0}
    meta['reference'] = dump_config(reference_config(10, SMALL_SPACE))
    table = LatencyTable(1.0, {}, meta, 64)
    standard = standard_of(table, 2, cpu)
    assert standard.ms == 9.0 and standard.build().config == reference_config(10, SMALL_SPACE)
    assert standard_of(table, 1, cpu) is None
    for changed in (
        {'device': 'another'},
        {'batch_size': 1},
        {'threads': 77},
        {'runtime': 'openvino', 'provider': 'CPU'},
    ):
        assert standard_of(replace(table, meta=meta | changed), 2, cpu) is None
    assert standard_of(replace(table, meta=meta | {'threads': None}), 2, cpu) is None
    for bad in ('9', None, 0, -1.0, float('nan'), float('inf'), [9.0]):
        with pytest.raises(BadInput, match='reference_ms is .* should be a positive number'):
            standard_of(replace(table, meta=meta | {'reference_ms': bad}), 2, cpu)
    with pytest.raises(BadInput, match="the latency table's reference: not a JSON file"):
        standard_of(replace(table, meta=meta | {'reference': 'x'}), 2, cpu)
    for absent in ('reference', 'reference_ms'):
        assert standard_of(replace(table, meta={k: v for k, v in meta.items() if k != absent}), 2, cpu) is None


@pytest.mark.parametrize('space', [SPACE, SMALL_SPACE])
def test_the_reference_network_is_the_middle_of_the_space(space):
    table, config = make_table(space, 64), reference_config(10, space)
    depths = [len(specs) for specs in config.stages.values()]
    assert depths == [stage.exit_depths[len(stage.exit_depths) // 2] for stage in space.stages]
    seen = {(s.kernel_size, s.se_channels > 0) for specs in config.stages.values() for s in specs}
    assert seen == {(op.kernel, op.se) for op in space.ops}
    least, _, most = table.reach(space)
    assert least + (most - least) / 4 < table.of_config(config) < most - (most - least) / 4


def test_a_network_to_be_timed_is_noise_of_its_seed():
    config, cpu = random_config(random.Random(0), ends=True, num_classes=10, space=SPACE), torch.device('cpu')
    one, same, other = (build_network(config, cpu, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    for name, value in one.items():
        if name.endswith(('running_mean', 'running_var')):
            assert torch.equal(value, torch.full_like(value, float(name.endswith('var'))))
        elif value.is_floating_point():
            assert value.abs().max() <= 0.1 and not torch.equal(value, other[name])
            assert value.numel() < 500 or value.std() == pytest.approx(0.1 / 3**0.5, rel=0.1)


def test_blocks_are_timed_inside_their_network():
    config = random_config(random.Random(0), ends=True, num_classes=10, space=SPACE)
    cpu = torch.device('cpu')
    net, images = build_network(config, cpu, seed=0), torch.randn(1, 3, 64, 64)
    assert isinstance(net, NetworkEval) and not net.training and torch.isfinite(net(images)).all()
    x = images
    for part in net.parts():
        x = part(x)
    assert torch.equal(x, net(images))
    passes = Bench(partial(build_network, config, cpu, 0), 1, 64, cpu)(3)
    sample = sample_of(config, passes, 64, math.inf)  # all parts, however busy the core
    assert [(k, m) for k, m, _ in sample.blocks] == [(k, s.mid_channels) for _, s, k in config.table_keys(64)]
    parts = [sample.fixed, *(ms for _, _, ms in sample.blocks)]
    assert all(ms > 0 for ms in parts) and sample.total == pytest.approx(sum(parts))


def test_a_sample_has_the_parts_that_were_timed_undisturbed():
    config = random_config(random.Random(0), ends=True, num_classes=10, space=SPACE)
    keys = [(key, spec.mid_channels) for _, spec, key in config.table_keys(64)]
    count = len(keys) + 2
    parts = np.tile(np.arange(1.0, count + 1), (3, 1))
    probes = np.full((3, count + 1), 0.03)
    probes[:2, 2:4] = 0.05  # in two of three passes, the probes around the second block and beside its neighbours
    sample = sample_of(config, Passes(parts, probes), 64, 0.03)
    seen = [(*key, ms) for key, ms in zip(keys, np.arange(2.0, count), strict=True) if ms not in (2, 3, 4)]
    assert sample == Sample(1.0 + count, seen) and sample.total == parts[0].sum() - 2 - 3 - 4
    curves = {key: np.full(2000, 10.0) for key, _ in keys}
    assert sample.predicted(0.5, curves) == pytest.approx(0.5 + 10 * len(seen))
    probes[:, 0] = 0.05  # before the stem
    sample = sample_of(config, Passes(parts, probes), 64, 0.03)
    assert math.isnan(sample.fixed) and sample.total == parts[0].sum() - 2 - 3 - 4 - 1 - count
    assert sample.predicted(0.5, curves) == pytest.approx(10 * len(seen))
    assert len(sample_of(config, Passes(parts, probes), 64, math.inf).blocks) == len(keys)


def test_processors_of_one_name_are_distinguished(monkeypatch):
    text = 'processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\nflags\t\t: a : b\n'
    monkeypatch.setattr(Path, 'read_text', lambda self: f'{text}\n{text.replace("17", "18")}')
    assert device_name(torch.device('cpu')) == 'AMD EPYC, family 25, model 17'
    monkeypatch.setattr(Path, 'read_text', lambda self: 'model name : Some ARM\n')
    assert device_name(torch.device('cpu')) == 'Some ARM'
    monkeypatch.setattr(Path, 'read_text', lambda self: 'Features : fp\n')
    assert device_name(torch.device('cpu')) in (platform.processor(), platform.machine())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
def test_parts_of_a_network_on_a_gpu_add_up_to_its_whole():
    gpu, config = torch.device('cuda'), random_config(random.Random(0), ends=True, num_classes=10, space=SPACE)
    build = partial(build_network, config, gpu, 0)
    passes = Bench(build, 8, 64, gpu, by_part=True)(8)
    whole = Bench(build, 8, 64, gpu)(8)
    assert whole.parts.shape == (8, 1) and not passes.probes.any()
    sample = sample_of(config, passes, 64, 0.0)
    assert sample.total == pytest.approx(measure_latency(build, 8, 64, gpu).ms, rel=0.3) and sample.total > 0


def test_random_networks_reach_both_ends_of_widths():
    rng, seen = random.Random(0), {}
    for _ in range(200):
        for _, spec, key in random_config(rng, ends=True, num_classes=10, space=SPACE).table_keys(224):
            seen.setdefault(key, set()).add(spec.mid_channels)
    ranges = SPACE.table_widths(224)
    assert seen.keys() == ranges.keys()
    ends = [(min(seen[k]) == low) + (max(seen[k]) == high) for k, (low, high) in ranges.items()]
    assert np.mean(ends) > 1.5
