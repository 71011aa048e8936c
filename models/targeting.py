"""The most probable architecture that can meet a target and keep limits: an exact integer program (SciPy's HiGHS)."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch.nn.functional as F
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, eye_array, hstack
from torch import Tensor

from models.elasticity import latency_range, reach_of, width_range
from models.latency import TOLERANCE, LatencyTable, Limit
from models.parsing import parse_architecture
from models.search_space import Arch, Block, Op, SearchSpace
from models.width_program import RANGE_GAP, SOLVER
from tools.errors import BadInput

INFEASIBLE = 2
"""Status of `milp` if no choice meets the constraints."""

OBJECTIVE_SCALE = 1e3
"""Factor on log-probabilities; HiGHS stops within 1e-6 of the optimum, so within 1e-9 of log-probability."""


def most_probable(
    state: Mapping[str, Tensor],
    table: LatencyTable,
    space: SearchSpace,
    target: float,
    divisor: int = 1,
    limits: Sequence[Limit] = (),
) -> Arch:
    """Return the architecture of the highest log-probability, over operators and exits, that can meet the target.

    An architecture can meet the target if its latency is at most `target` at the least widths and at least `target` at
    the most widths. With limits, the latter holds for some widths that keep all of them. A block after the exit counts
    with its most probable operator. So the architecture of `parse_architecture` has the highest log-probability of all,
    and is returned if it can meet the target.

    Args:
        state: has log_alphas and betas, names without `module.`.
        target: in the table's unit.
        divisor: all widths are multiples of it.
        limits: in other tables.

    Raises:
        BadInput: no architecture of the space can meet the target.
    """
    arch = parse_architecture(state, space)
    if can_meet(arch, table, space, target, divisor, limits):
        return arch
    exit_logp = [F.log_softmax(state[f'{name}.betas'].double(), dim=0).cpu() for name, _ in space.named_stages]
    names = [f'{block.stage}.{block.name}.log_alphas' for block in space.blocks()]
    log_alphas = [state[name].double().cpu() for name in names]
    logp = np.concatenate([*exit_logp, *(values - values.max() for values in log_alphas)])
    arch = _best(_Program(table, space, divisor, limits), logp, target)
    if arch is None:
        raise BadInput(f'target {target:g}: no architecture of the space can meet it; see the range of the table')
    return arch


def is_reachable(
    table: LatencyTable, space: SearchSpace, target: float, divisor: int = 1, limits: Sequence[Limit] = ()
) -> bool:
    """Return whether some architecture of the space can meet the target and keep the limits."""
    program = _Program(table, space, divisor, limits)
    return _best(program, np.zeros(program.choices), target) is not None


def target_range(
    table: LatencyTable,
    space: SearchSpace,
    divisor: int,
    limits: Sequence[Limit],
    below: float = np.inf,
    above: float = -np.inf,
) -> tuple[float | None, float | None]:
    """Return the least and the most target that architectures can meet within the limits; None if there is none.

    Args:
        below: the most counts architectures whose least latency is at most this. So, if this target is out of reach, it
            is the next target below.
        above: the least is at least this. So, if this target is out of reach, it is the next target above.
    """
    program = _Program(table, space, divisor, limits)
    return program.least(above), program.most(below)


def log_probability(arch: Arch, state: Mapping[str, Tensor], space: SearchSpace) -> float:
    """Return the log-probability of an architecture as `most_probable` counts it, 0 for that of `parse_architecture`
    if its exits are certain."""
    total = 0.0
    for name, stage in space.named_stages:
        total += float(F.log_softmax(state[f'{name}.betas'].double(), dim=0)[stage.exit_depths.index(len(arch[name]))])
        for number, index in enumerate(arch[name], start=1):
            log_alphas = state[f'{name}.block{number}.log_alphas'].double()
            total += float(log_alphas[index] - log_alphas.max())
    return total


def can_meet(
    arch: Arch,
    table: LatencyTable,
    space: SearchSpace,
    target: float,
    divisor: int = 1,
    limits: Sequence[Limit] = (),
) -> bool:
    """Return whether some widths give this architecture the target latency, and keep the limits."""
    least, most = latency_range(arch, table, space, divisor)
    if not (least <= target * (1 + TOLERANCE) and target * (1 - TOLERANCE) <= most):
        return False
    if not limits:
        return True
    reach = reach_of(arch, table, space, target, divisor, limits)
    return table.base + reach.most >= target * (1 - TOLERANCE)


def _best(program: '_Program', logp: np.ndarray, target: float) -> Arch | None:
    """Return the architecture of the highest sum of `logp` that can meet the target; None if there is none."""
    while True:
        chosen = program.solve(-OBJECTIVE_SCALE * logp, target)
        if chosen is None:
            return None
        arch = program.architecture(chosen)
        if can_meet(arch, program.table, program.space, target, program.divisor, program.limits):
            return arch
        if program.limits:
            program.cut_off(arch, target)
        program.exclude(chosen)  # it met the target within the solver's tolerance, or with other curves


class _Program:
    """Choice of one exit per stage and one operator per block, as binary variables: all exits, then [blocks * ops].

    With limits, each operator also has a width, from 0 (least) to 1 (most), as a continuous variable, and the last
    variable is the latency that they give, without the base. Curves are straight lines there, moved so that no real
    curve is better. So the program may take an architecture that cannot meet the target, but misses none that can.
    `cut_off` then bends it towards the real curves.
    """

    def __init__(self, table: LatencyTable, space: SearchSpace, divisor: int, limits: Sequence[Limit]):
        self.table, self.space, self.divisor, self.limits = table, space, divisor, limits
        self.exits = [(name, depth) for name, stage in space.named_stages for depth in stage.exit_depths]
        blocks = space.blocks(table.img_size)
        self.ops = [(block, index) for block in blocks for index in range(len(space.ops))]
        self.choices = len(self.exits) + len(self.ops)
        self.curves = [[self._curve(one, block, space.ops[index]) for block, index in self.ops] for one in self.tables]
        self.low, self.high = (self._row([curve[end] for curve in self.curves[0]]) for end in (0, -1))
        self.constraints = [
            LinearConstraint(self._padded([self._exits_of(name) for name, _ in space.named_stages]), 1, 1),
            LinearConstraint(self._padded([self._kept(*place) for place in _places(space)]), 0, 0),
        ]
        if limits:
            self._add_widths()

    @property
    def tables(self) -> list[LatencyTable]:
        """The table of the target, then those of the limits."""
        return [self.table, *(limit.table for limit in self.limits)]

    def solve(self, objective: np.ndarray, target: float) -> np.ndarray | None:
        """Return the exits and operators of the least objective, bool [exits + blocks * ops], that may meet a target.

        Args:
            objective: of exits and operators, [exits + blocks * ops].

        Returns:
            None if no choice is feasible.
        """
        left = target - self.table.base
        if not self.limits:
            return self._solve(objective, [LinearConstraint([self.low, self.high], [-np.inf, left], [left, np.inf])])
        bounds = [[-np.inf, left * (1 - SOLVER), left * (1 - SOLVER)], [left * (1 + SOLVER), np.inf, np.inf]]
        rows = np.stack([*self._padded([self.low, self.high]).toarray(), self._latency()])
        return self._solve(objective, [LinearConstraint(rows, *bounds)])

    def least(self, above: float) -> float | None:
        """Return the least latency at least widths, of at least `above`, of all choices that keep the limits."""
        row = self._padded([self.low])
        floor = LinearConstraint(row, above - self.table.base, np.inf)
        while True:
            chosen = self._solve(self.low, [floor])
            if chosen is None:
                return None
            arch = self.architecture(chosen)
            found = latency_range(arch, self.table, self.space, self.divisor)[0]
            if can_meet(arch, self.table, self.space, found, self.divisor, self.limits):
                return found
            self.exclude(chosen)

    def most(self, below: float) -> float | None:
        """Return the most latency that keeps the limits, to `RANGE_GAP` of it.

        Args:
            below: only choices count whose latency is at most this at their least widths.
        """
        ceiling = LinearConstraint(self._padded([self.low]), -np.inf, below - self.table.base)
        latency, best = self._latency(), None
        while True:
            constraints = [ceiling]
            if best is not None:
                constraints.append(LinearConstraint(latency / (best - self.table.base), 1 + RANGE_GAP, np.inf))
            chosen = self._solve(-latency, constraints, RANGE_GAP)
            if chosen is None:
                return best
            arch = self.architecture(chosen)
            if self.limits:
                reach = reach_of(arch, self.table, self.space, np.inf, self.divisor, self.limits)
                found = self.table.base + reach.most
                self._cut(reach.multipliers)
            else:
                found = latency_range(arch, self.table, self.space, self.divisor)[1]
            if np.isfinite(found):
                best = found if best is None else max(best, found)
            self.exclude(chosen)

    def _latency(self) -> np.ndarray:
        """Return the coefficients of the most latency that a choice may have, without the base."""
        if not self.limits:
            return self.high
        return np.pad([1.0], (self.choices + len(self.ops), 0))

    def _solve(self, objective: np.ndarray, constraints: list[LinearConstraint], gap: float = 0.0) -> np.ndarray | None:
        continuous = len(self.ops) + 1 if self.limits else 0
        kinds = np.ones(self.choices + continuous)
        kinds[self.choices :] = 0
        upper = np.ones(len(kinds))
        if self.limits:
            upper[-1] = np.inf
        found = milp(
            np.pad(objective, (0, len(kinds) - len(objective))),
            integrality=kinds,
            bounds=Bounds(0, upper),
            constraints=[*self.constraints, *constraints],
            options={'mip_rel_gap': gap},
        )
        if found.x is None and found.status != INFEASIBLE:
            raise RuntimeError(f'the solver failed: {found.message}')
        return None if found.x is None else found.x[: self.choices] > 0.5

    def exclude(self, chosen: np.ndarray) -> None:
        """Forbid one choice."""
        self.constraints.append(LinearConstraint(self._padded([chosen.astype(float)]), -np.inf, chosen.sum() - 1))

    def cut_off(self, arch: Arch, target: float) -> None:
        """Bend the program by the limits' multipliers of an architecture that does not reach the target."""
        self._cut(reach_of(arch, self.table, self.space, target, self.divisor, self.limits).multipliers)

    def architecture(self, chosen: np.ndarray) -> Arch:
        """Return the architecture of a choice."""
        arch: Arch = {name: [] for name in self.space.stage_names}
        for (block, index), taken in zip(self.ops, chosen[len(self.exits) :], strict=True):
            if taken:
                arch[block.stage].append(index)
        return arch

    def _add_widths(self) -> None:
        """Add the constraints of widths: below their operators, the latency that they give, and the limits."""
        ops, zeros = len(self.ops), np.zeros(len(self.exits))
        pad = csr_array((ops, len(self.exits)))
        below = hstack([pad, -eye_array(ops), eye_array(ops), csr_array((ops, 1))])
        self.constraints.append(LinearConstraint(below, -np.inf, 0))
        for curves, limit in zip(self.curves, [None, *self.limits], strict=True):
            lows, spans = np.array([c[0] for c in curves]), np.array([c[-1] - c[0] for c in curves])
            lines = [np.linspace(c[0], c[-1], len(c)) for c in curves]
            if limit is None:
                lows = lows + [float((c - line).max()) for c, line in zip(curves, lines, strict=True)]
                row = np.concatenate([zeros, lows, spans, [-1.0]])
                self.constraints.append(LinearConstraint(row, 0, np.inf))
                self.constraints.append(LinearConstraint(np.concatenate([self.high, np.zeros(ops), [-1]]), 0, np.inf))
            else:
                room = limit.value - limit.table.base
                least = np.concatenate([zeros, lows, np.zeros(ops), [0.0]])
                lows = lows - [float((line - c).max()) for c, line in zip(curves, lines, strict=True)]
                rows = np.stack([np.concatenate([zeros, lows, spans, [0.0]]), least]) / limit.value
                self.constraints.append(LinearConstraint(rows, -np.inf, room / limit.value + SOLVER))

    def _cut(self, multipliers: np.ndarray) -> None:
        """Bound the latency by Lagrange: it is at most the sum of max(gain - multipliers @ cost) over the operators'
        widths, plus multipliers @ rooms, for any multipliers of at least 0."""
        rooms = np.array([limit.value - limit.table.base for limit in self.limits])
        gains, *costs = self.curves
        values = [
            float((gains[i] - sum(m * cost[i] for m, cost in zip(multipliers, costs, strict=True))).max())
            for i in range(len(self.ops))
        ]
        row = np.concatenate([np.zeros(len(self.exits)), values, np.zeros(len(self.ops)), [-1.0]])
        self.constraints.append(LinearConstraint(row, -float(multipliers @ rooms), np.inf))

    def _curve(self, table: LatencyTable, block: Block, op: Op) -> np.ndarray:
        """Return an operator's latencies at its possible widths."""
        low, high = width_range(op, block.in_ch, self.divisor)
        return table.curves[block.key(op)][low - 1 : high : self.divisor]

    def _row(self, of_ops: list[float]) -> np.ndarray:
        return np.array([0.0] * len(self.exits) + of_ops)

    def _padded(self, rows: list[np.ndarray]) -> csr_array:
        """Return coefficients of exits and operators with zeros for the other variables."""
        more = len(self.ops) + 1 if self.limits else 0
        return csr_array(np.pad(np.stack(rows), ((0, 0), (0, more))))

    def _exits_of(self, name: str) -> np.ndarray:
        """Return the coefficients that count the chosen exits of a stage."""
        return np.array([stage == name for stage, _ in self.exits] + [False] * len(self.ops), dtype=float)

    def _kept(self, name: str, number: int) -> np.ndarray:
        """Return the coefficients of a block's operators minus those of the stage's exits at or after the block."""
        exits = [-float(stage == name and depth >= number) for stage, depth in self.exits]
        return np.array(exits + [float((b.stage, b.name) == (name, f'block{number}')) for b, _ in self.ops])


def _places(space: SearchSpace) -> list[tuple[str, int]]:
    """Return (stage name, number from 1) of each block."""
    return [(name, number) for name, stage in space.named_stages for number in range(1, stage.depth + 1)]
