"""The multiples of mid channels at which a runtime is fast, and what other widths cost.

Runtimes compute channels in blocks of 4 to 32. Some take a slower way if a width is no multiple of that.
"""

import random
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import nnls

from latency_pkl.fit import Fit
from latency_pkl.fit_whole import Timed
from latency_pkl.runtimes import Engine
from latency_pkl.sampling import random_config
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
        costs = ', '.join(f'{m}: {100 * (cost - 1):+.1f} %' for m, cost in zip(MULTIPLES, self.costs, strict=True))
        said = f'Time with widths rounded up to multiples ({costs})'
        if self.divisor == 1:
            return f'{said}: all widths are equally good'
        return f'{said}: width_divisor {self.divisor}; ignoring it costs {100 * (self.price - 1):.1f} %'


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


def with_penalties(fit: Fit, networks: Timed, grid: WidthGrid, img_size: int) -> Fit:
    """Return a fit whose widths off the grid take longer than the next width on it.

    A penalty for each kernel size is fitted to networks off the grid; it is the grid's `price` or more. Then all are
    raised together, until none of these networks takes longer than its prediction.

    Args:
        fit: to networks on the grid.
        networks: off the grid, with their times in ms.
    """
    divisor = grid.divisor
    if divisor == 1:
        return fit
    kernels = sorted({_kernel(key) for key in fit.curves})
    on, off = np.full(len(networks), fit.base), np.zeros((len(networks), len(kernels)))
    for i, (config, _) in enumerate(networks):
        for _, spec, key in config.table_keys(img_size):
            ms = _on_grid(fit.curves[key], divisor)[spec.mid_channels - 1]
            if spec.mid_channels % divisor:
                off[i, kernels.index(_kernel(key))] += ms
            else:
                on[i] += ms
    penalties = np.full(len(kernels), max(grid.price, 1))
    if networks:
        times = np.array([ms for _, ms in networks])
        penalties = np.maximum(penalties, nnls(off / times[:, None], 1 - on / times)[0])
        penalties *= max(np.max((times - on) / (off @ penalties)), 1)
    curves = {}
    for key, curve in fit.curves.items():
        odd = np.arange(1, len(curve) + 1) % divisor > 0
        curves[key] = _on_grid(curve, divisor) * np.where(odd, penalties[kernels.index(_kernel(key))], 1)
    return replace(fit, curves=curves)


def _on_grid(curve: np.ndarray, divisor: int) -> np.ndarray:
    """Return the latency of the next width on the grid for each width."""
    return curve[np.minimum(-(-np.arange(1, len(curve) + 1) // divisor) * divisor, len(curve)) - 1]


def _kernel(key: str) -> str:
    """Return the kernel size in a latency key, such as 'k5'."""
    return key.split('_')[-3]
