"""Size, multiply-adds and speed of a network."""

import math
import platform
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from tools.fresh import in_fresh_process

ROUNDS, MOST_ROUNDS = 12, 72
"""Times that a network is built and timed for one latency: at least, and where the machine is noisy at most."""

PRECISION = 0.005
"""Standard error of a latency by a standard, as a share of it, at which no more timings are made."""

WARM_UP, PASSES = 3, 5
"""Passes of a network just built: to warm up, and timed."""

WORTH_SAYING = 0.01
"""Change of the machine's speed that is said."""


def count_params(net: nn.Module) -> float:
    """Parameters in millions."""
    return sum(p.numel() for p in net.parameters()) / 1e6


def device_name(device: torch.device) -> str:
    """Name of a GPU, or of the processor."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        return next(line.split(':', 1)[1].strip() for line in lines if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def count_mult_adds(net: nn.Module, img_size: int, channels: int = 3) -> float:
    """Multiply-adds of convolutions and linear layers for one square input, in millions (torch counts two for each)."""
    device = next(net.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        net.eval()(torch.zeros(1, channels, img_size, img_size, device=device))
    return counter.get_total_flops() / 2e6


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


def measure_latency(
    build: Callable[[], nn.Module],
    batch_size: int,
    img_size: int,
    device: torch.device,
    standard: Standard | None = None,
) -> Measured:
    """Time of one forward pass of the network that `build()` returns: `measure_in_turns` of one network."""
    return measure_in_turns([build], batch_size, img_size, device, standard)[0]


def measure_in_turns(
    builds: Sequence[Callable[[], nn.Module]],
    batch_size: int,
    img_size: int,
    device: torch.device,
    standard: Standard | None = None,
    rounds: int = ROUNDS,
    most_rounds: int = MOST_ROUNDS,
) -> list[Measured]:
    """Time of one forward pass of each network, over `rounds` times that it is built and timed: medians.

    By turns and in a new order each round, so that disturbances of some seconds meet all alike. By a standard, which is
    timed beside each, where there is one; what slows a machine down for minutes slows both down, so that their ratio is
    steady where times are not. Networks whose ratios still differ much are timed again, up to `most_rounds` in all.
    On a terminal, with a progress bar.
    """
    times: list[list[tuple[float, float]]] = [[] for _ in builds]
    order = random.Random(0)
    with tqdm(total=rounds, unit='round', desc='timing networks', leave=False, disable=None) as bar:
        for number in range(most_rounds):
            due = [i for i, own in enumerate(times) if number < rounds or not _is_precise(own, standard)]
            if not due:
                break
            for i in order.sample(due, len(due)):
                times[i].append(time_beside(builds[i], batch_size, img_size, device, standard))
            bar.total = max(rounds, number + 1)
            bar.update()
    return [median_of(own, standard) for own in times]


def _is_precise(times: Sequence[tuple[float, float]], standard: Standard | None) -> bool:
    """Whether more timings are not worth their time; without a standard they are not."""
    return standard is None or median_of(times, standard).error <= PRECISION


def time_beside(
    build: Callable[[], nn.Module], batch_size: int, img_size: int, device: torch.device, standard: Standard | None
) -> tuple[float, float]:
    """`time_once` of a network and, right after it, of a standard (nan without one)."""
    own = time_once(build, batch_size, img_size, device)
    return own, time_once(standard.build, batch_size, img_size, device) if standard else math.nan


def median_of(times: Sequence[tuple[float, float]], standard: Standard | None) -> Measured:
    """A latency from several `time_beside`. The standard error is that of the median of normal values, whose standard
    deviation is taken from the quartiles."""
    own, beside = np.array(times).T
    values = own / beside * standard.ms if standard else own
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    error = 1.2533 * (high - low) / 1.349 / math.sqrt(len(values)) / middle
    return Measured(middle, error, float(np.median(beside)) / standard.ms if standard else None)


def time_once(build: Callable[[], nn.Module], batch_size: int, img_size: int, device: torch.device) -> float:
    """Build a network and time some passes of it: the median, in ms.

    On a GPU by events. On a CPU by the clock, in a process of its own: in one that has built other networks before, the
    same network can be a quarter slower.
    """
    timed = partial(in_fresh_process, time_passes) if device.type == 'cpu' else time_passes
    return float(np.median(timed(build, batch_size, img_size, device)))


@torch.inference_mode()
def time_passes(
    build: Callable[[], nn.Module], batch_size: int, img_size: int, device: torch.device, passes: int = PASSES
) -> list[float]:
    """Milliseconds of each of `passes` passes of a network in this process, after a warm-up."""
    net = build().eval().to(device)
    images = torch.randn(batch_size, 3, img_size, img_size, device=device)
    clock = Clock(device)
    for _ in range(WARM_UP):
        net(images)
    runs = []
    for _ in range(passes):
        start = clock.mark()
        net(images)
        runs.append([start, clock.mark()])
    clock.wait()
    return [clock.elapsed(run)[0] for run in runs]


class Clock:
    """Marks points of time: the processor's clock on a CPU, events on a GPU that are read after one `wait`."""

    def __init__(self, device: torch.device):
        self.device = device

    def mark(self) -> float | torch.cuda.Event:
        """A point of time, for `elapsed`."""
        if self.device.type != 'cuda':
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def wait(self) -> None:
        """Until all marks have been passed."""
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)

    def elapsed(self, marks: Sequence) -> list[float]:
        """Milliseconds between one mark and the next."""
        if self.device.type != 'cuda':
            return [1000 * (b - a) for a, b in zip(marks, marks[1:], strict=False)]
        return [a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)]
