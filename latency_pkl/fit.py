"""From timed networks to a table: a latency curve for every block shape over its widths.

A machine that others share slows networks down, some by a third. By how much in a single timing is told by the
network itself: its time over what the table says of it. Table and slowness are fitted by turns. No network is left out
of the shapes' curves for being slow: the fast ones are those whose widths and memory happen to suit the machine. How
fast it is from minute to minute is told by a reference network that is timed between the others; the table is of its
usual speed.

A block's time is modelled as a physical estimate (operations, memory traffic, fixed costs; the same few coefficients
for all blocks, fitted to non-negative values) times a correction of its own shape that is linear in the width. Shapes
that were seen seldom then borrow from all others. Curves are made non-decreasing at the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from latency_pkl.sampling import Sample
from models.search_space import Block, Op, SearchSpace, after_stride

VECTOR = 16
"""Channels that vector units and tensor cores take at once; costs may rise in such steps."""

SHRINK_LEVEL, SHRINK_SLOPE = 0.3, 1.0
"""Weight, in samples, of 'no correction' against what was measured: of a curve's level and of its slope."""

TURNS = 4
"""Times that table and slowness of the networks are fitted by turns."""

OUTLIER = 0.2
"""Distance from what the others say, as a share of it, from which a network or a block is an outlier."""


@dataclass(frozen=True)
class Fit:
    """A fitted table in ms."""

    base: float
    curves: dict[str, np.ndarray]
    factor: float
    """What all curves were multiplied by, so that networks take what the table says, in their mean without outliers."""


def features(block: Block, op: Op, widths: np.ndarray) -> np.ndarray:
    """Quantities that a block's time may be proportional to, [widths, features]."""
    mid = np.asarray(widths, dtype=np.float64)
    padded = np.ceil(mid / VECTOR) * VECTOR
    pixels_in = block.in_size**2
    pixels_out = after_stride(block.in_size, block.stride) ** 2
    one, kernel, squeeze = np.ones_like(mid), op.kernel**2, op.se_width(block.in_ch)
    pointwise = pixels_in * block.in_ch + pixels_out * block.out_ch
    return np.stack(
        [
            one,
            one * op.se,
            one * (pixels_in * block.in_ch + pixels_out * block.out_ch),
            mid * pointwise,
            padded * pointwise,
            mid * pixels_out * kernel,
            padded * pixels_out * kernel,
            padded * pixels_out * kernel * (block.stride > 1),
            mid * (pixels_in + pixels_out),
            mid * (pixels_in + pixels_out) * (block.act == 'relu'),
            mid * pixels_out * op.se,
            mid * (block.in_ch + block.out_ch + 2 * squeeze),
        ],
        axis=1,
    )


def fit_table(samples: Sequence[Sample], slowness: np.ndarray, img_size: int, space: SearchSpace) -> Fit:
    """A table from timed networks, which together should show the fixed layers and every key of the space. Parts of a
    network that were never timed with an undisturbed core may be missing.

    Args:
        slowness: how many times as slow as usual the machine was when each of them was timed.
    """
    fixed, totals = (np.array([getattr(sample, name) for sample in samples]) for name in ('fixed', 'total'))
    usual, slow = totals / slowness, np.nan_to_num(fixed / np.nanmedian(fixed), nan=1.0)
    for _ in range(TURNS):
        curves = _curves(samples, slow, img_size, space)
        base = float(np.nanmedian(fixed / slow))
        predicted = np.array([sample.predicted(base, curves) for sample in samples])
        factor = _typical(usual / predicted)
        slow = totals / (factor * predicted)
    return Fit(factor * base, {key: factor * curve for key, curve in curves.items()}, factor)


def _curves(
    samples: Sequence[Sample], slowness: np.ndarray, img_size: int, space: SearchSpace
) -> dict[str, np.ndarray]:
    """Curves (ms by width, from 1 on) by key."""
    places = {block.key(op): (block, op) for block, _, op in space.positions(img_size)}
    seen: dict[str, list[tuple[int, float]]] = {key: [] for key in places}
    for sample, slow in zip(samples, slowness, strict=True):
        for key, width, ms in sample.blocks:
            seen[key].append((width, ms / slow))
    rows = np.concatenate([features(*places[key], [w for w, _ in pairs]) for key, pairs in seen.items() if pairs])
    times = np.array([ms for pairs in seen.values() for _, ms in pairs])
    scale = rows.max(axis=0) + 1e-12
    coefficients = nnls(rows / scale / times[:, None], np.ones(len(times)))[0] / scale
    curves = {}
    for key, (low, high) in space.table_widths(img_size).items():
        physical = features(*places[key], np.arange(1, high + 1)) @ coefficients
        widths = np.array([w for w, _ in seen[key]], dtype=int)
        ratios = np.array([ms for _, ms in seen[key]]) / physical[widths - 1]
        level, slope = _correction(_along(widths, low, high), ratios)
        along = np.clip(_along(np.arange(1, high + 1), low, high), -1.0, 1.0)
        curves[key] = np.maximum.accumulate(physical * np.maximum(level + slope * along, 0.1))
    return curves


def _typical(ratios: np.ndarray) -> float:
    """Mean without outliers."""
    middle = np.median(ratios)
    return float(ratios[np.abs(ratios / middle - 1) <= OUTLIER].mean())


def _along(widths: np.ndarray, low: int, high: int) -> np.ndarray:
    """Where a width lies in its range: -1 at the fewest, 1 at the most."""
    return 2 * (widths - low) / (high - low) - 1


def _correction(along: np.ndarray, ratios: np.ndarray) -> tuple[float, float]:
    """Level and slope of measured over estimated time, drawn towards (1, 0), twice: the second time without
    outliers.
    """
    keep = np.ones(len(ratios), dtype=bool)
    level, slope = 1.0, 0.0
    for _ in range(2):
        x = np.stack([np.ones(keep.sum()), along[keep]], axis=1)
        prior = np.diag([SHRINK_LEVEL, SHRINK_SLOPE])
        level, slope = np.linalg.solve(x.T @ x + prior, x.T @ ratios[keep] + prior @ [1.0, 0.0])
        keep = np.abs(ratios / (level + slope * along) - 1) < OUTLIER
    return float(level), float(slope)
