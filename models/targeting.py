"""The most probable architecture that can meet a latency target, found exactly."""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor

from models.latency import LatencyTable
from models.search_space import Arch
from tools.errors import BadInput


@dataclass(frozen=True)
class _Front:
    """Partial architectures of which none is beaten by another in all of: probability, least and most latency.

    `logp`, `low`, `high`: [n]; `picks`: op index of each block so far, -1 where the block fell away, [n, blocks].
    """

    logp: np.ndarray
    low: np.ndarray
    high: np.ndarray
    picks: np.ndarray

    def take(self, rows: np.ndarray) -> '_Front':
        """These rows of it."""
        return _Front(self.logp[rows], self.low[rows], self.high[rows], self.picks[rows])


def most_probable(state: Mapping[str, Tensor], table: LatencyTable, target: float) -> Arch:
    """The architecture of the highest sum of log-probabilities, of operators and exits, whose widths can meet
    the target.

    The operators of all blocks count, those of blocks behind an exit with their most probable one, which is free to be
    chosen there; so an architecture that `parse_architecture` finds is kept where its widths can meet the target.

    Its latency at least widths is at most `target`, that at most widths at least `target`. Mostly only one of the two
    binds: a best architecture under one of them that happens to fulfil the other is the best under both, and is found
    much faster.

    Args:
        state: has log_alphas and betas, names without `module.`.

    Raises:
        BadInput: no architecture of the space can meet the target.
    """
    for bounded in ({'low'}, {'high'}, {'low', 'high'}):
        arch, low, high = _best(state, table, target, bounded)
        if low <= target <= high:
            break
    return arch


def _best(
    state: Mapping[str, Tensor], table: LatencyTable, target: float, bounded: set[str]
) -> tuple[Arch, float, float]:
    """The most probable architecture under the bounds named ('low' <= target, 'high' >= target), with its least and
    most latency. Stages are merged one after the other; partial architectures that cannot lead to a feasible whole,
    or that another beats, are dropped, so the result is exact.
    """
    space = table.space
    fronts = [_stage_front(state, table, name, bounded) for name in space.stage_names]
    rest_low = np.cumsum([0.0, *(f.low.min() for f in reversed(fronts))])[::-1][1:]
    rest_high = np.cumsum([0.0, *(f.high.max() for f in reversed(fronts))])[::-1][1:]
    front = _Front(np.zeros(1), np.full(1, table.base), np.full(1, table.base), np.zeros((1, 0), dtype=np.int8))
    bound = _Bound(fronts, table.base, target) if len(bounded) == 2 else None
    for number, (stage, low, high) in enumerate(zip(fronts, rest_low, rest_high, strict=True)):
        front = _merged(front, stage)
        if bound:
            front = front.take(bound.may_win(front, number))
            if not len(front.logp):
                break
        meets = np.ones(len(front.logp), dtype=bool)
        if 'low' in bounded:
            meets &= front.low + low <= target * (1 + 1e-12)
        if 'high' in bounded:
            meets &= front.high + high >= target * (1 - 1e-12)
        if not meets.any():
            raise BadInput(f'target {target:g}: no architecture of the space can meet it; see the range of the table')
        front = _undominated(front.take(meets), bounded)
    if bound and bound.reached is not None and not (front.logp > bound.reached.logp).any():
        front = bound.reached
    row = front.logp.argmax()
    best = front.picks[row]
    arch: Arch = {name: [] for name in space.stage_names}
    for block, pick in zip(space.blocks(table.img_size), best, strict=True):
        if pick >= 0:
            arch[block.stage].append(int(pick))
    return arch, float(front.low[row]), float(front.high[row])


class _Bound:
    """The most that a partial architecture can lead to, by Lagrangian relaxation of both bounds on the latency.

    For prices p, q >= 0 no architecture that meets the target beats max(logp - p * (low - target) + q * (high -
    target)), which is a sum over stages. `reached` is the best feasible architecture that turned up on the way to the
    prices where this is least, or was found from there; None where none was.
    """

    def __init__(self, fronts: list[_Front], base: float, target: float):
        self.fronts, self.base, self.target = fronts, base, target
        self.reached: _Front | None = None
        logp, low, high = (sum(np.ptp(getattr(f, name)) for f in fronts) for name in ('logp', 'low', 'high'))
        simplex = np.array([[0.0, 0.0], [logp / max(low, 1e-12), 0.0], [0.0, logp / max(high, 1e-12)]])
        found = minimize(self._relaxed, np.zeros(2), method='Nelder-Mead', options={'initial_simplex': simplex})
        self.prices = np.abs(found.x)
        self._climb()
        self.rest = np.cumsum([0.0, *(self._scores(front, self.prices).max() for front in reversed(fronts))])[::-1][1:]

    def may_win(self, front: _Front, number: int) -> np.ndarray:
        """Which rows of a front over stages 0 to `number` can lead to more than what was reached."""
        if self.reached is None:
            return np.ones(len(front.logp), dtype=bool)
        offset = (self.prices[0] - self.prices[1]) * self.target
        return self._scores(front, self.prices) + self.rest[number] + offset > self.reached.logp + 1e-9

    @staticmethod
    def _scores(front: _Front, prices: np.ndarray) -> np.ndarray:
        return front.logp - prices[0] * front.low + prices[1] * front.high

    def _climb(self) -> None:
        """From the architecture of the prices, choose for two stages at a time what is best beside the others: what
        misses the target by less, then what is more probable. Finds feasible ones among many of the same probability,
        which prices cannot tell apart."""
        rows = [self._scores(front, self.prices).argmax() for front in self.fronts]
        parts = [np.stack([front.logp, front.low, front.high]) for front in self.fronts]
        best = (np.inf, np.inf)
        while True:
            before = best
            for a, b in combinations(range(len(parts)), 2):
                rest = sum(parts[i][:, rows[i]] for i in range(len(parts)) if i not in (a, b))
                logp, low, high = parts[a][:, :, None] + parts[b][:, None, :] + np.reshape(rest, (3, 1, 1))
                missed = np.maximum(low + self.base - self.target, 0) + np.maximum(self.target - high - self.base, 0)
                at = np.where(missed == missed.min(), logp, -np.inf).argmax()
                if (missed.flat[at], -logp.flat[at]) < best:
                    best = missed.flat[at], -logp.flat[at]
                    rows[a], rows[b] = np.unravel_index(at, logp.shape)
            if best == before:
                break
        self._offer([front.take(row[None]) for front, row in zip(self.fronts, np.array(rows), strict=True)])

    def _relaxed(self, prices: np.ndarray) -> float:
        prices = np.abs(prices)
        whole = self._offer([front.take(self._scores(front, prices).argmax(keepdims=True)) for front in self.fronts])
        return float(self._scores(whole, prices)[0] + (prices[0] - prices[1]) * self.target)

    def _offer(self, parts: list[_Front]) -> _Front:
        """The architecture of one row a stage; kept where it is the best feasible one so far."""
        whole = _Front(np.zeros(1), np.full(1, self.base), np.full(1, self.base), np.zeros((1, 0), dtype=np.int8))
        for part in parts:
            whole = _merged(whole, part)
        if whole.low <= self.target <= whole.high and (self.reached is None or whole.logp > self.reached.logp):
            self.reached = whole
        return whole


def _stage_front(state: Mapping[str, Tensor], table: LatencyTable, name: str, bounded: set[str]) -> _Front:
    """All undominated ways through one stage: op of each block up to an exit."""
    space = table.space
    stage = space.stages[space.stage_names.index(name)]
    blocks = [block for block in space.blocks(table.img_size) if block.stage == name]
    exit_logp = F.log_softmax(state[f'{name}.betas'].double(), dim=0).tolist()
    path = _Front(np.zeros(1), np.zeros(1), np.zeros(1), np.zeros((1, 0), dtype=np.int8))
    ended = []
    for depth in range(stage.depth + 1):
        if depth:
            block = blocks[depth - 1]
            ops = range(len(space.ops_of(block)))
            log_alphas = state[f'{name}.{block.name}.log_alphas'].double().cpu()
            block_front = _Front(
                (log_alphas - log_alphas.max()).numpy(),  # what a choice costs against the most probable operator
                np.array([table.of(block, space.ops[i], space.ops[i].min_width(block.in_ch)) for i in ops]),
                np.array([table.of(block, space.ops[i], space.ops[i].max_width(block.in_ch)) for i in ops]),
                np.arange(len(ops), dtype=np.int8)[:, None],
            )
            path = _undominated(_merged(path, block_front), bounded)
        if depth in stage.exit_depths:
            absent = np.full((len(path.logp), stage.depth - depth), -1, dtype=np.int8)
            logp = path.logp + exit_logp[stage.exit_depths.index(depth)]
            ended.append(_Front(logp, path.low, path.high, np.concatenate([path.picks, absent], axis=1)))
    fields = ('logp', 'low', 'high', 'picks')
    whole = _Front(*(np.concatenate([getattr(front, field) for front in ended]) for field in fields))
    return _undominated(whole, bounded)


def _merged(a: _Front, b: _Front) -> _Front:
    """Every row of `a` followed by every row of `b`."""
    rows_a, rows_b = np.repeat(np.arange(len(a.logp)), len(b.logp)), np.tile(np.arange(len(b.logp)), len(a.logp))
    return _Front(
        a.logp[rows_a] + b.logp[rows_b],
        a.low[rows_a] + b.low[rows_b],
        a.high[rows_a] + b.high[rows_b],
        np.concatenate([a.picks[rows_a], b.picks[rows_b]], axis=1),
    )


def _undominated(front: _Front, bounded: set[str]) -> _Front:
    """Drop each row that another beats: at least as probable, and, as far as they are bounded, no slower at its least
    and no faster at its most.
    """
    low = front.low if 'low' in bounded else np.zeros_like(front.low)
    high = front.high if 'high' in bounded else np.zeros_like(front.high)
    order = np.lexsort((-high, low, -front.logp))
    lows: list[float] = []  # a staircase of the rows kept so far: low rising, high rising
    highs: list[float] = []
    keep = []
    for row, least, most in zip(order.tolist(), low[order].tolist(), high[order].tolist(), strict=True):
        at = bisect_right(lows, least)
        if at and highs[at - 1] >= most:
            continue
        keep.append(row)
        end = at
        while end < len(lows) and highs[end] <= most:
            end += 1
        start = at - 1 if at and lows[at - 1] == least else at
        lows[start:end], highs[start:end] = [least], [most]
    return front.take(np.array(keep, dtype=int))
