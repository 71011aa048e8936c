"""Elasticity-scaling of widths, channel masks, and copies between full-width weights and the widths in use.

Paper: width level, section 3.4 and algorithm 1.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from models.latency import LatencyTable
from models.layers import MID_DIMS
from models.model_search import Network
from models.parsing import Masks, mask_widths
from models.search_space import Arch, Op, SearchSpace, Widths
from tools.errors import BadInput

FIT_GAP = 1e-4  # share of the target that a fit may leave: 1.5 us of 15 ms, far below any clock's noise
FIT_STEPS = 32  # most steps by which a fit moves one block; more would only cost time, since two blocks can trade


def width_range(op: Op, in_ch: int, divisor: int) -> tuple[int, int]:
    """Return the least and the most mid channels of an operator that are multiples of `divisor`."""
    return -(-op.min_width(in_ch) // divisor) * divisor, op.max_width(in_ch) // divisor * divisor


def check_divisor(divisor: int, space: SearchSpace) -> None:
    """Raise BadInput if some operator has no width that is a multiple of `divisor`."""
    for block, _, op in space.positions():
        low, high = width_range(op, block.in_ch, divisor)
        if low > high:
            widths = f'{op.min_width(block.in_ch)} to {op.max_width(block.in_ch)}'
            raise BadInput(
                f'--width_divisor {divisor}: {block.stage}.{block.name} has widths from {widths}; use a smaller one'
            )


class Scaler:
    """Bounds and latency curves of one architecture's blocks. Inside, widths are lists over blocks.

    Args:
        divisor: all widths are multiples of it; 1 in the paper.
    """

    def __init__(self, arch: Arch, table: LatencyTable, space: SearchSpace, divisor: int):
        self.divisor, self.base = divisor, table.base
        self.picks = space.chosen(arch, table.img_size)
        self.low, self.high, self.curves, self.stage = [], [], [], []
        for block, index in self.picks:
            op = space.ops[index]
            low, high = width_range(op, block.in_ch, divisor)
            self.low.append(low)
            self.high.append(high)
            self.curves.append(table.curves[block.key(op)])
            self.stage.append(space.stage_names.index(block.stage) + 1)
        self.last_stage = len(space.stages)

    def reach(self) -> tuple[float, float]:
        """Return the latency at the least and at the most widths."""
        return self.latency(self.low), self.latency(self.high)

    def latency(self, widths: list[int]) -> float:
        """Return the latency of the whole network."""
        return self.base + sum(float(curve[w - 1]) for curve, w in zip(self.curves, widths, strict=True))

    def scale(self, widths: Widths, target: float) -> Widths:
        """Return widths that meet the target, coarse to fine: the passes of the paper's algorithm 1.

        If it is too slow, shrink over all stages, then expand over stages 2 to n, 3 to n, ..., n. If it is too fast,
        expand over stages 1 to n, 2 to n, ..., n. No step moves away from the target. The result is slower than the
        target only if the least widths are.
        """
        return self._with(widths, self._scaled(self._own(widths), target))

    def fit(self, widths: Widths, target: float) -> Widths:
        """Scale, then close the remaining gap by moving one block, or two against each other."""
        return self._with(widths, self._filled(self._scaled(self._own(widths), target), target))

    def _scaled(self, widths: list[int], target: float) -> list[int]:
        latency = self.latency(widths)
        if latency == target:
            return widths
        first_stage = 1
        if latency > target:
            widths = self._shrunk(widths, target)
            first_stage = 2
        for stage in range(first_stage, self.last_stage + 1):
            widths = self._expanded(widths, target, stage)
        return widths

    def _shrunk(self, widths: list[int], target: float) -> list[int]:
        """Step down to the first widths that meet the target, or to the least widths."""
        steps = self._steps(widths, first_stage=1)
        while self.latency(widths) > target:
            stepped = self._stepped(widths, steps, -1)
            if stepped == widths:
                break
            widths = stepped
        return widths

    def _expanded(self, widths: list[int], target: float, first_stage: int) -> list[int]:
        """Step up to the last widths that meet the target, or to the most widths of these stages."""
        steps = self._steps(widths, first_stage)
        while True:
            stepped = self._stepped(widths, steps, +1)
            if stepped == widths or self.latency(stepped) > target:
                return widths
            widths = stepped

    def _steps(self, widths: list[int], first_stage: int) -> dict[int, int]:
        """Return block -> multiples per step, in proportion to the widths, so that blocks keep their proportions."""
        blocks = [i for i, stage in enumerate(self.stage) if stage >= first_stage]
        smallest = min((widths[i] for i in blocks), default=1)
        return {i: round(widths[i] / smallest) for i in blocks}

    def _stepped(self, widths: list[int], steps: dict[int, int], sign: int) -> list[int]:
        stepped = list(widths)
        for i, step in steps.items():
            moved = stepped[i] + sign * step * self.divisor
            stepped[i] = min(max(moved, self.low[i]), self.high[i])
        return stepped

    def _filled(self, widths: list[int], target: float) -> list[int]:
        """Move one or two blocks at a time so as to fill most of the gap, until it is small or no move fills more."""
        latency = self.latency(widths)
        while (gap := target - latency) > FIT_GAP * target:
            moved = self._best_move(widths, gap)
            after = self.latency(moved)
            if not latency < after <= target:
                break
            widths, latency = moved, after
        return widths

    def _best_move(self, widths: list[int], gap: float) -> list[int]:
        """Return the widths after the move of two blocks that fills most of the gap; one of them may stay."""
        moves = [self._moves(i, widths[i]) for i in range(len(widths))]
        best_gain, best = 0.0, widths
        for i, (widths_i, gains_i) in enumerate(moves):
            for j in range(i + 1, len(moves)):
                widths_j, gains_j = moves[j]
                # curves rise, so the best partner of each move is the last one that still fits the gap
                partner = np.searchsorted(gains_j, gap - gains_i, side='right') - 1
                gains = np.where(partner >= 0, gains_i + gains_j[partner], -np.inf)
                at = int(gains.argmax())
                if best_gain < gains[at] <= gap:
                    best_gain, best = float(gains[at]), list(widths)
                    best[i], best[j] = int(widths_i[at]), int(widths_j[partner[at]])
        return best

    def _moves(self, i: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the widths that a block may move to, its own included, and the latency that each adds."""
        reach = FIT_STEPS * self.divisor
        low, high = max(width - reach, self.low[i]), min(width + reach, self.high[i])
        widths = np.arange(low, high + 1, self.divisor)
        return widths, self.curves[i][widths - 1] - self.curves[i][width - 1]

    def _own(self, widths: Widths) -> list[int]:
        """Return the blocks' widths, as the nearest multiples within their bounds."""
        own = []
        for (block, index), low, high in zip(self.picks, self.low, self.high, strict=True):
            nearest = round(widths[block.stage][block.name][index] / self.divisor) * self.divisor
            own.append(min(max(nearest, low), high))
        return own

    def _with(self, widths: Widths, own: list[int]) -> Widths:
        """Return the widths of all operators; only those of the architecture change."""
        new = {stage: {block: dict(ops) for block, ops in blocks.items()} for stage, blocks in widths.items()}
        for (block, index), width in zip(self.picks, own, strict=True):
            new[block.stage][block.name][index] = width
        return new


def start_masks(space: SearchSpace) -> Masks:
    """Return masks that keep the first channels of every operator, as many as a search starts with."""
    masks: Masks = OrderedDict()
    for block, index, op in space.positions():
        mask = (torch.arange(op.max_width(block.in_ch)) < op.start_width(block.in_ch)).float()
        masks.setdefault(block.stage, OrderedDict()).setdefault(block.name, OrderedDict())[index] = mask
    return masks


def update_masks(masks: Masks, widths: Widths, full: Mapping[str, Tensor]) -> Masks:
    """Return masks of the given widths.

    An operator whose width changed keeps the channels whose full-width depthwise kernels have the largest L1 norm; of
    equal ones, the lower channel.

    Args:
        masks: current masks; not changed.
        widths: wanted mid channels.
        full: full-width weights, see `full_weights`.
    """
    new: Masks = OrderedDict()
    for stage, blocks in masks.items():
        for block, ops in blocks.items():
            for index, mask in ops.items():
                width = widths[stage][block][index]
                if width != int(mask.sum()):
                    kernel = full[f'{stage}.{block}.m_ops.{index}.depth_conv.conv.weight']
                    order = kernel.abs().sum((1, 2, 3)).argsort(descending=True, stable=True).cpu()
                    mask = torch.zeros_like(mask)
                    mask[order[:width]] = 1
                new.setdefault(stage, OrderedDict()).setdefault(block, OrderedDict())[index] = mask
    return new


def full_weights(num_classes: int, device: torch.device, space: SearchSpace) -> dict[str, Tensor]:
    """Return fresh weights and architecture parameters of the supernet, every operator at its maximum width."""
    net = Network(space.max_widths(), num_classes, space)
    return {name: p.detach().to(device) for name, p in net.named_parameters()}


@torch.no_grad()
def align_operators(full: Mapping[str, Tensor], space: SearchSpace) -> None:
    """Copy the weights of each block's `largest_op` to its others: first channels, centres of kernels. In place.

    Not in the paper. Operators with unrelated weights compute unrelated features, and the blocks after them must learn
    to handle all of them. Searches of a few thousand steps are too short for that.
    """
    for block in space.blocks():
        names = [f'{block.stage}.{block.name}.m_ops.{index}' for index in range(len(space.ops))]
        largest = names.pop(space.largest_op)
        for weight in MID_DIMS:
            source = full.get(f'{largest}.{weight}')
            for target in (full.get(f'{name}.{weight}') for name in names):
                if source is not None and target is not None:
                    common = [min(sizes) for sizes in zip(source.shape, target.shape, strict=True)]
                    _middle(target, common).copy_(_middle(source, common))


def _middle(weight: Tensor, sizes: list[int]) -> Tensor:
    """Return a view of the first channels and central pixels of a weight, of shape `sizes`."""
    for dim, size in enumerate(sizes):
        weight = weight.narrow(dim, (weight.shape[dim] - size) // 2 if dim > 1 else 0, size)
    return weight


@torch.no_grad()
def gather(net: Network, full: Mapping[str, Tensor], masks: Masks) -> None:
    """Give `net` the widths of the masks, and copy the kept channels of the full-width weights into it."""
    net.set_widths(mask_widths(masks))
    for name, p, mask in _masked(net, masks):
        p.copy_(full[name] if mask is None else _kept(full[name], name, mask))


@torch.no_grad()
def scatter(net: Network, full: Mapping[str, Tensor], masks: Masks) -> None:
    """Write the weights of `net` back into the full-width weights; channels that the masks drop keep their values."""
    for name, p, mask in _masked(net, masks):
        if mask is None:
            full[name].copy_(p)
        elif _keeps_first(mask):
            _kept(full[name], name, mask).copy_(p)
        else:
            full[name].index_copy_(_mid_dim(name), mask.nonzero().flatten().to(p.device), p)


def _masked(net: Network, masks: Masks) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Yield (name, parameter, mask of its mid channels or None) for every parameter of the supernet."""
    for name, p in net.named_parameters():
        yield name, p, None if _mid_dim(name) is None else _mask(masks, name)


def _mid_dim(name: str) -> int | None:
    """Return the dimension of a parameter that a mask selects from; None if no mask applies."""
    _, is_op, rest = name.partition('.m_ops.')
    return MID_DIMS.get(rest.partition('.')[2]) if is_op else None


def _mask(masks: Masks, name: str) -> Tensor:
    stage, block, _, index, _ = name.split('.', 4)
    return masks[stage][block][int(index)]


def _keeps_first(mask: Tensor) -> bool:
    return bool(mask[: int(mask.sum())].all())


def _kept(weight: Tensor, name: str, mask: Tensor) -> Tensor:
    """Return the channels of a full-width weight that a mask keeps; a view if they are the first ones."""
    if _keeps_first(mask):
        return weight.narrow(_mid_dim(name), 0, int(mask.sum()))
    return weight.index_select(_mid_dim(name), mask.nonzero().flatten().to(weight.device))
