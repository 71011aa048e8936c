"""The multiples of mid channels at which a runtime is fast, and what other widths cost.

Runtimes compute channels in blocks of 4 to 32. Some take a slower way if a width is no multiple of that.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from latency_pkl.runtimes import Engine
from latency_pkl.sampling import Sample, random_config
from latency_pkl.timing import fastest_probe, take_turns, typical_parts
from models.config import NetworkConfig
from models.search_space import SearchSpace

MULTIPLES = (1, 2, 4, 8, 16, 32)

GAIN = 0.02
"""Least share of the time that must be gained by coarser multiples for a divisor not to be enough."""

NETWORKS = 4
"""Networks that are timed at all multiples."""


@dataclass(frozen=True)
class WidthGrid:
    """Time of networks with widths rounded up to multiples."""

    times: np.ndarray
    """ms, [networks, multiples]"""

    @property
    def costs(self) -> np.ndarray:
        """Mean time at each multiple over that at multiples of 1, [multiples]."""
        return np.exp(np.log(self.times / self.times[:, :1]).mean(axis=0))

    @property
    def divisor(self) -> int:
        """The least of `MULTIPLES` over which coarser ones gain at most `GAIN`."""
        return next(m for i, m in enumerate(MULTIPLES) if not any(self._gains(i, j) for j in range(i, len(MULTIPLES))))

    def _gains(self, fine: int, coarse: int) -> bool:
        """Return whether a multiple gains more than `GAIN` over a finer one, by two standard errors."""
        logs = np.log(self.times[:, coarse] / self.times[:, fine])
        error = logs.std(ddof=1) / len(logs) ** 0.5 if len(logs) > 1 else 0.0
        return logs.mean() + 2 * error < np.log(1 - GAIN)

    @property
    def price(self) -> float:
        """Time of networks with any widths over that with multiples of the divisor."""
        return 1 / float(self.costs[MULTIPLES.index(self.divisor)])

    def __str__(self) -> str:
        costs = ', '.join(
            f'{m}: {100 * (cost - 1):+.1f} %' for m, cost in zip(MULTIPLES[1:], self.costs[1:], strict=True)
        )
        said = f'Widths rounded up to multiples of {costs} of the time; '
        if self.divisor == 1:
            return said + 'all widths are equally good'
        return said + f'width_divisor {self.divisor}; ignoring it costs {100 * (self.price - 1):.1f} %'


def time_grid(engine: Engine, args, space: SearchSpace) -> WidthGrid:
    """Time some networks with widths rounded up to all `MULTIPLES`. All multiples of a network take turns."""
    rng, setting = random.Random(args.seed), (args.img_size, args.batch_size)
    passes = []
    for number in range(NETWORKS):
        config = random_config(rng, False, args.num_classes, space)
        benches = [engine.bench(config.rounded_up(m), number, *setting, launch=args.launch) for m in MULTIPLES]
        passes.append(take_turns(benches, rng))
    fastest = fastest_probe(one for network in passes for own in network for one in own)
    return WidthGrid(np.array([[typical_parts(own, fastest).sum() for own in network] for network in passes]))


def on_grid(config: NetworkConfig, divisor: int) -> bool:
    """Return whether rounding up changes no width."""
    return config == config.rounded_up(divisor)


def with_penalties(
    curves: Mapping[str, np.ndarray], samples: Sequence[Sample], slowness: np.ndarray, divisor: int, price: float
) -> dict[str, np.ndarray]:
    """Return curves whose widths off the grid have the most time that such widths took, over the next width on it.

    A shape whose such widths were not timed has the most of all shapes of its kernel and stride.

    Args:
        curves: of a fit to networks on the grid, ms by key.
        samples: networks off the grid.
        slowness: of the machine, when each was timed, [samples].
        price: the least penalty; that of whole networks.
    """
    found: dict[str, float] = {}
    alike: dict[str, float] = {}
    for sample, slow in zip(samples, slowness, strict=True):
        for key, width, ms in sample.blocks:
            if width % divisor and (up := -(-width // divisor) * divisor) <= len(curves[key]):
                ratio = ms / slow / float(curves[key][up - 1])
                found[key] = max(found.get(key, price), ratio)
                alike[_kind(key)] = max(alike.get(_kind(key), price), ratio)
    raised = {}
    for key, curve in curves.items():
        widths = np.arange(1, len(curve) + 1)
        following = curve[np.minimum(-(-widths // divisor) * divisor, len(curve)) - 1]
        penalty = found.get(key, alike.get(_kind(key), price))
        raised[key] = np.where(widths % divisor, penalty * following, curve)
    return raised


def _kind(key: str) -> str:
    """Return kernel and stride in a latency key, such as 'k5_s2'."""
    return '_'.join(key.split('_')[-3:-1])
