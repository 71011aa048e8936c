"""Latencies of networks, measured on contended machines too. See docs/latency.md."""

import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain, pairwise

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from latency_pkl.isolation import FreshProcess

ROUNDS = 24
"""Times that a network is built and timed for one latency; up to twice as many on a noisy machine."""

TURNS, ABREAST = 4, 10
"""Turns of a network in a round, and networks that alternate with one standard. Few turns in many rounds: a network's
time differs more between memory layouts than between turns."""

PRECISION = 0.005
"""Standard error of a latency, as a share of it, at which timing ends."""

GROUPS = 6
"""Groups of rounds for the jackknife."""

WARM_UP, WARM_AGAIN, PASSES = 3, 1, 2
"""Passes of a turn: to warm up a new network, to warm up again after the turns of others, and timed ones."""

WARM_SECONDS = 0.01
"""Least duration of a warm-up on a CPU. After another process, a network of under 1 ms needs more than one pass."""

TOGETHER = TURNS * PASSES
"""Passes of a network in a round."""

PROBE = range(2000)
"""Probe that detects a contended core, by the time of its sum: 0.03 ms that need neither caches nor memory."""

PART_PASSES = 20
"""Passes of a network whose parts are timed for the report."""

UNDISTURBED = 1.25
"""Largest probe time on an undisturbed core, over that of the fastest probes. A neighbour on the core's other thread
doubles it; clock rates differ by less."""

OUTLIER = 1.5
"""Upper bound on a timing in a mean, over the median of its part. A mean does not depend on the number of timings, a
median of skewed ones does."""

LEAST_UNDISTURBED = 2
"""Undisturbed timings that a part of a sample needs. If a part of a whole latency has fewer, as many of its least
disturbed timings count."""

FITS = 3
"""Standard errors up to which two timings agree."""

ERRORS = (0.003, 0.1)
"""Bounds on the standard error of a timing in a pool. Networks of one architecture differ by about 0.3 %."""

UNCONFIRMED = 0.02
"""Standard error of a single timing, which may be an outlier."""

REPORTED_CHANGE = 0.01
"""Report speed changes above this fraction."""

LAUNCHES = ('queued', 'eager')
"""Ways to time a GPU: each pass enqueued before the GPU starts it (its own time), or run as the host launches it."""

HOST_BOUND = 1.1
"""Eager over queued time above which a network is bound by its host."""

TRIES, MARGIN = 6, 1.5
"""Tries to queue a pass, the first to measure the host, and the sleep over the time that the host took."""

QUEUED, WAITED = 1.0, 2.0
"""In place of probes: a GPU did not wait for its host in a pass, or did although the pass was to be queued."""

SPIN, TIMED_SPINS = 500_000, 4
"""Clock cycles of one spin, about 0.3 ms, and spins whose mean time is measured."""


@dataclass(frozen=True)
class Standard:
    """Reference network; re-timing it gives the machine's slowdown."""

    build: Callable[[], nn.Module]
    ms: float
    """Its latency when it was timed first."""


@dataclass(frozen=True)
class Measured:
    """A latency."""

    ms: float
    """With a standard: at the machine's speed when the standard was timed first."""
    error: float
    """Standard error, as a share of the latency."""
    slowness: float | None = None
    """Time of the standard now over then; None without a standard."""
    host: float | None = None
    """Eager over queued time on a GPU, nan if no pass could be queued; None on a CPU."""
    parts: tuple[float, ...] = ()
    """Share of the latency in ms of each part of the network, see `Bench.parts`."""

    @property
    def reference(self) -> str:
        """What the latency is relative to, in words."""
        return 'by the clock alone' if self.slowness is None else 'relative to the reference network of the table'

    def __str__(self) -> str:
        if self.slowness is None or abs(self.slowness - 1) < REPORTED_CHANGE:
            return f'{self.ms:.4f} ms'
        return (
            f'{self.ms:.4f} ms ({self.ms * self.slowness:.4f} by the clock, '
            f'the machine being {self.slowness:.2f} times as slow as when its table was made)'
        )


@dataclass(frozen=True)
class Passes:
    """Timed passes of one network."""

    parts: np.ndarray
    """ms, [passes, parts]"""
    probes: np.ndarray
    """ms of a probe before the first part and after each, [passes, parts + 1]. 0 on a GPU, which has no probes, but
    `QUEUED` for queued passes and `WAITED` for those in which it waited for its host, a disturbance too."""
    host: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """Eager over queued time on a GPU, [passes]; nan if the pass could not be queued. Empty on a CPU."""
    whole: bool = False
    """Whether the only part is a whole network on a CPU."""

    @classmethod
    def joined(cls, passes: Iterable['Passes']) -> 'Passes':
        """Join passes of one network from several times."""
        parts, probes, host, whole = zip(*((one.parts, one.probes, one.host, one.whole) for one in passes), strict=True)
        return cls(*map(np.concatenate, (parts, probes, host)), whole=whole[0])

    @property
    def beside(self) -> np.ndarray:
        """Slower of the two probes beside each part, [passes, parts]."""
        return np.maximum(self.probes[:, :-1], self.probes[:, 1:])

    def seen(self, fastest: float) -> np.ndarray:
        """Return which parts have `LEAST_UNDISTURBED` timings on an undisturbed core, bool [parts].

        Whole networks always count.
        """
        return self.whole | ((self.beside <= UNDISTURBED * fastest).sum(axis=0) >= LEAST_UNDISTURBED)


def fastest_probe(passes: Iterable[Passes]) -> float:
    """Return the time of a probe on an undisturbed core, ms: a low quantile, since the very fastest are exceptions."""
    return float(np.quantile(np.concatenate([one.probes.ravel() for one in passes]), 0.02))


def undisturbed_share(passes: Sequence[Passes]) -> float:
    """Return the share of the parts' timings on an undisturbed core, or on a GPU that did not wait for its host."""
    fastest = QUEUED if any(len(one.host) for one in passes) else fastest_probe(passes)
    return float(np.mean(np.concatenate([one.beside.ravel() for one in passes]) <= UNDISTURBED * fastest))


def host_ratio(passes: Iterable[Passes]) -> float | None:
    """Return the median of a network's eager over queued times; nan if no pass could be queued, None on a CPU."""
    host = np.concatenate([one.host for one in passes])
    known = host[~np.isnan(host)]
    return float(np.median(known)) if len(known) else math.nan if len(host) else None


def host_note(measured: Measured, launch: str) -> str:
    """Return how a latency was timed on a GPU, and whether the host bounds the network; '' on a CPU."""
    if measured.host is None:
        return ''
    bound = ''
    if measured.host > HOST_BOUND:
        bound = f' (bound by the host: eager over queued time is {measured.host:.2f})'
    if launch == 'queued' and math.isnan(measured.host):
        bound = ' in vain (the GPU waited for the host in all passes)'
    return f', {launch}{bound}'


def host_report(ratios: Iterable[float], launch: str, queued: float) -> str:
    """Return what a GPU's host does to some networks, in one or two lines.

    Args:
        ratios: the `host_ratio` of each network.
        launch: how their latencies were timed, one of `LAUNCHES`.
        queued: their `undisturbed_share`.
    """
    known = np.array([ratio for ratio in ratios if not math.isnan(ratio)])
    lines = [f'Timed {launch}; bound by the host: unknown, no pass could be queued']
    if len(known):
        bound = 100 * np.mean(known > HOST_BOUND)
        lines = [
            f'Timed {launch}; bound by the host: {bound:.0f} % of {len(known)} networks; '
            f'eager over queued time: {np.median(known):.2f} (median), {known.max():.2f} (most)'
        ]
    if launch == 'queued' and queued < 1:
        lines.append(
            f'The host was too slow to queue {100 * (1 - queued):.1f} % of passes within {TRIES} tries; '
            'these count only if others are too few'
        )
    return '\n'.join(lines)


def typical_parts(passes: Sequence[Passes], fastest: float) -> np.ndarray:
    """Return the mean time of each part on an undisturbed core, ms [parts]; timings are bounded by `OUTLIER`.

    A contended core is slower by a third to a half, for milliseconds or minutes. A part between two undisturbed probes
    was hardly disturbed. Whole passes on a busy machine nearly always are. So the mean of whole
    networks is that of the faster half of every `TOGETHER` passes, which are those of one build. The faster half of all
    passes would be those of the faster builds, and the faster, the more builds there are.

    Args:
        fastest: the `fastest_probe` of all passes that are to be compared, ms.
    """
    joined = Passes.joined(passes)
    ms, beside = joined.parts, joined.beside
    if joined.whole:
        groups = np.array_split(ms, math.ceil(len(ms) / TOGETHER))
        halves = np.array([np.sort(group, axis=0)[: (len(group) + 1) // 2].mean(axis=0) for group in groups])
        return np.minimum(halves, OUTLIER * np.median(halves, axis=0)).mean(axis=0)
    least = np.sort(beside, axis=0)[min(LEAST_UNDISTURBED, len(beside)) - 1]
    kept = np.where(beside <= np.maximum(UNDISTURBED * fastest, least), ms, np.nan)
    return np.nanmean(np.minimum(kept, OUTLIER * np.nanmedian(kept, axis=0)), axis=0)


@dataclass
class Bench:
    """A network that is built at the first call, and timed for some passes at each call.

    Args:
        by_part: time each part. Always so on a CPU; on a GPU the events take time themselves.
        launch: which times of a GPU count, one of `LAUNCHES`. A CPU has no such difference.
    """

    build: Callable[[], nn.Module]
    batch_size: int
    img_size: int
    device: torch.device
    by_part: bool = False
    launch: str = 'eager'

    @cached_property
    def parts(self) -> list[Callable[[Tensor], Tensor]]:
        """Timed parts in their order: those of the network's method `parts`, or the whole network."""
        net = self.build().eval().to(self.device)
        return net.parts() if self.by_part or self.device.type == 'cpu' else [net]

    @cached_property
    def images(self) -> Tensor:
        """Input, [N, 3, H, W]."""
        return torch.randn(self.batch_size, 3, self.img_size, self.img_size, device=self.device)

    @cached_property
    def queue(self) -> 'Queue':
        """Queue of a GPU, calibrated for this network."""
        return Queue(Clock(self.device))

    def __call__(self, passes: int = PASSES) -> Passes:
        """Warm up, then time some passes. On a GPU all are launched before one wait, then as many are queued."""
        warm_up = WARM_AGAIN if 'parts' in self.__dict__ else WARM_UP
        clock = Clock(self.device)
        _ = self.parts, self.images  # built before the warm-up is timed
        with torch.inference_mode():
            start, warm = time.perf_counter(), 0
            while warm < warm_up or clock.probes and time.perf_counter() - start < WARM_SECONDS:
                self._run(clock)
                warm += 1
            timed = clock.passes([self._run(clock) for _ in range(passes)])
            if clock.probes:
                return replace(timed, whole=len(self.parts) == 1)
            return self._with_queued(timed, clock)

    def _with_queued(self, eager: Passes, clock: 'Clock') -> Passes:
        """Queue as many passes; return the times of `launch`, with the ratios of both."""
        marks, held = zip(*(self.queue(partial(self._run, clock)) for _ in eager.parts), strict=True)
        queued = clock.passes(marks)
        host = np.where(held, eager.parts.sum(axis=1) / queued.parts.sum(axis=1), math.nan)
        if self.launch == 'eager':
            return replace(eager, host=host)
        return Passes(queued.parts, np.where(held, QUEUED, WAITED)[:, None] + queued.probes, host)

    def _run(self, clock: 'Clock') -> list:
        """Return the marks of one pass: before and after each part, with a probe between them on a CPU."""
        x, marks = self.images, clock.marks()
        for part in self.parts:
            x = part(x)
            marks += clock.marks()
        return marks


def bench_apart(bench: Bench) -> AbstractContextManager[Callable[..., Passes]]:
    """Return a bench that has built nothing yet: on a CPU in a new process, for a GPU a copy in this one.

    In a process that has built other networks before, the same network can be a quarter slower on a CPU.
    """
    return FreshProcess(bench) if bench.device.type == 'cpu' else nullcontext(replace(bench))


@dataclass(frozen=True)
class Round:
    """Alternating passes of a network and of the standard."""

    own: list[Passes]
    standard: list[Passes]


def measure_latency(
    build: Callable[[], nn.Module],
    batch_size: int,
    img_size: int,
    device: torch.device,
    standard: Standard | None = None,
    rounds: int = ROUNDS,
    launch: str = 'eager',
) -> Measured:
    """Measure the latency of one forward pass of the network that `build()` returns: `measure_in_turns` of one."""
    return measure_in_turns([build], batch_size, img_size, device, standard, rounds, launch)[0][0]


def measure_in_turns(
    builds: Sequence[Callable[[], nn.Module]],
    batch_size: int,
    img_size: int,
    device: torch.device,
    standard: Standard | None = None,
    rounds: int = ROUNDS,
    launch: str = 'eager',
) -> tuple[list[Measured], float]:
    """Measure the latency of one forward pass of each network. Shows a progress bar on a terminal.

    In each round, every network is rebuilt, and some networks alternate in turns of a few passes, so that a slowdown
    affects all of them. A standard alternates with them: a slowdown that lasts affects both, and their ratio is steady.
    With a standard, networks whose standard errors are above `PRECISION` get up to twice as many rounds.

    Args:
        launch: which times of a GPU count, one of `LAUNCHES`; those of the standard too.

    Returns:
        The latency of each network, and the `undisturbed_share` of timings.
    """
    kept: list[list[Round]] = [[] for _ in builds]
    benches = [Bench(build, batch_size, img_size, device, launch=launch) for build in builds]
    beside = [Bench(standard.build, batch_size, img_size, device, launch=launch)] if standard else []
    times = math.isqrt(
        min(len(builds), ABREAST)
    )  # many networks are compared with the standard, so its own noise matters more
    order, measured = random.Random(0), []
    with tqdm(total=rounds, unit='round', desc='timing networks', leave=False, disable=None) as bar:
        for number in range(2 * rounds):
            due = [i for i in range(len(builds)) if number < rounds or measured[i].error > PRECISION]
            if not due or number >= rounds and not standard:
                break
            order.shuffle(due)
            for group in (due[i : i + ABREAST] for i in range(0, len(due), ABREAST)):
                passes = take_turns([*(benches[i] for i in group), *beside * times], order)
                of_standard = list(chain.from_iterable(passes[len(group) :]))
                for i, own in zip(group, passes, strict=False):
                    kept[i].append(Round(own, of_standard))
            everything = [one for own in kept for part in own for one in (*part.own, *part.standard)]
            fastest = fastest_probe(everything)
            measured = [summary_of(own, standard, fastest) for own in kept]
            bar.total = max(rounds, number + 1)
            bar.update()
    return measured, undisturbed_share(everything)


def take_turns(benches: Sequence[Bench], order: random.Random) -> list[list[Passes]]:
    """Rebuild all networks, and return their passes, timed in alternating turns."""
    with ExitStack() as stack:
        calls = [stack.enter_context(bench_apart(bench)) for bench in benches]
        passes: list[list[Passes]] = [[] for _ in calls]
        for _ in range(TURNS):
            for i in order.sample(range(len(calls)), len(calls)):
                passes[i].append(calls[i](PASSES))
    return passes


def summary_of(rounds: Sequence[Round], standard: Standard | None, fastest: float) -> Measured:
    """Return the latency from some rounds, with the standard error of a jackknife (Tukey 1958)."""

    def total(passes: Iterable[list[Passes]]) -> float:
        return float(typical_parts([one for some in passes for one in some], fastest).sum())

    def latency(some: Sequence[Round]) -> float:
        own = total(one.own for one in some)
        return own / total(one.standard for one in some) * standard.ms if standard else own

    ms, groups = latency(rounds), min(GROUPS, len(rounds)) if len(rounds) > 1 else 0
    without = [latency([one for i, one in enumerate(rounds) if i % groups != left]) for left in range(groups)]
    error = math.sqrt((groups - 1) * np.var(without)) / ms if without else math.inf
    slowness = total(one.standard for one in rounds) / standard.ms if standard else None
    parts = typical_parts([passes for one in rounds for passes in one.own], fastest)
    parts = tuple((ms / parts.sum() * parts).tolist())
    return Measured(ms, error, slowness, host_ratio(passes for one in rounds for passes in one.own), parts)


@dataclass(frozen=True)
class Pool:
    """Timings of networks that should take equally long relative to their predictions."""

    ratio: float
    """Measured over predicted latency."""
    error: float
    """Its standard error, as a share; `UNCONFIRMED` for a single timing."""
    fits: np.ndarray
    """Which timings the ratio is the mean of, [timings]; False for outliers."""


def pool_timings(timings: Sequence[tuple[float, Measured]]) -> Pool:
    """Pool timings by their standard errors, without outliers: those that agree with less than half of the others.

    Two timings that differ are both outliers until a third one decides; without any that fits, the ratio is the mean
    of all.

    Args:
        timings: (predicted latency, measured latency).
    """
    ratios = np.array([measured.ms / predicted for predicted, measured in timings])
    errors = np.clip([measured.error for _, measured in timings], *ERRORS)
    variances = (errors * ratios) ** 2
    agree = (ratios[:, None] - ratios) ** 2 <= FITS**2 * (variances[:, None] + variances)
    fits = agree.sum(axis=1) - 1 >= (len(timings) - 1) / 2
    weights = np.where(fits if fits.any() else True, errors**-2, 0.0)
    ratio = np.average(ratios, weights=weights)
    spread = np.sqrt(np.average((ratios / ratio - 1) ** 2, weights=weights) / max(np.sum(weights > 0) - 1, 1))
    error = max(weights.sum() ** -0.5, spread) if np.sum(weights > 0) > 1 else UNCONFIRMED
    return Pool(float(ratio), float(error), fits)


class Clock:
    """Marks points in time: by the processor's clock with a probe on a CPU, by events on a GPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self.probes = device.type != 'cuda'

    def marks(self) -> list:
        """Mark one point in time; on a CPU two, before and after a probe."""
        if self.probes:
            before = time.perf_counter()
            sum(PROBE)
            return [before, time.perf_counter()]
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return [event]

    def wait(self) -> None:
        """Wait until all marks have been passed."""
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)

    def passes(self, marks: Sequence[list]) -> Passes:
        """Return the times between the marks of each pass."""
        self.wait()
        if not self.probes:
            parts = np.array([[a.elapsed_time(b) for a, b in pairwise(run)] for run in marks])
            return Passes(parts, np.zeros((len(parts), parts.shape[1] + 1)))
        spans = 1000 * np.diff(np.array(marks))
        return Passes(spans[:, 1::2], spans[:, 0::2])


def spin(count: int, device: torch.device) -> None:
    """Keep a GPU busy for a time in proportion to `count`."""
    if hasattr(torch.cuda, '_sleep'):
        torch.cuda._sleep(count * SPIN)
        return
    x = torch.ones(2048, 2048, device=device)
    for _ in range(count):
        torch.mm(x, x)


class Queue:
    """Lets a GPU spin until the host has enqueued a whole pass. So its parts run back to back, in the GPU's own time.

    The spin is as long as the host takes for a pass, with a margin, and longer if the GPU was still too early.
    """

    def __init__(self, clock: 'Clock'):
        self.clock, self.spins = clock, 0
        spin(1, clock.device)  # loads the kernel
        before = clock.marks()
        spin(TIMED_SPINS, clock.device)
        self.spin_ms = clock.passes([before + clock.marks()]).parts.item() / TIMED_SPINS

    def __call__(self, run: Callable[[], list]) -> tuple[list, bool]:
        """Return the marks of a pass, and whether the GPU had not started it when the host had enqueued all of it."""
        for _ in range(TRIES):
            self.clock.wait()
            start = time.perf_counter()
            spin(self.spins, self.clock.device)
            marks = run()
            if not marks[0].query():
                return marks, True
            host_ms = 1000 * (time.perf_counter() - start)
            self.spins = max(2 * self.spins, math.ceil(MARGIN * host_ms / self.spin_ms))
        self.spins = 0  # the next pass starts over: one slow moment of the host must not lengthen all later spins
        return marks, False
