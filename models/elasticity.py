"""Elasticity-scaling of widths, channel masks, and the way between full-width weights and the widths in use.

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
from models.search_space import Arch, SearchSpace, Widths
from tools.errors import BadInput

CLOSE_ENOUGH = 1e-4
"""Share of the target that `fit_widths` leaves open."""

FILL_STEPS = 32
"""Steps that `fit_widths` may move one block at a time."""


def scale_widths(
    arch: Arch, widths: Widths, table: LatencyTable, space: SearchSpace, target: float, divisor: int = 1
) -> Widths:
    """Move the widths of the architecture's operators until its latency meets the target, coarse to fine.

    Where it is too slow, shrink over all stages, then expand over stages 2 to n, 3 to n, ..., n; where it is too fast,
    expand over stages 1 to n, 2 to n, ..., n. No step moves away from the target, and the result is slower than the
    target only where even the least widths are.

    Args:
        arch: the current architecture.
        widths: mid channels of all operators; those outside `arch` stay as they are.
        table: latency table.
        space: the search space of `arch`.
        target: ms.
        divisor: all widths stay multiples of it; the paper's rule has 1.

    Returns:
        New widths; the argument is not changed.
    """
    scaler = _Scaler(arch, widths, table, space, target, divisor)
    scaler.scale()
    return scaler.result()


def fit_widths(
    arch: Arch, widths: Widths, table: LatencyTable, space: SearchSpace, target: float, divisor: int = 1
) -> Widths:
    """`scale_widths`, then single blocks, or two that trade channels, moved to close what is left.

    Arguments and result as for `scale_widths`; never above the target where that leaves any choice.
    """
    scaler = _Scaler(arch, widths, table, space, target, divisor)
    scaler.scale()
    scaler.fill()
    return scaler.result()


def check_divisor(divisor: int, space: SearchSpace) -> None:
    """Raise BadInput where some operator has no width that is a multiple of `divisor`."""
    for block, _, op in space.positions():
        if op.max_width(block.in_ch) // divisor * divisor < op.min_width(block.in_ch):
            widths = f'{op.min_width(block.in_ch)} to {op.max_width(block.in_ch)}'
            raise BadInput(
                f'--width_divisor {divisor}: {block.stage}.{block.name} has widths from {widths}; use a smaller one'
            )


def latency_range(arch: Arch, table: LatencyTable, space: SearchSpace) -> tuple[float, float]:
    """Latency of an architecture at its least and at its most widths, in ms."""
    scaler = _Scaler(arch, space.start_widths(), table, space, target=0.0)
    return scaler.measure(scaler.low), scaler.measure(scaler.high)


class _Scaler:
    """The blocks of one architecture as flat lists, and their latency as widths move."""

    def __init__(
        self, arch: Arch, widths: Widths, table: LatencyTable, space: SearchSpace, target: float, divisor: int = 1
    ):
        self.start, self.target, self.divisor, self.last_stage = widths, target, divisor, len(space.stages)
        self.picks = space.chosen(arch, table.img_size)
        ops = [space.ops[index] for _, index in self.picks]
        self.stage = [space.stage_names.index(block.stage) + 1 for block, _ in self.picks]
        places = [(op, block.in_ch) for (block, _), op in zip(self.picks, ops, strict=True)]
        self.low = [-(-op.min_width(in_ch) // divisor) * divisor for op, in_ch in places]
        self.high = [op.max_width(in_ch) // divisor * divisor for op, in_ch in places]
        if any(low > high for low, high in zip(self.low, self.high, strict=True)):
            raise BadInput(f'width divisor {divisor}: some blocks have no such width; use a smaller one')
        self.curves = [table.curves[block.key(op)] for (block, _), op in zip(self.picks, ops, strict=True)]
        self.base = table.base
        self.widths = [
            min(max(round(widths[block.stage][block.name][index] / divisor) * divisor, low), high)
            for (block, index), low, high in zip(self.picks, self.low, self.high, strict=True)
        ]
        self.latency = self.measure(self.widths)

    def measure(self, widths: list[int]) -> float:
        """Latency in ms with these widths, one a block."""
        return self.base + sum(float(curve[w - 1]) for curve, w in zip(self.curves, widths, strict=True))

    def scale(self) -> None:
        """All passes of the paper."""
        if self.latency > self.target:
            self.shrink(first_stage=1)
            starts = range(2, self.last_stage + 1)
        else:
            starts = range(1 if self.latency < self.target else self.last_stage + 1, self.last_stage + 1)
        for first in starts:
            self.expand(first_stage=first)

    def shrink(self, first_stage: int) -> None:
        """Step down until the target is met (that step is kept) or every block of the range is at its least width."""
        ratios = self.ratios(first_stage)
        while self.latency > self.target:
            stepped = self.stepped(ratios, -1)
            if stepped == self.widths:
                break
            self.widths, self.latency = stepped, self.measure(stepped)

    def expand(self, first_stage: int) -> None:
        """Step up until the next step would pass the target (it is dropped) or every block is at its most."""
        ratios = self.ratios(first_stage)
        while True:
            stepped = self.stepped(ratios, +1)
            latency = self.measure(stepped)
            if stepped == self.widths or latency > self.target:
                break
            self.widths, self.latency = stepped, latency

    def fill(self) -> None:
        """Move one or two blocks at a time by whatever fills most of the gap to the target, until it is small enough or
        nothing fills more of it. Two blocks can trade channels where single ones are too coarse."""
        while (gap := self.target - self.latency) > CLOSE_ENOUGH * self.target:
            moves = [self.moves(i) for i in range(len(self.widths))]
            best = (0.0, self.widths)
            for i, (widths_i, gains_i) in enumerate(moves):
                for j in range(i + 1, len(moves)):
                    widths_j, gains_j = moves[j]
                    partner = np.searchsorted(gains_j, gap - gains_i, side='right') - 1
                    gains = np.where(partner >= 0, gains_i + gains_j[partner], -np.inf)
                    at = int(gains.argmax())
                    if best[0] < gains[at] <= gap:
                        stepped = list(self.widths)
                        stepped[i], stepped[j] = int(widths_i[at]), int(widths_j[partner[at]])
                        best = (float(gains[at]), stepped)
            latency = self.measure(best[1])
            if not self.latency < latency <= self.target:
                break
            self.widths, self.latency = best[1], latency

    def moves(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Widths that `fill` may give a block, the present one among them, and what each adds to the latency."""
        reach = FILL_STEPS * self.divisor
        low, high = max(self.widths[i] - reach, self.low[i]), min(self.widths[i] + reach, self.high[i])
        widths = np.arange(low, high + 1, self.divisor)
        return widths, self.curves[i][widths - 1] - self.curves[i][self.widths[i] - 1]

    def ratios(self, first_stage: int) -> dict[int, int]:
        """Channels a step for the blocks of a range, in proportion to their widths: block position -> channels."""
        blocks = [i for i, stage in enumerate(self.stage) if stage >= first_stage]
        smallest = min((self.widths[i] for i in blocks), default=1)
        return {i: round(self.widths[i] / smallest) for i in blocks}

    def stepped(self, ratios: dict[int, int], sign: int) -> list[int]:
        """The widths one step on, each within its bounds."""
        widths = list(self.widths)
        for i, ratio in ratios.items():
            widths[i] = min(max(widths[i] + sign * ratio * self.divisor, self.low[i]), self.high[i])
        return widths

    def result(self) -> Widths:
        """The widths of all operators, those of the architecture as they are now."""
        widths = {stage: {block: dict(ops) for block, ops in blocks.items()} for stage, blocks in self.start.items()}
        for (block, index), width in zip(self.picks, self.widths, strict=True):
            widths[block.stage][block.name][index] = width
        return widths


def start_masks(space: SearchSpace) -> Masks:
    """Masks that keep the first channels of every operator, as many as a search starts with."""
    masks: Masks = OrderedDict()
    for block, index, op in space.positions():
        mask = (torch.arange(op.max_width(block.in_ch)) < op.start_width(block.in_ch)).float()
        masks.setdefault(block.stage, OrderedDict()).setdefault(block.name, OrderedDict())[index] = mask
    return masks


def update_masks(masks: Masks, widths: Widths, full: Mapping[str, Tensor]) -> Masks:
    """New masks of the given widths. An operator whose width changed keeps the channels whose full-width depthwise
    kernels have the largest L1 norm (lower channel first where equal).

    Args:
        masks: present masks, not changed.
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
    """Fresh weights of the supernet with every operator at its maximum width, and its architecture parameters."""
    net = Network(space.max_widths(), num_classes, space)
    return {name: p.detach().to(device) for name, p in net.named_parameters()}


@torch.no_grad()
def align_operators(full: Mapping[str, Tensor], space: SearchSpace) -> None:
    """Let all operators of a block start from the weights of its largest: the first channels, the middle of kernels.

    Not in the paper. Operators that start apart each write features of their own, and the blocks behind them first have
    to learn to read any of them, for which searches of a few thousand steps are too short.
    """
    for block in space.blocks():
        ops = [(op.kernel, op.expand, op.se, index) for index, op in enumerate(space.ops)]
        names = [f'{block.stage}.{block.name}.m_ops.{index}' for *_, index in sorted(ops, reverse=True)]
        for weight in MID_DIMS:
            source = full.get(f'{names[0]}.{weight}')
            for target in (full.get(f'{name}.{weight}') for name in names[1:]):
                if source is not None and target is not None:
                    common = [min(sizes) for sizes in zip(source.shape, target.shape, strict=True)]
                    _middle(target, common).copy_(_middle(source, common))


def _middle(weight: Tensor, sizes: list[int]) -> Tensor:
    """The first channels and the middle pixels of a weight, as many as `sizes` says."""
    for dim, size in enumerate(sizes):
        weight = weight.narrow(dim, (weight.shape[dim] - size) // 2 if dim > 1 else 0, size)
    return weight


@torch.no_grad()
def gather(net: Network, full: Mapping[str, Tensor], masks: Masks) -> None:
    """Give `net` the widths of the masks, and copy the channels that they keep into it."""
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
    """(name, parameter, mask of its mid channels or None) for every parameter of the supernet."""
    for name, p in net.named_parameters():
        yield name, p, None if _mid_dim(name) is None else _mask(masks, name)


def _mid_dim(name: str) -> int | None:
    """Which dimension of a supernet's parameter runs over mid channels that a mask selects."""
    _, is_op, rest = name.partition('.m_ops.')
    return MID_DIMS.get(rest.partition('.')[2]) if is_op else None


def _mask(masks: Masks, name: str) -> Tensor:
    stage, block, _, index, _ = name.split('.', 4)
    return masks[stage][block][int(index)]


def _keeps_first(mask: Tensor) -> bool:
    return bool(mask[: int(mask.sum())].all())


def _kept(weight: Tensor, name: str, mask: Tensor) -> Tensor:
    """The channels of a full-width weight that a mask keeps; a view where they are the first ones."""
    if _keeps_first(mask):
        return weight.narrow(_mid_dim(name), 0, int(mask.sum()))
    return weight.index_select(_mid_dim(name), mask.nonzero().flatten().to(weight.device))
