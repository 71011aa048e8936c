"""Widths of one architecture under limits: how far they reach in the target's table, exactly.

A multiple-choice knapsack: each block takes one of its widths, each limit is a capacity. Its linear relaxation, by
column generation, gives an upper bound and multipliers of the limits (Lagrange). If rounding it does not settle the
question, an integer program over the few widths that can still matter does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array

from models.latency import TOLERANCE

SOLVER = 1e-6
"""Tolerance of HiGHS, by which its constraints may be off."""

RANGE_GAP = 1e-3
"""Precision of the most target that limits allow, as a share of it. Whether a target can be met is exact."""

FEW = 8
"""Best widths, and others over the range, of each block that usually settle a question of this precision."""

Curves = Sequence[np.ndarray]
"""Rising amounts of each block at its possible widths: [blocks][widths]."""


@dataclass(frozen=True)
class Reach:
    """Answer of `reach_within`. All in the units of the target's table.

    Args:
        most: sum of the gains at `choice`; -inf if not even the least widths keep the limits.
        bound: no widths within the limits reach more; or not `need`, if `most` does not.
        multipliers: of the limits, [limits]; sum of max(gain - multipliers @ cost) + multipliers @ rooms >= `bound`.
        choice: position of each block's width.
    """

    most: float
    bound: float
    multipliers: np.ndarray
    choice: list[int]


def reach_within(gains: Curves, costs: Sequence[Curves], rooms: Sequence[float], need: float) -> Reach:
    """Return widths that keep all limits and reach at least `need`, or else as far as any widths do.

    Args:
        gains: in the target's table.
        costs: in the table of each limit.
        rooms: the most sum of costs of each limit, all above 0.
        need: a sum of gains; inf for the most that there is, to `RANGE_GAP` of it.
    """
    stacked = [np.stack([curves[i] for curves in costs]) for i in range(len(gains))]  # [limits, widths] each
    rooms, count = np.array(rooms), len(gains)
    nothing = np.zeros(len(rooms))
    if not _fits(stacked, [0] * count, rooms):
        return Reach(-np.inf, -np.inf, nothing, [0] * count)
    top = [len(curve) - 1 for curve in gains]
    if _fits(stacked, top, rooms):
        most = _sum(gains, top)
        return Reach(most, most, nothing, top)
    columns = [(i, at) for i in range(count) for at in sorted({0, top[i]})]
    while True:
        shares, multipliers = _relaxed(gains, stacked, rooms, columns)
        values = [gain - multipliers @ cost for gain, cost in zip(gains, stacked, strict=True)]
        best = [int(value.argmax()) for value in values]
        bound = _sum(values, best) + float(multipliers @ rooms)
        choice = _filled(gains, stacked, rooms, columns, shares)
        most = _sum(gains, choice)
        short = bound < need * (1 - TOLERANCE) < np.inf
        if short or most >= need * (1 - TOLERANCE) or (need == np.inf and bound - most <= RANGE_GAP * abs(bound)):
            return Reach(most, bound, multipliers, choice)
        new = [column for column in enumerate(best) if column not in columns]
        if not new:
            break
        columns += new
    wanted = need if need < np.inf else most
    slack = bound + SOLVER * abs(bound) - wanted
    kept = [np.flatnonzero(value >= value.max() - slack) for value in values]
    few = [_some(places, value) for places, value in zip(kept, values, strict=True)]
    for places in (few, kept) if need == np.inf else (kept,):
        exact = _integer(gains, stacked, rooms, places, wanted)
        if exact is not None and _sum(gains, exact) > most:
            choice, most = exact, _sum(gains, exact)
        if need == np.inf and bound - most <= RANGE_GAP * abs(bound):
            return Reach(most, bound, multipliers, choice)
    return Reach(most, max(most, min(bound, wanted)), multipliers, choice)


def _some(places: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Return the `FEW` places of the most value, and as many evenly spaced ones."""
    best, spaced = np.argsort(-value[places])[:FEW], np.linspace(0, len(places) - 1, FEW).astype(int)
    return places[np.union1d(best, spaced)]


def _sum(curves: Curves, choice: Sequence[int]) -> float:
    return float(sum(curve[at] for curve, at in zip(curves, choice, strict=True)))


def _fits(stacked: Curves, choice: Sequence[int], rooms: np.ndarray) -> bool:
    used = sum(cost[:, at] for cost, at in zip(stacked, choice, strict=True))
    return bool((used <= rooms * (1 + TOLERANCE)).all())


def _relaxed(gains: Curves, stacked: Curves, rooms: np.ndarray, columns) -> tuple[np.ndarray, np.ndarray]:
    """Solve the relaxation over some columns. Return their shares, and the multipliers of the limits."""
    blocks = np.array([i for i, _ in columns])
    one_each = csr_array((np.ones(len(columns)), (blocks, np.arange(len(columns)))))
    scale = np.where(rooms > 0, rooms, 1)
    costs = np.stack([stacked[i][:, at] for i, at in columns], axis=1) / scale[:, None]
    values = np.array([gains[i][at] for i, at in columns])
    found = linprog(-values, costs, rooms / scale, one_each, np.ones(blocks.max() + 1))
    if found.x is None:
        raise RuntimeError(f'the solver failed: {found.message}')
    return found.x, np.maximum(-found.ineqlin.marginals, 0) / scale


def _filled(gains: Curves, stacked: Curves, rooms: np.ndarray, columns, shares: np.ndarray) -> list[int]:
    """Round a relaxed solution down, then widen blocks one after the other as far as the limits allow."""
    choice = [len(gain) for gain in gains]
    for (i, at), share in zip(columns, shares, strict=True):
        if share > TOLERANCE:
            choice[i] = min(choice[i], at)
    if not _fits(stacked, choice, rooms):
        choice = [0] * len(gains)
    ceiling = [max(at for j, at in columns if j == i) for i in range(len(gains))]
    left = rooms * (1 + TOLERANCE) - sum(cost[:, at] for cost, at in zip(stacked, choice, strict=True))
    for i in np.argsort([top - at for top, at in zip(ceiling, choice, strict=True)], kind='stable')[::-1].tolist():
        more = stacked[i][:, choice[i] :] - stacked[i][:, choice[i], None]
        step = int((more <= left[:, None]).all(axis=0).argmin() or more.shape[1]) - 1
        step = max(step, 0)
        if step and _fits(stacked, [*choice[:i], choice[i] + step, *choice[i + 1 :]], rooms):
            left = left - more[:, step]
            choice[i] += step
    return choice


def _integer(gains: Curves, stacked: Curves, rooms: np.ndarray, kept: Curves, least: float) -> list[int] | None:
    """Return the choice among the `kept` widths that gains the most, at least `least`; None if there is none."""
    columns = [(i, int(at)) for i, places in enumerate(kept) for at in places]
    blocks = np.array([i for i, _ in columns])
    values = np.array([gains[i][at] for i, at in columns])
    scale = np.where(rooms > 0, rooms, 1)
    costs = np.stack([stacked[i][:, at] for i, at in columns], axis=1) / scale[:, None]
    constraints = [
        LinearConstraint(csr_array((np.ones(len(columns)), (blocks, np.arange(len(columns))))), 1, 1),
        LinearConstraint(costs, -np.inf, rooms / scale + TOLERANCE),
        LinearConstraint(values / max(least, SOLVER), 1 - TOLERANCE, np.inf),
    ]
    per = 1e3 / max(abs(least), SOLVER)
    while True:
        found = milp(-per * values, integrality=np.ones(len(columns)), bounds=Bounds(0, 1), constraints=constraints,
                     options={'mip_rel_gap': 0})  # fmt: skip
        if found.x is None:
            return None
        taken = found.x > 0.5
        choice = [at for (_, at), one in zip(columns, taken, strict=True) if one]
        if _fits(stacked, choice, rooms):
            return choice
        constraints.append(LinearConstraint(taken.astype(float), -np.inf, taken.sum() - 1))  # kept within SOLVER only
