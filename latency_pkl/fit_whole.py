"""From whole networks' times to a table, for devices and runtimes that do not time single blocks.

A block's time is a physical estimate (`latency_pkl.fit.features`) times 1 plus corrections: of its place, of its
operator, and of its shape, each with a level and a slope along the width. The estimate has the same few non-negative
coefficients for all blocks. Corrections are ridge regressions. Their strengths are those that best predict each
network from all others.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

from latency_pkl.fit import OUTLIER, Fit, along_range, features
from models.config import NetworkConfig
from models.search_space import Block, Op, SearchSpace
from tools.errors import BadInput

Timed = Sequence[tuple[NetworkConfig, float]]
"""Networks and their times in ms."""

LEAST_FITTED = 30
"""Whole networks that a fit needs."""

STRENGTHS = (0.0, 1.0, 10.0, 100.0, 1000.0)
"""Variance of the corrections of one kind over that of a network's time, both relative. Tried in turn."""

SWEEPS = 2
"""Sweeps over the kinds of corrections when their strengths are chosen."""

LEAST_FACTOR = 0.1
"""Lower bound on 1 plus corrections."""

FAR = 4.0
"""Factor from the usual time for a network's work above which a timing is wild at first sight."""

WORK = (3, 5)
"""Features that are the MACs of a block's 1x1 and depthwise convolutions."""

DEVIATIONS = 6.0
"""Standard deviations above which a timing is wild, if it is above `OUTLIER` too."""

NORMAL = 1.4826
"""Standard deviation over the median of absolute errors, for normal errors."""

TURNS = 6
"""Most alternations between a fit and the choice of wild timings."""

LEAST_BASE = 1e-6
"""Least latency of stem and head, ms. Noisy times may put all of it into the blocks; a table's base is above 0."""


def fit_whole(networks: Timed, img_size: int, space: SearchSpace, divisor: int = 1) -> Fit:
    """Fit a table to times of whole networks.

    Shapes that no network has get the estimate, with the corrections of their place and operator.

    Args:
        networks: of blocks of `space`.
        divisor: widths of the networks are multiples of it. A width between two gets the latency of the upper one.

    Raises:
        BadInput: a block is not one of `space` for images of `img_size` pixels.
    """
    shapes = _Shapes(img_size, space)
    return shapes.table(_Model(shapes.parts(networks), np.array([ms for _, ms in networks])), divisor)


def wild_timings(networks: Timed, img_size: int, space: SearchSpace) -> dict[int, float]:
    """Return timings that do not fit with the others: their numbers, and the ms that the others predict.

    Raises:
        BadInput: see `fit_whole`.
    """
    parts, times = _Shapes(img_size, space).parts(networks), np.array([ms for _, ms in networks])
    ratios = np.log(times / parts.summed(parts.features[:, WORK].sum(axis=1)))
    good = np.abs(ratios - np.median(ratios)) <= np.log(FAR)
    for _ in range(TURNS):
        model = _Model(parts.only(good), times[good])
        expected = model.predict(parts)
        expected[good] = model.left_out
        errors = np.abs(np.log(times / np.maximum(expected, times / FAR**2)))
        limit = max(np.log1p(OUTLIER), DEVIATIONS * NORMAL * np.median(errors[good]))
        before, good = good, errors <= limit
        if (good == before).all():
            break
    return {int(i): float(expected[i]) for i in np.flatnonzero(~good)}


class _Parts(NamedTuple):
    """Blocks of some networks."""

    count: int
    """Number of networks."""
    owners: np.ndarray
    """Number of each block's network, [blocks]."""
    features: np.ndarray
    """[blocks, features]"""
    columns: np.ndarray
    """Corrections that apply to a block, one of each kind, [blocks, kinds]."""
    values: np.ndarray
    """What they are multiplied by: 1 for a level, the position in the range of widths for a slope, [blocks, kinds]."""

    def summed(self, values: np.ndarray) -> np.ndarray:
        """Return sums over each network's blocks, [networks]."""
        return np.bincount(self.owners, values, self.count)

    def only(self, keep: np.ndarray) -> '_Parts':
        """Return the blocks of some networks; `keep`: bool [networks]."""
        blocks = keep[self.owners]
        owners = (np.cumsum(keep) - 1)[self.owners[blocks]]
        return _Parts(int(keep.sum()), owners, self.features[blocks], self.columns[blocks], self.values[blocks])


class _Shapes:
    """Block shapes of a space, and the corrections that apply to each."""

    def __init__(self, img_size: int, space: SearchSpace):
        self.img_size, self.ranges = img_size, space.table_widths(img_size)
        self.places: dict[str, tuple[Block, Op]] = {}
        for block, _, op in space.positions(img_size):
            self.places.setdefault(block.key(op), (block, op))
        numbers: dict[object, int] = {}
        self.columns = {}
        for key, (block, op) in self.places.items():
            place, operator = (block.in_size, block.in_ch, block.out_ch, block.stride), (op.kernel, op.se)
            names = [(which, kind) for which in (place, operator, key) for kind in ('level', 'slope')]
            self.columns[key] = [numbers.setdefault(name, len(numbers)) for name in names]

    def at(self, key: str, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return `features` and `values` of one shape, [widths, ...]."""
        along = np.clip(along_range(widths, *self.ranges[key]), -1.0, 1.0)
        values = np.stack([np.ones_like(along), along] * (len(self.columns[key]) // 2), axis=1)
        return features(*self.places[key], widths), values

    def parts(self, networks: Timed) -> _Parts:
        """Return the blocks of networks."""
        blocks = [
            (i, key, spec.mid_channels)
            for i, (config, _) in enumerate(networks)
            for _, spec, key in config.table_keys(self.img_size)
        ]
        for _, key, width in blocks:
            if key not in self.ranges or width > self.ranges[key][1]:
                raise BadInput(f'a timed network has a block ({key}, {width} mid channels) outside the search space')
        tables = {key: self.at(key, np.arange(1, high + 1)) for key, (_, high) in self.ranges.items()}
        rows, values = (np.array([tables[key][i][width - 1] for _, key, width in blocks]) for i in range(2))
        columns = np.array([self.columns[key] for _, key, _ in blocks])
        return _Parts(len(networks), np.array([i for i, _, _ in blocks]), rows, columns, values)

    def table(self, model: '_Model', divisor: int) -> Fit:
        """Return the table of a model."""
        curves = {}
        for key, (low, high) in self.ranges.items():
            widths = -(-np.arange(1, high + 1) // divisor) * divisor
            rows, values = self.at(key, np.minimum(widths, max(high // divisor * divisor, low)))
            columns = np.tile(self.columns[key], (len(widths), 1))
            curves[key] = np.maximum.accumulate(model.of_blocks(rows, columns, values))
        return Fit(max(model.base, LEAST_BASE), curves, 1.0)


class _Model:
    """Physical coefficients, and corrections by their numbers."""

    def __init__(self, parts: _Parts, times: np.ndarray):
        rows = np.stack([*(parts.summed(one) for one in parts.features.T), np.ones(parts.count)], axis=1)
        scale = rows.max(axis=0) + 1e-12
        coefficients = nnls(rows / scale / times[:, None], np.ones(len(times)))[0] / scale
        self.coefficients, self.base = coefficients[:-1], float(coefficients[-1])
        blocks = parts.features @ self.coefficients
        estimates = self.base + parts.summed(blocks)
        shares = np.zeros((parts.columns.shape[1], parts.count, parts.columns.max() + 1))
        for kind, share in enumerate(shares):
            np.add.at(share, (parts.owners, parts.columns[:, kind]), blocks * parts.values[:, kind])
        self.corrections, left_out = _ridge(shares / estimates[:, None], times / estimates - 1)
        self.left_out = estimates * (1 + left_out)
        """Latency of each network as the corrections of the others predict it, ms."""

    def of_blocks(self, rows: np.ndarray, columns: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Return the latencies of blocks by their `features`, `columns` and `values`, ms [blocks]."""
        known = np.pad(self.corrections, (0, max(columns.max() + 1 - len(self.corrections), 0)))
        factors = 1 + (known[columns] * values).sum(axis=1)
        return rows @ self.coefficients * np.maximum(factors, LEAST_FACTOR)

    def predict(self, parts: _Parts) -> np.ndarray:
        """Return the latencies of networks, ms."""
        return self.base + parts.summed(self.of_blocks(parts.features, parts.columns, parts.values))


def _ridge(shares: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the corrections, and what those of the other networks predict for each network.

    Args:
        shares: what each correction is multiplied by, [kinds, networks, corrections].
        targets: relative errors of the estimates, [networks].
    """
    kernels = shares @ shares.transpose(0, 2, 1)
    strengths = np.zeros(len(kernels))

    def solve(strengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        inverse = np.linalg.inv(np.eye(len(targets)) + np.tensordot(strengths, kernels, 1))
        dual = inverse @ targets
        return dual, targets - dual / np.diag(inverse)

    def error(kind: int, strength: float) -> float:
        tried = np.where(np.arange(len(strengths)) == kind, strength, strengths)
        return float(np.abs(solve(tried)[1] - targets).mean())

    for _ in range(SWEEPS):
        for kind in range(len(kernels)):
            strengths[kind] = min(STRENGTHS, key=lambda strength, kind=kind: error(kind, strength))
    dual, left_out = solve(strengths)
    return np.einsum('k,knc,n->c', strengths, shares, dual), left_out
