"""From timed networks to a table: a latency curve for every block shape over its widths.

A block's time is modelled as a physical estimate (operations, memory traffic, fixed costs; the same few coefficients
for all blocks, fitted to non-negative values) times a correction of its own shape that is linear in the width. Shapes
that were seen seldom then borrow from all others. Curves are made non-decreasing at the end.
"""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import nnls

from latency_pkl.sampling import Sample
from models.search_space import SPACE, Block, Op, SearchSpace, after_stride

VECTOR = 16
"""Channels that vector units and tensor cores take at once; costs may rise in such steps."""

SHRINK_LEVEL, SHRINK_SLOPE = 1.0, 4.0
"""Weight, in samples, of 'no correction' against what was measured: of a curve's level and of its slope."""

DRIFT_WINDOW = 9
"""Networks over which the speed of the machine is taken as constant."""


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


def drift(fixed: Sequence[float]) -> np.ndarray:
    """Relative slowness of the machine during each network, from the time of the layers that all networks share."""
    half = DRIFT_WINDOW // 2
    smooth = [np.median(fixed[max(i - half, 0) : i + half + 1]) for i in range(len(fixed))]
    return np.array(smooth) / np.median(fixed)


def fit_curves(
    samples: Sequence[Sample], img_size: int, space: SearchSpace = SPACE
) -> tuple[float, dict[str, np.ndarray], float]:
    """Base and curves (ms by width, from 1 on), and the spread of the machine's speed: 90 % of the networks, as
    a share.

    Args:
        samples: timed networks in the order of their timing; together they must show every key of the space.
    """
    slowness = drift([sample.fixed for sample in samples])
    places = {block.key(op): (block, op) for block, op in space.layers(img_size)}
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
    base = float(np.median([sample.fixed for sample in samples] / slowness))
    return base, curves, float(np.quantile(slowness, 0.95) - np.quantile(slowness, 0.05))


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
        keep = np.abs(ratios / (level + slope * along) - 1) < 0.2
    return float(level), float(slope)
