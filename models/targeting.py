"""The target of a search, and the most probable architecture that can meet it: an exact integer program."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import LinearConstraint, milp
from torch import Tensor

from models.elasticity import Scaler, width_range
from models.latency import TOLERANCE, LatencyLoss, LatencyTable
from models.parsing import parse_architecture
from models.search_space import Arch, SearchSpace, Widths
from tools.errors import BadInput

INFEASIBLE = 2  # status of `milp` if no choice meets the constraints
OBJECTIVE_SCALE = 1e3  # HiGHS stops within 1e-6 of the optimum, so within 1e-9 of log-probability
OFF_TARGET = 0.01  # miss that proportional steps may leave; more comes only of coarse steps (`divisor`)


@dataclass(frozen=True)
class Target:
    """A latency that networks of a space should have.

    Attributes:
        value: in the table's unit.
        divisor: all widths are multiples of it; 1 in the paper.
    """

    table: LatencyTable
    space: SearchSpace
    value: float
    divisor: int

    def at(self, value: float) -> 'Target':
        """Return another target in the same table."""
        return replace(self, value=value)

    def scaler(self, arch: Arch) -> Scaler:
        """Return what scales and fits the widths of an architecture."""
        return Scaler(arch, self.table, self.space, self.divisor)

    def reach(self, arch: Arch) -> tuple[float, float]:
        """Return the latency of an architecture at its least and at its most widths."""
        return self.scaler(arch).reach()

    def can_meet(self, arch: Arch) -> bool:
        """Return whether some widths give an architecture this latency."""
        least, most = self.reach(arch)
        return least <= self.value * (1 + TOLERANCE) and self.value * (1 - TOLERANCE) <= most

    def latency(self, arch: Arch, widths: Widths) -> float:
        """Return the latency of a network."""
        return self.table.total(arch, widths, self.space)

    def loss(self, widths: Widths, weight: float, device: torch.device) -> LatencyLoss:
        """Return the latency loss of a mixture of operators of these widths. `weight`: lambda of the paper."""
        matrix = self.table.matrix(widths, self.space).to(device)
        return LatencyLoss(self.table.base, matrix, self.space, self.value, weight)

    def scaled(self, arch: Arch, widths: Widths) -> Widths:
        """Return widths that meet the target by elasticity-scaling; fitted if coarse steps miss it by over 1 %."""
        scaler = self.scaler(arch)
        scaled = scaler.scale(widths, self.value)
        if abs(self.latency(arch, scaled) / self.value - 1) > OFF_TARGET:
            return scaler.fit(widths, self.value)
        return scaled

    def fitted(self, arch: Arch, widths: Widths) -> Widths:
        """Return widths that meet the target as closely as single channels allow."""
        return self.scaler(arch).fit(widths, self.value)

    def most_probable(self, state: Mapping[str, Tensor]) -> Arch:
        """Return the architecture of the highest log-probability that can meet the target.

        Args:
            state: has log_alphas and betas, names without `module.`.

        Raises:
            BadInput: no architecture of the space can meet the target.
        """
        arch = parse_architecture(state, self.space)
        if self.can_meet(arch):
            return arch
        found = next(self.by_probability(state), None)
        if found is None:
            raise BadInput(f"target {self.value:g}: no architecture of the space can meet it; see the table's range")
        return found

    def by_probability(self, state: Mapping[str, Tensor]) -> Iterator[Arch]:
        """Yield the architectures that can meet the target, the most probable first."""
        program = _Program(self)
        yield from program.choose(-OBJECTIVE_SCALE * program.log_probabilities(state))

    def check(self) -> None:
        """Raise BadInput with the nearest possible targets if no architecture can meet this one."""
        if self.is_reachable():
            return
        near = ' and '.join(f'{value:.4f}' for value in self.nearest())
        raise BadInput(
            f'target {self.value:.4f} {self.table.unit}: no architecture of the space can meet it; '
            f'the nearest targets that can be met: {near}'
        )

    def is_reachable(self) -> bool:
        """Return whether some architecture can meet the target."""
        program = _Program(self)
        return next(program.choose(np.zeros(program.size)), None) is not None

    def nearest(self) -> list[float]:
        """Return the nearest possible targets, below and above, if no architecture can meet this one."""
        program, left = _Program(self), self.value - self.table.base
        # an architecture below the target has all its widths below; one above has its least widths above
        below = program.solve(-program.high, LinearConstraint(program.low, -np.inf, left))
        above = program.solve(program.low, LinearConstraint(program.low, left, np.inf))
        found = [] if below is None else [self.reach(program.architecture(below))[1]]
        return found if above is None else [*found, self.reach(program.architecture(above))[0]]


def log_probability(arch: Arch, state: Mapping[str, Tensor], space: SearchSpace) -> float:
    """Return the log-probability of an architecture, over exits and operators.

    A block after the exit counts with its most probable operator, so that depths compare.
    """
    total = 0.0
    for name, stage in space.named_stages:
        exits = F.log_softmax(state[f'{name}.betas'].double(), dim=0)
        total += float(exits[stage.exit_depths.index(len(arch[name]))])
        for number, index in enumerate(arch[name], start=1):
            log_alphas = state[f'{name}.block{number}.log_alphas'].double()
            total += float(log_alphas[index] - log_alphas.max())
    return total


class _Program:
    """Choice of one exit per stage and one operator per block up to it, as binary variables: [exits + blocks * ops]."""

    def __init__(self, target: Target):
        self.target, self.space, table = target, target.space, target.table
        self.exits = [(name, depth) for name, stage in self.space.named_stages for depth in stage.exit_depths]
        blocks, count = self.space.blocks(table.img_size), len(self.space.ops)
        self.ops = [(block, index) for block in blocks for index in range(count)]
        self.size = len(self.exits) + len(self.ops)
        self.low, self.high = np.zeros(self.size), np.zeros(self.size)
        for place, (block, index) in enumerate(self.ops, start=len(self.exits)):
            op = self.space.ops[index]
            low, high = width_range(op, block.in_ch, target.divisor)
            curve = table.curves[block.key(op)]
            self.low[place], self.high[place] = curve[low - 1], curve[high - 1]
        self.constraints = [self._one_exit(), self._ops_up_to_exit()]

    def choose(self, objective: np.ndarray) -> Iterator[Arch]:
        """Yield the architectures that can meet the target, those of the least objective first."""
        left = self.target.value - self.target.table.base
        in_reach = LinearConstraint([self.low, self.high], [-np.inf, left], [left, np.inf])
        while (chosen := self.solve(objective, in_reach)) is not None:
            arch = self.architecture(chosen)
            if self.target.can_meet(arch):  # else it met the target only within the solver's tolerance
                yield arch
            self.constraints.append(LinearConstraint(chosen.astype(float), -np.inf, chosen.sum() - 1))

    def solve(self, objective: np.ndarray, constraint: LinearConstraint) -> np.ndarray | None:
        """Return the choice of the least objective, bool [exits + blocks * ops]; None if none is feasible."""
        kinds, constraints = np.ones(self.size), [*self.constraints, constraint]
        found = milp(objective, integrality=kinds, bounds=(0, 1), constraints=constraints, options={'mip_rel_gap': 0})
        if found.x is not None:
            return found.x > 0.5
        if found.status != INFEASIBLE:
            raise RuntimeError(f'the solver failed: {found.message}')
        return None

    def architecture(self, chosen: np.ndarray) -> Arch:
        """Return the architecture of a choice."""
        arch: Arch = {name: [] for name in self.space.stage_names}
        for (block, index), taken in zip(self.ops, chosen[len(self.exits) :], strict=True):
            if taken:
                arch[block.stage].append(index)
        return arch

    def log_probabilities(self, state: Mapping[str, Tensor]) -> np.ndarray:
        """Return the log-probability of each exit and operator; see `log_probability`."""
        parts = [F.log_softmax(state[f'{name}.betas'].double(), dim=0).cpu() for name in self.space.stage_names]
        for block in self.space.blocks():
            log_alphas = state[f'{block.stage}.{block.name}.log_alphas'].double().cpu()
            parts.append(log_alphas - log_alphas.max())
        return np.concatenate(parts)

    def _one_exit(self) -> LinearConstraint:
        rows = np.zeros((len(self.space.stages), self.size))
        for place, (name, _) in enumerate(self.exits):
            rows[self.space.stage_names.index(name), place] = 1
        return LinearConstraint(rows, 1, 1)

    def _ops_up_to_exit(self) -> LinearConstraint:
        """A block has one operator if the stage's exit is at or after the block, else none."""
        rows = []
        for block in self.space.blocks():
            number = int(block.name.removeprefix('block'))
            exits = [-float(name == block.stage and depth >= number) for name, depth in self.exits]
            ops = [float((other.stage, other.name) == (block.stage, block.name)) for other, _ in self.ops]
            rows.append(exits + ops)
        return LinearConstraint(np.array(rows), 0, 0)
