"""The most probable architecture that can meet a latency target, as an exact integer program (HiGHS, through SciPy)."""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from models.elasticity import latency_range, width_range
from models.latency import LatencyTable
from models.parsing import parse_architecture
from models.search_space import Arch, SearchSpace
from tools.errors import BadInput

ROUNDING = 1e-9
"""Tolerance for rounding in sums of latencies, as a share of the target."""

INFEASIBLE = 2
"""Status of `milp` if no choice meets the constraints."""

OBJECTIVE_SCALE = 1e3
"""Factor on log-probabilities; HiGHS stops within 1e-6 of the optimum, so within 1e-9 of log-probability."""


def most_probable(
    state: Mapping[str, Tensor], table: LatencyTable, space: SearchSpace, target: float, divisor: int = 1
) -> Arch:
    """Return the architecture of the highest log-probability, over operators and exits, that can meet the target.

    An architecture can meet the target if its latency is at most `target` at the least widths and at least `target` at
    the most widths. A block after the exit counts with its most probable operator. So the architecture of
    `parse_architecture` has the highest log-probability of all, and is returned if it can meet the target.

    Args:
        state: has log_alphas and betas, names without `module.`.
        target: in the table's unit.
        divisor: all widths are multiples of it.

    Raises:
        BadInput: no architecture of the space can meet the target.
    """
    arch = parse_architecture(state, space)
    if can_meet(arch, table, space, target, divisor):
        return arch
    program = _Program(state, table, space, target, divisor)
    while True:
        chosen = program.solve()
        if chosen is None:
            raise BadInput(f'target {target:g}: no architecture of the space can meet it; see the range of the table')
        arch = program.architecture(chosen)
        if can_meet(arch, table, space, target, divisor):
            return arch
        program.exclude(chosen)  # it met the target only within the solver's tolerance


def check_reachable(table: LatencyTable, space: SearchSpace, target: float, divisor: int = 1) -> None:
    """Raise BadInput if no architecture of the space can meet the target."""
    state = {f'{block.stage}.{block.name}.log_alphas': torch.zeros(len(space.ops)) for block in space.blocks()}
    state |= {f'{name}.betas': torch.zeros(len(stage.exit_depths)) for name, stage in _stages(space)}
    most_probable(state, table, space, target, divisor)


def log_probability(arch: Arch, state: Mapping[str, Tensor], space: SearchSpace) -> float:
    """Return the log-probability of an architecture as `most_probable` counts it, 0 for that of `parse_architecture`
    if its exits are certain."""
    total = 0.0
    for name, stage in _stages(space):
        total += float(F.log_softmax(state[f'{name}.betas'].double(), dim=0)[stage.exit_depths.index(len(arch[name]))])
        for number, index in enumerate(arch[name], start=1):
            log_alphas = state[f'{name}.block{number}.log_alphas'].double()
            total += float(log_alphas[index] - log_alphas.max())
    return total


def can_meet(arch: Arch, table: LatencyTable, space: SearchSpace, target: float, divisor: int = 1) -> bool:
    """Return whether some widths give this architecture the target latency."""
    least, most = latency_range(arch, table, space, divisor)
    return least <= target * (1 + ROUNDING) and target * (1 - ROUNDING) <= most


class _Program:
    """Choice of one exit per stage and one operator per block, as binary variables: all exits, then [blocks * ops]."""

    def __init__(
        self, state: Mapping[str, Tensor], table: LatencyTable, space: SearchSpace, target: float, divisor: int
    ):
        self.space, self.target, self.base = space, target, table.base
        self.exits = [(name, depth) for name, stage in _stages(space) for depth in stage.exit_depths]
        blocks = space.blocks(table.img_size)
        self.ops = [(block, index) for block in blocks for index in range(len(space.ops))]
        exit_logp = [F.log_softmax(state[f'{name}.betas'].double(), dim=0).cpu() for name, _ in _stages(space)]
        log_alphas = [state[f'{block.stage}.{block.name}.log_alphas'].double().cpu() for block in blocks]
        self.logp = np.concatenate([*exit_logp, *(values - values.max() for values in log_alphas)])
        operators = [(block, space.ops[index]) for block, index in self.ops]
        no_latency = [0.0] * len(self.exits)
        ends = [(block, op, *width_range(op, block.in_ch, divisor)) for block, op in operators]
        low = [*no_latency, *(table.of(block, op, least) for block, op, least, _ in ends)]
        high = [*no_latency, *(table.of(block, op, most) for block, op, _, most in ends)]
        left = target - table.base
        self.constraints = [
            LinearConstraint([self._exits_of(name) for name, _ in _stages(space)], 1, 1),
            LinearConstraint([self._kept(*place) for place in _places(space)], 0, 0),
            LinearConstraint([low, high], [-np.inf, left], [left, np.inf]),
        ]

    def solve(self) -> np.ndarray | None:
        """Return the chosen exits and operators, bool [exits + blocks * ops]; None if no choice is feasible."""
        found = milp(
            -OBJECTIVE_SCALE * self.logp,
            integrality=np.ones(len(self.logp)),
            bounds=Bounds(0, 1),
            constraints=self.constraints,
            options={'mip_rel_gap': 0},
        )
        if found.x is None and found.status != INFEASIBLE:
            raise RuntimeError(f'the solver failed: {found.message}')
        return None if found.x is None else found.x > 0.5

    def exclude(self, chosen: np.ndarray) -> None:
        """Forbid one choice."""
        self.constraints.append(LinearConstraint(chosen.astype(float), -np.inf, chosen.sum() - 1))

    def architecture(self, chosen: np.ndarray) -> Arch:
        """Return the architecture of a choice."""
        arch: Arch = {name: [] for name in self.space.stage_names}
        for (block, index), taken in zip(self.ops, chosen[len(self.exits) :], strict=True):
            if taken:
                arch[block.stage].append(index)
        return arch

    def _exits_of(self, name: str) -> np.ndarray:
        """Return the coefficients that count the chosen exits of a stage."""
        return np.array([stage == name for stage, _ in self.exits] + [False] * len(self.ops), dtype=float)

    def _kept(self, name: str, number: int) -> np.ndarray:
        """Return the coefficients of a block's operators minus those of the stage's exits at or after the block."""
        exits = [-float(stage == name and depth >= number) for stage, depth in self.exits]
        return np.array(exits + [float((b.stage, b.name) == (name, f'block{number}')) for b, _ in self.ops])


def _stages(space: SearchSpace) -> list:
    return list(zip(space.stage_names, space.stages, strict=True))


def _places(space: SearchSpace) -> list[tuple[str, int]]:
    """Return (stage name, number from 1) of each block."""
    return [(name, number) for name, stage in _stages(space) for number in range(1, stage.depth + 1)]
