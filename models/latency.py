"""Latency of networks and of the mixture by a table, and its loss. For files see `models.tables`."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.config import NetworkConfig
from models.search_space import Arch, Block, Op, SearchSpace, Widths
from tools.errors import BadInput

ROUNDING = 5e-5  # of the ends of the reachable range when they are printed
TOLERANCE = 1e-9  # for rounding in sums of latencies, as a share of what they are compared with


@dataclass(frozen=True)
class LatencyTable:
    """A checked table for one search space and input size. All latencies are in ms, or the unit in `meta`."""

    base: float
    curves: dict[str, np.ndarray]
    """Latency by mid channels: curves[key][width - 1]."""
    meta: dict
    img_size: int

    @property
    def unit(self) -> str:
        """Unit of the entries; 'ms' if `meta` has none."""
        return str(self.meta.get('unit', 'ms'))

    @property
    def width_divisor(self) -> int:
        """Multiples of mid channels at which the device is fast. Other widths may take longer than wider ones."""
        return self.setting('width_divisor', 1)

    def is_of(self, device: str) -> bool:
        """Return whether the table is of the device of this name; True if it does not say."""
        return self.meta.get('device', device) == device

    def setting(self, name: str, usual: int) -> int:
        """Return the `batch_size`, `threads` or `width_divisor` of the table; `usual` if `meta` has none.

        Raises:
            BadInput: not a whole number of at least 1.
        """
        value = self.meta.get(name, usual)
        if type(value) is not int or value < 1:
            raise BadInput(f"the latency table's {name} is {value!r}, should be a whole number of at least 1")
        return value

    def of(self, block: Block, op: Op, width: int) -> float:
        """Return the latency of one operator."""
        return float(self.curves[block.key(op)][width - 1])

    def ends(self, block: Block, op: Op) -> tuple[int, int]:
        """Return the least and the most width of an operator that are multiples of the table's divisor."""
        low, high = op.min_width(block.in_ch), op.max_width(block.in_ch)
        return min(-(-low // self.width_divisor) * self.width_divisor, high), max(high - high % self.width_divisor, low)

    def total(self, arch: Arch, widths: Widths, space: SearchSpace) -> float:
        """Return the latency of a whole network: base plus its blocks."""
        return self.base + sum(
            self.of(block, space.ops[index], widths[block.stage][block.name][index])
            for block, index in space.chosen(arch, self.img_size)
        )

    def of_config(self, config: NetworkConfig) -> float:
        """Return the latency of the network in a config.

        Raises:
            BadInput: a block is not in this table.
        """
        total = self.base
        for place, spec, key in config.table_keys(self.img_size):
            if key not in self.curves or spec.mid_channels > len(self.curves[key]):
                stage, _, index = place.partition('.')
                raise BadInput(
                    f'{stage}.{int(index) + 1} ({key}, {spec.mid_channels} mid channels) is not in the latency table'
                )
            total += float(self.curves[key][spec.mid_channels - 1])
        return total

    def reach(self, space: SearchSpace) -> tuple[float, float, float]:
        """Return the latencies that networks of the space can have: (least, least at full depth, most)."""
        least = shallow = most = self.base
        blocks = space.blocks(self.img_size)
        for name, stage in space.named_stages:
            for depth, block in enumerate((b for b in blocks if b.stage == name), start=1):
                ends = [(op, *self.ends(block, op)) for op in space.ops]
                low = min(self.of(block, op, width) for op, width, _ in ends)
                least += low if depth <= stage.exit_depths[0] else 0
                shallow += low
                most += max(self.of(block, op, width) for op, _, width in ends)
        return least, shallow, most

    def target(self, text: str, space: SearchSpace) -> float:
        """Return the target of `--target_lat`: a number, or a share such as '60%' of the way from least to most.

        Raises:
            BadInput: not a number, or out of reach for every network of the space.
        """
        least, shallow, most = self.reach(space)
        target = self.amount(text, space)
        if not least - ROUNDING <= target <= most + ROUNDING:
            raise BadInput(
                f'--target_lat {text}: should be from {least:.4f} to {most:.4f} {self.unit}, or a share such as 60%; '
                f'at full depth networks start at {shallow:.4f} {self.unit}'
            )
        return min(max(target, least), most)

    def amount(self, text: str, space: SearchSpace) -> float:
        """Return the number in a text, or a share such as '60%' of the way from least to most; NaN if it is neither."""
        least, _, most = self.reach(space)
        try:
            value = float(text.removesuffix('%'))
        except ValueError:
            return math.nan
        return least + (most - least) * value / 100 if text.endswith('%') else value

    def matrix(self, widths: Widths, space: SearchSpace) -> Tensor:
        """Return the latency of every operator at its present width, [blocks, ops] float32."""
        return torch.tensor(
            [
                [self.of(block, op, widths[block.stage][block.name][i]) for i, op in enumerate(space.ops)]
                for block in space.blocks(self.img_size)
            ]
        )


def expected_latency(
    base: float, matrix: Tensor, op_weights: Tensor, depth_weights: list[Tensor], space: SearchSpace
) -> Tensor:
    """Return the latency of the mixture (paper, section 3.3), a scalar, differentiable in both kinds of weights.

    An exit has the latency of all blocks before it; a stage has that of its exits, weighted by softmax(betas).

    Args:
        base: of the fixed layers.
        matrix: of each operator, [blocks, ops].
        op_weights: mixture weights, [blocks, ops].
        depth_weights: of each stage, [exits].
    """
    per_block = (op_weights * matrix).sum(dim=-1)
    total = per_block.new_zeros(()) + base
    depths = [stage.depth for stage in space.stages]
    for blocks, stage, weights in zip(per_block.split(depths), space.stages, depth_weights, strict=True):
        at_depth = F.pad(blocks.cumsum(0), (1, 0))
        total = total + weights @ at_depth[stage.exit_depths.start :]
    return total


class LatencyLoss:
    """Loss of a mixture's latency, for the widths of one epoch: weight * |latency / target - 1| (paper, section 3.1).

    Args:
        matrix: latency of each operator, [blocks, ops], from `LatencyTable.matrix`, on the device of the search.
        target: in the table's unit.
        weight: lambda of the paper.
    """

    def __init__(self, base: float, matrix: Tensor, space: SearchSpace, target: float, weight: float):
        self.base, self.matrix, self.space = base, matrix, space
        self.target, self.weight = target, weight

    def __call__(self, op_weights: Tensor, depth_weights: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the loss and the latency, both scalars. Arguments: see `expected_latency`."""
        latency = expected_latency(self.base, self.matrix, op_weights, depth_weights, self.space)
        return self.weight * (latency / self.target - 1).abs(), latency
