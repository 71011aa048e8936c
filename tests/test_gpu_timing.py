"""Timings of a GPU that waits for its host, by a simulated GPU; and on a real one."""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import SMALL_SPACE
from latency_pkl import timing as profiling
from latency_pkl.sampling import build_network, launch_of, reference_config, tf32_of
from latency_pkl.timing import (
    MARGIN,
    PASSES,
    QUEUED,
    SPIN,
    TRIES,
    WAITED,
    WARM_UP,
    Bench,
    Clock,
    Measured,
    Passes,
    Queue,
    Standard,
    host_note,
    host_ratio,
    host_report,
    measure_latency,
    spin,
    summary_of,
    typical_parts,
    undisturbed_share,
)
from models.latency import LatencyTable
from tools.errors import BadInput

CUDA = torch.device('cuda')
SPIN_MS = 0.25
"""Time of one spin of the simulated GPU."""


class SimulatedGpu:
    """A GPU and its host, each with a clock in ms.

    Args:
        launch_ms: time of the host for each launch; a function of the number of kernels launched so far.
        most_pending: launches that the GPU takes before it has computed the first; the host then waits.
    """

    def __init__(self, launch_ms, most_pending=1000):
        self.launch_ms, self.most_pending = launch_ms, most_pending
        self.host = 0.0
        self.free_at, self.log, self.ends, self.kernels = 0.0, [], [], 0

    def launch(self, ms, by_host=0.001):
        """Enqueue work of `ms`; return when the GPU ends it."""
        if len(self.ends) >= self.most_pending:
            self.host = max(self.host, self.ends[-self.most_pending])
        self.host += by_host
        self.free_at = max(self.free_at, self.host) + ms
        self.ends.append(self.free_at)
        return self.free_at

    def sleep(self, cycles):
        self.log.append(('sleep', cycles // SPIN))
        self.launch(cycles / SPIN * SPIN_MS)

    def part(self, ms, x):
        self.log.append('part')
        self.launch(ms, self.launch_ms(self.kernels))
        self.kernels += 1
        return x

    def synchronize(self, device):
        assert device == CUDA
        self.host = max(self.host, self.free_at)
        self.log.append('wait')

    def event(self, enable_timing):
        assert enable_timing
        return SimulatedEvent(self)

    def bench(self, parts, launch, passes=PASSES):
        """Time a network with parts of some ms; return its passes, and the log of the passes that follow the eager."""
        bench = Bench(lambda: None, 1, 32, CUDA, launch=launch)
        bench.__dict__.update(parts=[partial(self.part, ms) for ms in parts], images='images')
        timed = bench(passes)
        eager = (1 + 2 * len(parts)) * (WARM_UP - 2 + passes)  # a bench with parts warms up once
        assert 'wait' not in self.log[:eager] and self.log[eager] == 'wait'
        return timed, self.log[eager + 1 :]


class SimulatedEvent:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self, stream):
        assert stream == 'stream'
        self.gpu.log.append('event')
        self.at = self.gpu.launch(0.0)

    def query(self):
        return self.gpu.host >= self.at

    def elapsed_time(self, other):
        assert self.gpu.host >= other.at, 'the event has not been waited for'
        return other.at - self.at


@pytest.fixture
def simulated(monkeypatch):
    """Make a simulated GPU that torch and the clock use."""

    def make(launch_ms, **others):
        gpu = SimulatedGpu(launch_ms if callable(launch_ms) else lambda kernels: launch_ms, **others)
        monkeypatch.setattr(torch.cuda, '_sleep', gpu.sleep)
        monkeypatch.setattr(torch.cuda, 'Event', gpu.event)
        monkeypatch.setattr(torch.cuda, 'synchronize', gpu.synchronize)
        monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: 'stream')
        monkeypatch.setattr(profiling, 'time', SimpleNamespace(perf_counter=lambda: gpu.host / 1000))
        return gpu

    return make


def test_queued_parts_take_the_time_of_the_gpu_and_eager_ones_that_of_the_host(simulated):
    """Three launches of 1 ms, whose kernels take 0.1, 0.2 and 0.4 ms."""
    parts = [0.1, 0.2, 0.4]
    queued, _ = simulated(1.0).bench(parts, 'queued')
    assert queued.parts == pytest.approx(np.array([parts] * PASSES)) and (queued.probes == QUEUED).all()
    eager, _ = simulated(1.0).bench(parts, 'eager')
    assert eager.parts.sum(axis=1) == pytest.approx(np.full(PASSES, 3.0), rel=0.01)
    assert not eager.probes.any() and eager.parts.shape == (PASSES, 3)
    for one in (queued, eager):
        assert one.host == pytest.approx(np.full(PASSES, 3.0 / 0.7), rel=0.01)
        assert undisturbed_share([one]) == 1
    assert typical_parts([queued], QUEUED) == pytest.approx(parts)


def test_a_network_that_computes_longer_than_it_is_launched_takes_the_same_time_both_ways(simulated):
    for launch in ('queued', 'eager'):
        timed, _ = simulated(0.05).bench([1.0, 2.0], launch)
        assert timed.parts == pytest.approx(np.array([[1.0, 2.0]] * PASSES)) and timed.host == pytest.approx(1.0)


def test_a_pass_is_enqueued_behind_a_sleep_as_long_as_the_host_needs(simulated):
    timed, log = simulated(1.0).bench([0.1, 0.2], 'queued')
    marks = ['event', 'part', 'event', 'part', 'event']
    needed = math.ceil(MARGIN * 2.004 / SPIN_MS)  # two launches of 1 ms
    calibration = [('sleep', 1), 'event', ('sleep', 4), 'event', 'wait']
    trial, held = ['wait', ('sleep', 0), *marks], ['wait', ('sleep', needed), *marks]
    assert log == calibration + trial + held * PASSES + ['wait']
    assert timed.parts.shape == (PASSES, 2)


def test_sleeps_are_lengthened_until_a_pass_is_enqueued_in_time(simulated):
    """The host is ten times as slow from its third launch behind a sleep on, but was fast when it was measured."""
    gpu = simulated(lambda kernels: 1.0 if kernels < 2 else 10.0)
    queue = Queue(Clock(CUDA))
    gpu.log.clear()

    def run():
        marks = Clock(CUDA).marks()
        for _ in range(2):
            gpu.part(0.1, None)
        return marks + Clock(CUDA).marks()

    marks, held = queue(run)
    sleeps = [one[1] for one in gpu.log if one[0] == 'sleep']
    first = math.ceil(MARGIN * 2.003 / SPIN_MS)
    assert held and sleeps[:2] == [0, first] and gpu.log.count('event') == 2 * len(sleeps)
    assert sleeps[2] * SPIN_MS == pytest.approx(MARGIN * 20, abs=2 * SPIN_MS) and len(sleeps) == 3
    gpu.synchronize(CUDA)
    assert marks[0].elapsed_time(marks[1]) == pytest.approx(0.2)
    assert queue(run)[1] and gpu.log.count(('sleep', sleeps[2])) == 2  # the length is kept


def test_a_pass_that_never_is_in_time_is_given_up_and_does_not_count(simulated):
    """A GPU that takes few launches at a time lets the host wait until it has started, whatever the sleep."""
    timed, log = simulated(1.0, most_pending=4).bench([0.1, 0.2, 0.4], 'queued', passes=2)
    assert timed.parts.shape == (2, 3) and np.isnan(timed.host).all() and (timed.probes == WAITED).all()
    sleeps = [one[1] for one in log[5:] if one[0] == 'sleep']
    assert len(sleeps) == 2 * TRIES and sleeps[TRIES] == 0  # the second pass starts over
    assert all(b >= 2 * a for a, b in zip(sleeps[1 : TRIES - 1], sleeps[2:TRIES], strict=True))
    assert undisturbed_share([timed]) == 0 and math.isnan(host_ratio([timed]))
    good = Passes(np.full((2, 3), 5.0), np.full((2, 4), QUEUED), np.full(2, 1.5))
    assert typical_parts([timed, good], QUEUED) == pytest.approx([5.0] * 3)
    assert undisturbed_share([timed, good]) == 0.5 and host_ratio([timed, good]) == 1.5


def test_without_sleep_a_gpu_multiplies(monkeypatch):
    products = []
    monkeypatch.delattr(torch.cuda, '_sleep')
    monkeypatch.setattr(torch, 'mm', lambda a, b: products.append(a.shape))
    spin(3, torch.device('cpu'))
    assert products == [(2048, 2048)] * 3


def test_networks_bound_by_their_host_are_reported():
    assert host_report([1.0, 1.05, 1.3, 2.5], 'queued', 1.0) == (
        'Timed queued; bound by the host: 50 % of 4 networks; eager over queued time: 1.18 (median), 2.50 (most)'
    )
    first, second = host_report([1.0, math.nan, 1.2], 'queued', 0.75).splitlines()
    assert '50 % of 2 networks' in first
    assert second.startswith(f'The host was too slow to queue 25.0 % of passes within {TRIES} tries; these count only')
    assert host_report([math.nan], 'eager', 0.0) == 'Timed eager; bound by the host: unknown, no pass could be queued'
    assert host_note(Measured(1.0, 0.1), 'eager') == ''
    assert host_note(Measured(1.0, 0.1, host=1.05), 'queued') == ', queued'
    note = host_note(Measured(1.0, 0.1, host=1.5), 'eager')
    assert note == ', eager (bound by the host: eager over queued time is 1.50)'
    assert 'in vain' in host_note(Measured(1.0, 0.1, host=math.nan), 'queued')
    assert host_note(Measured(1.0, 0.1, host=math.nan), 'eager') == ', eager'


def test_a_latency_has_the_ratio_of_its_network_alone(simulated):
    own, of_standard = (simulated(1.0).bench([0.1, ms], 'queued')[0] for ms in (0.4, 0.9))
    rounds = [profiling.Round([own, own], [of_standard])] * 2
    measured = summary_of(rounds, None, QUEUED)
    assert measured.ms == pytest.approx(0.5) and measured.host == pytest.approx(2.0 / 0.5, rel=0.01)
    on_cpu = Passes(np.ones((2, 1)), np.ones((2, 2)))
    assert summary_of([profiling.Round([on_cpu], [])], None, 1.0).host is None


@pytest.mark.parametrize(('launch', 'ms'), [('queued', 0.5), ('eager', 2.0)])
def test_a_whole_network_is_measured_as_asked(launch, ms, simulated, monkeypatch):
    gpu = simulated(1.0)
    monkeypatch.setattr(Bench, 'parts', [partial(gpu.part, 0.1), partial(gpu.part, 0.4)])
    monkeypatch.setattr(Bench, 'images', 'images')
    measured = measure_latency(lambda: None, 1, 32, CUDA, rounds=2, launch=launch)
    assert measured.ms == pytest.approx(ms, rel=0.01) and measured.host == pytest.approx(2.0 / 0.5, rel=0.01)
    beside = measure_latency(lambda: None, 1, 32, CUDA, Standard(lambda: None, 8.0), rounds=2, launch=launch)
    assert beside.ms == pytest.approx(8.0) and beside.slowness == pytest.approx(ms / 8, rel=0.01)


def test_a_table_gives_the_launch_on_a_gpu_alone():
    def launch(device, **meta):
        return launch_of(LatencyTable(1.0, {}, meta, 32), torch.device(device))

    assert launch('cuda', launch='queued') == 'queued' and launch('cuda', launch='eager') == 'eager'
    assert launch('cuda') == 'eager' and launch('cpu', launch='queued') == 'eager'
    for bad in ('graph', None, 1, ['queued']):
        with pytest.raises(BadInput, match='launch is .*, should be queued or eager'):
            launch('cuda', launch=bad)


def test_a_table_gives_the_precision_of_timings():
    def precision(**meta):
        return tf32_of(LatencyTable(1.0, {}, meta, 32))

    assert precision(tf32=True) and precision() and not precision(tf32=False)
    for bad in ('yes', 1, None):
        with pytest.raises(BadInput, match='tf32 is .*, should be True or False'):
            precision(tf32=bad)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
def test_a_tiny_network_is_not_faster_eagerly_than_queued():
    build = partial(build_network, reference_config(10, SMALL_SPACE), CUDA, 0)
    queued, eager = (measure_latency(build, 1, 32, CUDA, rounds=4, launch=launch) for launch in ('queued', 'eager'))
    assert 0 < queued.ms <= 1.1 * eager.ms
    assert not math.isnan(queued.host) and queued.host > 0.9
    passes = Bench(build, 1, 32, CUDA, by_part=True, launch='queued')(8)
    assert passes.parts.shape == (8, len(build().parts())) and undisturbed_share([passes]) > 0.5
