"""Elasticity-scaling of widths, channel masks, and copies between full-width weights and the widths in use.

Paper: width level, section 3.4 and algorithm 1.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from models.latency import TOLERANCE, LatencyTable, Limit
from models.layers import MID_DIMS
from models.model_search import Network
from models.parsing import Masks, mask_widths
from models.search_space import Arch, Op, SearchSpace, Widths
from models.width_program import Reach, reach_within
from tools.errors import BadInput

CLOSE_ENOUGH = 1e-4
"""Gap to the target, as a share of it, at which `fit_widths` stops."""

PATH_STEPS = 256
"""Steps in which `fit_widths` walks to widths that reach the target within all limits."""

FILL_STEPS = 32
"""Most steps by which `fit_widths` moves one block at a time."""


def scale_widths(
    arch: Arch,
    widths: Widths,
    table: LatencyTable,
    space: SearchSpace,
    target: float,
    divisor: int = 1,
    limits: Sequence[Limit] = (),
) -> Widths:
    """Move the widths of the architecture's operators until its latency meets the target, coarse to fine.

    If it is too slow, shrink over all stages, then expand over stages 2 to n, 3 to n, ..., n. If it is too fast, expand
    over stages 1 to n, 2 to n, ..., n. No step moves away from the target. The result is slower than the target only if
    the least widths are.

    With limits, shrinking goes on until the target and all limits hold, and expanding stops before any is broken.

    Args:
        arch: the current architecture.
        widths: mid channels of all operators; those outside `arch` stay as they are.
        table: latency table.
        space: the search space of `arch`.
        target: ms.
        divisor: all widths are multiples of it; 1 in the paper.
        limits: in other tables; none in the paper.

    Returns:
        New widths; the argument is not changed.
    """
    scaler = _Scaler(arch, widths, table, space, target, divisor, limits)
    scaler.scale()
    return scaler.result()


def fit_widths(
    arch: Arch,
    widths: Widths,
    table: LatencyTable,
    space: SearchSpace,
    target: float,
    divisor: int = 1,
    limits: Sequence[Limit] = (),
) -> Widths:
    """Scale widths as `scale_widths` does, then close the remaining gap by moving one block, or two against each other.

    Arguments and result as for `scale_widths`. The result exceeds the target or a limit only if the least widths do. If
    limits keep such moves from the target, the widths are taken from the way to widths that reach it within the limits.
    """
    scaler = _Scaler(arch, widths, table, space, target, divisor, limits)
    scaler.scale()
    scaler.fill()
    if limits and scaler.misses():
        scaler.detour()
    return scaler.result()


def reach_of(
    arch: Arch, table: LatencyTable, space: SearchSpace, need: float, divisor: int, limits: Sequence[Limit]
) -> Reach:
    """Return how far the widths of an architecture reach in `table` within the limits, without the table's base.

    Args:
        need: latency in `table` that is far enough; inf for the most that there is.
    """
    return _Scaler(arch, space.start_widths(), table, space, 0.0, divisor, limits).reach(need)


def check_divisor(divisor: int, space: SearchSpace) -> None:
    """Raise BadInput if some operator has no width that is a multiple of `divisor`."""
    for block, _, op in space.positions():
        low, high = width_range(op, block.in_ch, divisor)
        if low > high:
            widths = f'{op.min_width(block.in_ch)} to {op.max_width(block.in_ch)}'
            raise BadInput(
                f'--width_divisor {divisor}: {block.stage}.{block.name} has widths from {widths}; use a smaller one'
            )


def width_range(op: Op, in_ch: int, divisor: int) -> tuple[int, int]:
    """Return the least and the most mid channels of an operator that are multiples of `divisor`."""
    return -(-op.min_width(in_ch) // divisor) * divisor, op.max_width(in_ch) // divisor * divisor


def latency_range(arch: Arch, table: LatencyTable, space: SearchSpace, divisor: int = 1) -> tuple[float, float]:
    """Return the latency of an architecture at its least and at its most widths, in ms."""
    scaler = _Scaler(arch, space.start_widths(), table, space, target=0.0, divisor=divisor)
    return scaler.measure(scaler.low), scaler.measure(scaler.high)


class _Scaler:
    """Widths, bounds and latency curves of one architecture's blocks, as lists over blocks."""

    def __init__(
        self,
        arch: Arch,
        widths: Widths,
        table: LatencyTable,
        space: SearchSpace,
        target: float,
        divisor: int = 1,
        limits: Sequence[Limit] = (),
    ):
        self.start, self.target, self.divisor, self.last_stage = widths, target, divisor, len(space.stages)
        self.picks = space.chosen(arch, table.img_size)
        ops = [space.ops[index] for _, index in self.picks]
        self.stage = [space.stage_names.index(block.stage) + 1 for block, _ in self.picks]
        ends = [width_range(op, block.in_ch, divisor) for (block, _), op in zip(self.picks, ops, strict=True)]
        self.low, self.high = [low for low, _ in ends], [high for _, high in ends]
        if any(low > high for low, high in zip(self.low, self.high, strict=True)):
            raise BadInput(f'width divisor {divisor}: some blocks have no such width; use a smaller one')
        keys = [block.key(op) for (block, _), op in zip(self.picks, ops, strict=True)]
        self.curves, self.base = [table.curves[key] for key in keys], table.base
        self.limits = [(limit, [limit.table.curves[key] for key in keys]) for limit in limits]
        self.widths = [
            min(max(round(widths[block.stage][block.name][index] / divisor) * divisor, low), high)
            for (block, index), low, high in zip(self.picks, self.low, self.high, strict=True)
        ]
        self.latency = self.measure(self.widths)

    def measure(self, widths: list[int]) -> float:
        """Return the latency in ms with these widths, one per block."""
        return self.base + sum(float(curve[w - 1]) for curve, w in zip(self.curves, widths, strict=True))

    def keeps_limits(self, widths: list[int]) -> bool:
        """Return whether these widths, one per block, keep all limits."""
        return all(limit.holds(self.total(limit, curves, widths)) for limit, curves in self.limits)

    def misses(self) -> bool:
        """Return whether the target is further than `fit_widths` allows, and not exceeded."""
        return self.target - self.latency > CLOSE_ENOUGH * self.target

    def scale(self) -> None:
        """Run all passes of the paper's algorithm 1."""
        if self.latency > self.target or not self.keeps_limits(self.widths):
            self.shrink(first_stage=1)
            starts = range(2, self.last_stage + 1)
        else:
            starts = range(1 if self.latency < self.target else self.last_stage + 1, self.last_stage + 1)
        for first in starts:
            self.expand(first_stage=first)

    def shrink(self, first_stage: int) -> None:
        """Step down to the first widths that meet the target and limits, or to the least widths of the range."""
        ratios = self.ratios(first_stage)
        while self.latency > self.target or not self.keeps_limits(self.widths):
            stepped = self.stepped(ratios, -1)
            if stepped == self.widths:
                break
            self.widths, self.latency = stepped, self.measure(stepped)

    def expand(self, first_stage: int) -> None:
        """Step up to the last widths that meet the target and limits, or to the most widths of the range."""
        ratios = self.ratios(first_stage)
        while True:
            stepped = self.stepped(ratios, +1)
            latency = self.measure(stepped)
            if stepped == self.widths or latency > self.target or not self.keeps_limits(stepped):
                break
            self.widths, self.latency = stepped, latency

    def fill(self) -> None:
        """Move one or two blocks at a time so as to fill most of the gap to the target, until it is small enough or no
        move fills more of it. Two blocks can trade channels if single moves are too coarse."""
        while (gap := self.target - self.latency) > CLOSE_ENOUGH * self.target:
            moves = [self.moves(i) for i in range(len(self.widths))]
            totals = [self.total(limit, curves, self.widths) for limit, curves in self.limits]
            most = [limit.value * (1 + TOLERANCE) for limit, _ in self.limits]
            room = np.array(most) - np.array(totals)
            best = (0.0, self.widths)
            for i, (widths_i, gains_i, costs_i) in enumerate(moves):
                for j in range(i + 1, len(moves)):
                    widths_j, gains_j, costs_j = moves[j]
                    if self.limits:
                        gains = gains_i[:, None] + gains_j
                        kept = (costs_i[:, :, None] + costs_j[:, None] <= room[:, None, None]).all(axis=0)
                        gains = np.where(kept & (gains <= gap), gains, -np.inf)
                        partner = gains.argmax(axis=1)
                        gains = gains.max(axis=1)
                    else:
                        partner = np.searchsorted(gains_j, gap - gains_i, side='right') - 1
                        gains = np.where(partner >= 0, gains_i + gains_j[partner], -np.inf)
                    at = int(gains.argmax())
                    if best[0] < gains[at] <= gap:
                        stepped = list(self.widths)
                        stepped[i], stepped[j] = int(widths_i[at]), int(widths_j[partner[at]])
                        best = (float(gains[at]), stepped)
            latency = self.measure(best[1])
            if not self.latency < latency <= self.target or not self.keeps_limits(best[1]):
                break
            self.widths, self.latency = best[1], latency

    def moves(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the widths that `fill` may give a block, the current one included, the latency that each adds, and
        what each adds in the tables of the limits [limits, widths].
        """
        reach = FILL_STEPS * self.divisor
        low, high = max(self.widths[i] - reach, self.low[i]), min(self.widths[i] + reach, self.high[i])
        widths = np.arange(low, high + 1, self.divisor)
        added = [
            curves[i][widths - 1] - curves[i][self.widths[i] - 1]
            for curves in [self.curves, *(curves for _, curves in self.limits)]
        ]
        return widths, added[0], np.array(added[1:])

    def reach(self, need: float) -> Reach:
        """Return how far the widths reach within the limits, see `reach_of`."""
        of_tables = [self.curves, *(curves for _, curves in self.limits)]
        gains, *costs = (
            [curve[low - 1 : high : self.divisor] for curve, low, high in zip(curves, self.low, self.high, strict=True)]
            for curves in of_tables
        )
        return reach_within(
            gains, costs, [limit.value - limit.table.base for limit, _ in self.limits], need - self.base
        )

    def detour(self) -> None:
        """Take the widths from the way to some that reach the target within the limits, nearest to it from below, and
        fill again; keep the present ones if those are not nearer.

        Such a way leads from the present widths; or if it breaks limits, from the least widths, which keep them.
        """
        reach = self.reach(self.target)
        goal = np.array([low + at * self.divisor for low, at in zip(self.low, reach.choice, strict=True)])
        found = self.widths, self.latency
        for start in (np.array(self.widths), np.array(self.low)):
            self.widths, self.latency = self.along(start, goal)
            self.fill()
            if self.latency > found[1] and self.keeps_limits(self.widths):
                found = self.widths, self.latency
            self.widths, self.latency = found
            if not self.misses():
                break

    def along(self, start: np.ndarray, goal: np.ndarray) -> tuple[list[int], float]:
        """Return the widths between two, and their latency, that are slowest within the target and the limits."""
        found = start.tolist(), self.measure(start.tolist())
        for share in np.linspace(0, 1, PATH_STEPS + 1):
            widths = (start + np.rint((goal - start) * share / self.divisor).astype(int) * self.divisor).tolist()
            latency = self.measure(widths)
            if found[1] < latency <= self.target and self.keeps_limits(widths):
                found = widths, latency
        return found

    def total(self, limit: Limit, curves: list[np.ndarray], widths: list[int]) -> float:
        """Return the total with these widths in the table of a limit."""
        return limit.table.base + sum(float(curve[w - 1]) for curve, w in zip(curves, widths, strict=True))

    def ratios(self, first_stage: int) -> dict[int, int]:
        """Return block position -> channels per step for a range of stages, in proportion to their widths."""
        blocks = [i for i, stage in enumerate(self.stage) if stage >= first_stage]
        smallest = min((self.widths[i] for i in blocks), default=1)
        return {i: round(self.widths[i] / smallest) for i in blocks}

    def stepped(self, ratios: dict[int, int], sign: int) -> list[int]:
        """Return the widths after one step, clipped to their bounds."""
        widths = list(self.widths)
        for i, ratio in ratios.items():
            widths[i] = min(max(widths[i] + sign * ratio * self.divisor, self.low[i]), self.high[i])
        return widths

    def result(self) -> Widths:
        """Return the widths of all operators; only those of the architecture have changed."""
        widths = {stage: {block: dict(ops) for block, ops in blocks.items()} for stage, blocks in self.start.items()}
        for (block, index), width in zip(self.picks, self.widths, strict=True):
            widths[block.stage][block.name][index] = width
        return widths


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
