"""How long a network takes."""

import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, pairwise

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from latency_pkl.isolation import FreshProcess
from tools.environment import device_name
from tools.run.folder import RunLogger

ROUNDS = 24
"""Times that a network is built anew and timed for one latency; up to twice as many where the machine is noisy."""


TURNS, ABREAST = 4, 10
"""Turns that networks take in a round, and how many take turns beside the standard. Few turns in many rounds: a network
differs more from one layout of its memory to another than from turn to turn."""


PRECISION = 0.005
"""Standard error of a latency by a standard, as a share of it, at which no more timings are made."""


GROUPS = 6
"""Groups of rounds, of which each is left out once for a standard error."""


WARM_UP, WARM_AGAIN, PASSES = 3, 1, 2
"""Passes of a network just built to warm up, of one that others had a turn after, and timed ones of a turn."""


PROBE = range(2000)
"""Summed, it tells how fast a core is: some 0.03 ms of work that needs neither caches nor memory."""


UNDISTURBED = 1.25
"""Time of a probe over that of the fastest ones up to which a core is taken to be undisturbed. A neighbour on
the core's other thread doubles it; clock rates differ by less."""


OUTLIER = 1.5
"""Most that a timing counts, over the median of its part. Means do not depend on how many there are, unlike medians."""


LEAST_UNDISTURBED = 2
"""Undisturbed timings that a part needs to be known. A latency of the whole counts as many of the least disturbed ones
where there are fewer."""


FITS = 3
"""Standard errors up to which two timings agree."""


ERRORS = (0.003, 0.1)
"""Least and most standard error of a timing in a pool. Two networks of one architecture differ by some 0.3 %."""


UNCONFIRMED = 0.02
"""Standard error of a network that was timed once, for its timing may be an outlier."""


WORTH_SAYING = 0.01
"""Change of the machine's speed that is said."""


@dataclass(frozen=True)
class Standard:
    """A network whose time is known: what the machine is slower by now than it was then, is told by timing it again."""

    build: Callable[[], nn.Module]
    ms: float


@dataclass(frozen=True)
class Measured:
    """A latency in ms, and its standard error as a share of it. By a standard: at the speed that the machine had when
    the standard was timed first, and how many times as slow it is now."""

    ms: float
    error: float
    slowness: float | None = None

    def __str__(self) -> str:
        if self.slowness is None or abs(self.slowness - 1) < WORTH_SAYING:
            return f'{self.ms:.4f} ms'
        return (
            f'{self.ms:.4f} ms ({self.ms * self.slowness:.4f} by the clock, '
            f'the machine being {self.slowness:.2f} times as slow as when its table was made)'
        )


@dataclass(frozen=True)
class Passes:
    """Passes of one network: ms of its parts [passes, parts], and of a probe before the first part and after each
    [passes, parts + 1], which tells whether the core was disturbed. Probes are zero where there are none, as on a GPU.
    """

    parts: np.ndarray
    probes: np.ndarray

    @classmethod
    def joined(cls, passes: Iterable['Passes']) -> 'Passes':
        """All passes of one network that were timed at several times."""
        return cls(*(np.concatenate(a) for a in zip(*((one.parts, one.probes) for one in passes), strict=True)))

    @property
    def beside(self) -> np.ndarray:
        """The slower one of the two probes beside each part, [passes, parts]."""
        return np.maximum(self.probes[:, :-1], self.probes[:, 1:])

    def seen(self, fastest: float) -> np.ndarray:
        """Which parts were timed often enough with an undisturbed core, [parts]; see `typical_parts`."""
        return (self.beside <= UNDISTURBED * fastest).sum(axis=0) >= LEAST_UNDISTURBED


def fastest_probe(passes: Iterable[Passes]) -> float:
    """Time of a probe on an undisturbed core: a low quantile of all, since a few are faster than can be for long."""
    return float(np.quantile(np.concatenate([one.probes.ravel() for one in passes]), 0.02))


def undisturbed_share(passes: Sequence[Passes]) -> float:
    """Share of the parts' timings in which the core was undisturbed."""
    return float(np.mean(np.concatenate([one.beside.ravel() for one in passes]) <= UNDISTURBED * fastest_probe(passes)))


def typical_parts(passes: Sequence[Passes], fastest: float) -> np.ndarray:
    """Ms of each part [parts]: means of the timings with an undisturbed core, in which outliers count as `OUTLIER`.

    What shares a core with us, takes a third to a half of its speed, for milliseconds or minutes. Between two
    undisturbed probes a part was hardly disturbed, while whole passes on a busy machine always are.

    Args:
        fastest: the `fastest_probe` of all passes that are to be compared.
    """
    joined = Passes.joined(passes)
    ms, beside = joined.parts, joined.beside
    least = np.sort(beside, axis=0)[min(LEAST_UNDISTURBED, len(beside)) - 1]
    kept = np.where(beside <= np.maximum(UNDISTURBED * fastest, least), ms, np.nan)
    return np.nanmean(np.minimum(kept, OUTLIER * np.nanmedian(kept, axis=0)), axis=0)


@dataclass
class Bench:
    """A network that is built at the first call, and some passes of it at each call.

    Args:
        by_part: whether each part is timed for itself. On a CPU always; on a GPU it takes some time of its own.
    """

    build: Callable[[], nn.Module]
    batch_size: int
    img_size: int
    device: torch.device
    by_part: bool = False

    @cached_property
    def parts(self) -> list[Callable[[Tensor], Tensor]]:
        """What is timed, in succession; `build()` has a method `parts` that gives it."""
        net = self.build().eval().to(self.device)
        return net.parts() if self.by_part or self.device.type == 'cpu' else [net]

    @cached_property
    def images(self) -> Tensor:
        """The input."""
        return torch.randn(self.batch_size, 3, self.img_size, self.img_size, device=self.device)

    def __call__(self, passes: int = PASSES) -> Passes:
        """Time some passes, after others that warm up. On a GPU all are queued and waited for once."""
        warm_up = WARM_AGAIN if 'parts' in self.__dict__ else WARM_UP
        clock = Clock(self.device)
        with torch.inference_mode():
            marks = [self._run(clock) for _ in range(warm_up + passes)]
        return clock.passes(marks[warm_up:])

    def _run(self, clock: 'Clock') -> list:
        """Marks of one pass: before and after each part, with a probe between them on a CPU."""
        x, marks = self.images, clock.marks()
        for part in self.parts:
            x = part(x)
            marks += clock.marks()
        return marks


def bench_apart(bench: Bench) -> AbstractContextManager[Callable[..., Passes]]:
    """The bench where it is timed: on a CPU in a process of its own, since in one that has built other networks before,
    the same network can be a quarter slower; for a GPU here, a copy that has built nothing yet."""
    return FreshProcess(bench) if bench.device.type == 'cpu' else nullcontext(replace(bench))


@dataclass(frozen=True)
class Round:
    """Passes of a network and, by turns with them, of the standard."""

    own: list[Passes]
    standard: list[Passes]


def measure_latency(
    build: Callable[[], nn.Module],
    batch_size: int,
    img_size: int,
    device: torch.device,
    standard: Standard | None = None,
    rounds: int = ROUNDS,
) -> Measured:
    """Time of one forward pass of the network that `build()` returns: `measure_in_turns` of one network."""
    return measure_in_turns([build], batch_size, img_size, device, standard, rounds)[0][0]


def measure_in_turns(
    builds: Sequence[Callable[[], nn.Module]],
    batch_size: int,
    img_size: int,
    device: torch.device,
    standard: Standard | None = None,
    rounds: int = ROUNDS,
) -> tuple[list[Measured], float]:
    """Time of one forward pass of each network, and the share of the time in which the core was undisturbed.

    In each of `rounds`, every network is built anew, and some take turns of a few passes: what slows the machine down
    for a while meets all alike. A standard, where there is one, takes turns with them: what slows the machine down for
    long slows both down, so that their ratio is steady where times are not. Networks whose latencies are not precise
    yet get more rounds, up to twice as many in all. On a terminal, with a progress bar.
    """
    kept: list[list[Round]] = [[] for _ in builds]
    benches = [Bench(build, batch_size, img_size, device) for build in builds]
    beside = [Bench(standard.build, batch_size, img_size, device)] if standard else []
    times = math.isqrt(min(len(builds), ABREAST))  # what many are compared with is worth more builds
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
    """Passes of each network, all built anew, in turns."""
    with ExitStack() as stack:
        calls = [stack.enter_context(bench_apart(bench)) for bench in benches]
        passes: list[list[Passes]] = [[] for _ in calls]
        for _ in range(TURNS):
            for i in order.sample(range(len(calls)), len(calls)):
                passes[i].append(calls[i](PASSES))
    return passes


def summary_of(rounds: Sequence[Round], standard: Standard | None, fastest: float) -> Measured:
    """A latency from the passes of some rounds. Its standard error is that of a jackknife (Tukey 1958)."""

    def total(passes: Iterable[list[Passes]]) -> float:
        return float(typical_parts([one for some in passes for one in some], fastest).sum())

    def latency(some: Sequence[Round]) -> float:
        own = total(one.own for one in some)
        return own / total(one.standard for one in some) * standard.ms if standard else own

    ms, groups = latency(rounds), min(GROUPS, len(rounds)) if len(rounds) > 1 else 0
    without = [latency([one for i, one in enumerate(rounds) if i % groups != left]) for left in range(groups)]
    error = math.sqrt((groups - 1) * np.var(without)) / ms if without else math.inf
    return Measured(ms, error, total(one.standard for one in rounds) / standard.ms if standard else None)


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
    """Marks points of time: the processor's clock on a CPU, with a probe of the core's speed at each, events on a GPU
    that are read after one `wait`."""

    def __init__(self, device: torch.device):
        self.device = device
        self.probes = device.type != 'cuda'

    def marks(self) -> list:
        """One point of time; on a CPU two, before and after a probe."""
        if self.probes:
            before = time.perf_counter()
            sum(PROBE)
            return [before, time.perf_counter()]
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return [event]

    def wait(self) -> None:
        """Until all marks have been passed."""
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)

    def passes(self, marks: Sequence[list]) -> Passes:
        """What lies between the marks of each pass: before its first part, and after each."""
        self.wait()
        if not self.probes:
            parts = np.array([[a.elapsed_time(b) for a, b in pairwise(run)] for run in marks])
            return Passes(parts, np.zeros((len(parts), parts.shape[1] + 1)))
        spans = 1000 * np.diff(np.array(marks))
        return Passes(spans[:, 1::2], spans[:, 0::2])


def log_latency(
    logger: RunLogger, epoch: int, build: Callable[[], nn.Module], device: torch.device, img_size: int
) -> None:
    """Measure the latency of a trained network and log it; a failure is a line of the log.

    Args:
        build: makes the network, with any weights.
    """
    torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = False  # as for tables
    batch_size = 32 if device.type == 'cuda' else 1
    setting = {'device': device_name(device), 'batch_size': batch_size, 'threads': 1, 'img_size': img_size}
    try:
        ms = measure_latency(build, batch_size, img_size, device).ms
    except RuntimeError as e:  # the training itself is done and saved
        logger.log('latency not measured: %s', e)
    else:
        logger.record('latency', epoch, ms=ms, **setting)
        logger.log('measured latency %.4f ms on %s, batch %d', ms, setting['device'], batch_size)
