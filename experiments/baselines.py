"""Networks of a target latency that need no search: the one of most MACs, and a uniform one."""

from collections.abc import Iterator

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from models.elasticity import fit_widths
from models.latency import LatencyTable
from models.limits import block_macs
from models.search_space import Arch, Block, Op, SearchSpace, Widths
from tools.errors import BadInput

LEVELS = 9
"""Widths of an operator that the program chooses from."""


def most_macs(table: LatencyTable, space: SearchSpace, target: float) -> tuple[Arch, Widths]:
    """Return the architecture and widths of most MACs at a target latency, by an integer program.

    It chooses an exit for each stage, and for each block up to the exit an operator with one of `LEVELS` widths, from
    architectures that reach the target at their most widths. `fit_widths` fills what is left up to the target.

    Raises:
        BadInput: no network has the target.
    """
    blocks = space.blocks(table.img_size)
    options = [(block, *option) for block in blocks for option in _options(block, table, space)]
    exits = [(name, depth) for name, stage in space.named_stages for depth in stage.exit_depths]
    amount = np.array([0.0] * len(exits) + [option[3] for option in options])
    latency = np.array([0.0] * len(exits) + [option[4] for option in options])
    at_most = np.array([0.0] * len(exits) + [option[5] for option in options])
    one_exit = [[float(stage == name) for stage, _ in exits] + [0.0] * len(options) for name in space.stage_names]
    one_option = [
        [-float(stage == block.stage and depth >= int(block.name.removeprefix('block'))) for stage, depth in exits]
        + [float(option[0] == block) for option in options]
        for block in blocks
    ]
    found = milp(
        -amount,
        integrality=np.ones(len(amount)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_exit, 1, 1),
            LinearConstraint(one_option, 0, 0),
            LinearConstraint(latency, -np.inf, target - table.base),
            LinearConstraint(at_most, target - table.base, np.inf),
        ],
    )
    if found.x is None:
        raise BadInput(f'target {target:g}: no network has it; see the range of the table')
    arch, widths = {name: [] for name in space.stage_names}, space.start_widths()
    for (block, index, width, *_), taken in zip(options, found.x[len(exits) :], strict=True):
        if taken > 0.5:
            arch[block.stage].append(index)
            widths[block.stage][block.name][index] = width
    return arch, fit_widths(arch, widths, table, space, target, table.width_divisor)


def uniform(table: LatencyTable, space: SearchSpace, target: float) -> tuple[Arch, Widths]:
    """Return full depth, in all blocks the operator of most MACs that can meet a target latency, and one expansion.

    Raises:
        BadInput: no operator can.
    """
    blocks = space.blocks(table.img_size)
    for index in sorted(range(len(space.ops)), key=lambda i: -_macs_at_most(space.ops[i], blocks)):
        op = space.ops[index]
        low, high = 0.0, 1.0  # of the way from the least widths to the most

        def widths_at(share: float, index: int = index, op=op) -> Widths:
            widths = space.start_widths()
            for block in blocks:
                least, most = table.ends(block, op)
                width = table.width_divisor * round((least + share * (most - least)) / table.width_divisor)
                widths[block.stage][block.name][index] = min(max(width, least), most)
            return widths

        arch = {name: [index] * stage.depth for name, stage in space.named_stages}
        if not table.total(arch, widths_at(0), space) <= target <= table.total(arch, widths_at(1), space):
            continue
        for _ in range(40):
            middle = (low + high) / 2
            over = table.total(arch, widths_at(middle), space) > target
            low, high = (low, middle) if over else (middle, high)
        return arch, fit_widths(arch, widths_at(low), table, space, target, table.width_divisor)
    raise BadInput(f'target {target:g}: no uniform network of full depth has it')


def _options(block: Block, table: LatencyTable, space: SearchSpace) -> Iterator[tuple[int, int, float, float, float]]:
    """Yield operator, width, M MACs, latency, and latency at the most width, of what a block can be."""
    for index, op in enumerate(space.ops):
        least, most = table.ends(block, op)
        levels = np.linspace(least, most, LEVELS) / table.width_divisor
        widths = np.unique((levels.round() * table.width_divisor).clip(least, most).astype(int))
        for width, amount in zip(widths.tolist(), block_macs(block, op, widths), strict=True):
            yield index, width, amount, table.of(block, op, width), table.of(block, op, most)


def _macs_at_most(op: Op, blocks: list[Block]) -> float:
    return sum(block_macs(block, op, op.max_width(block.in_ch)) for block in blocks)
