"""From timed networks to a table: a latency curve for every block shape over its widths.

On a shared machine some timings are slower by a third. The slowness of one timing is the network's time over the
table's prediction. Table and slowness are fitted alternately. Slow networks stay in the fit of the curves: fast ones
are those whose widths and memory layout happen to suit the machine. A reference network, timed between the others,
gives the machine's speed over time; the table holds for its usual speed.

A block's time is modelled as a physical estimate times a correction of the block's shape. The estimate (operations,
memory traffic, fixed costs) has the same few non-negative coefficients for all blocks. The correction is linear in the
width. So shapes that were timed rarely borrow from all others. Curves are made non-decreasing at the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from latency_pkl.sampling import Sample
from models.search_space import Block, Op, SearchSpace, after_stride

VECTOR = 16
"""Channels that vector units and tensor cores process at once; costs may rise in such steps."""

SHRINK_LEVEL, SHRINK_SLOPE = 0.3, 1.0
"""Weights of the prior 'no correction', in samples: for a curve's level and for its slope."""

TURNS = 4
"""Alternations between fitting the table and the slowness of the networks."""

OUTLIER = 0.2
"""Distance of an outlying network or block from the prediction, as a share of it."""


@dataclass(frozen=True)
class Fit:
    """A fitted table in ms."""

    base: float
    curves: dict[str, np.ndarray]
    factor: float
    """Factor of all curves, for a mean error of 0 over the networks without outliers."""


def features(block: Block, op: Op, widths: np.ndarray) -> np.ndarray:
    """Return quantities that a block's time may be proportional to, [widths, features]."""
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
    """Fit a table to timed networks.

    Args:
        samples: together they have the fixed layers and every key of the space. Parts of a network that were never
            timed on an undisturbed core may be missing.
        slowness: time of the reference network over its usual time, when each sample was timed, [samples].
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
    """Return curves by key, ms, [widths from 1 on]."""
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
        level, slope = _correction(along_range(widths, low, high), ratios)
        along = np.clip(along_range(np.arange(1, high + 1), low, high), -1.0, 1.0)
        curves[key] = np.maximum.accumulate(physical * np.maximum(level + slope * along, 0.1))
    return curves


def _typical(ratios: np.ndarray) -> float:
    """Return the mean without outliers."""
    middle = np.median(ratios)
    return float(ratios[np.abs(ratios / middle - 1) <= OUTLIER].mean())


def along_range(widths: np.ndarray, low: int, high: int) -> np.ndarray:
    """Return the positions of widths in their range, from -1 at `low` to 1 at `high`."""
    return 2 * (widths - low) / (high - low) - 1


def _correction(along: np.ndarray, ratios: np.ndarray) -> tuple[float, float]:
    """Return level and slope of measured over estimated time, shrunk towards (1, 0). Fitted twice, the second time
    without outliers.
    """
    keep = np.ones(len(ratios), dtype=bool)
    level, slope = 1.0, 0.0
    for _ in range(2):
        x = np.stack([np.ones(keep.sum()), along[keep]], axis=1)
        prior = np.diag([SHRINK_LEVEL, SHRINK_SLOPE])
        level, slope = np.linalg.solve(x.T @ x + prior, x.T @ ratios[keep] + prior @ [1.0, 0.0])
        keep = np.abs(ratios / (level + slope * along) - 1) < OUTLIER
    return float(level), float(slope)
