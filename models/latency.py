"""Latency tables: load, check, look up and sum.

A table is a pickled OrderedDict: 'base' -> ms of stem, mix layer, pool and classifier, and for each block shape
`MBInvertedResBlock_{input size}_{in}_{se}_{out}_k{kernel}_s{stride}_{act}` -> OrderedDict of mid channels -> ms.
An optional entry 'meta', a dict of plain values, describes how the table was made. For file
formats see `models.table_files`.
"""

import math
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.stride_tricks import sliding_window_view
from scipy.optimize import isotonic_regression
from torch import Tensor

from models.config import NetworkConfig
from models.search_space import Arch, Block, Op, SearchSpace, Widths
from models.table_files import by_width, read_table
from tools.chain import command
from tools.errors import BadInput
from tools.files import write_atomic

ROUNDING = 5e-5
"""Rounding of the ends of the reachable range when they are printed."""

TOLERANCE = 1e-9
"""Tolerance for rounding in sums of latencies, as a share of what they are compared with."""

SMALLEST, LARGEST = 1e-30, 1e30
"""Bounds on table entries above 0."""

LEAST_PLAUSIBLE_MS = 0.2
"""Least plausible latency of the largest network; a faster one indicates a table in seconds."""

MOST_PLAUSIBLE_MS = 5_000
"""Most plausible latency of the largest network at 224 pixels, if a table does not name its unit; a slower one
indicates microseconds. One image may take a slow phone's CPU 2 s; 32 images take an H100 about 6,000 us."""

DOUBTFUL = 10.0
"""Mean error of a table on unseen networks, in per cent, above which a search with it is not worth its time."""

OUTLIER = 0.25
"""Distance of an outlier from the running median, as a share of it."""

HALF_WINDOW = 10
"""Widths on each side that the running median takes in."""


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


@dataclass(frozen=True)
class Limit:
    """Upper bound on a network's total in a table, beside the target in another one."""

    name: str
    table: LatencyTable
    value: float
    """In the table's unit."""

    def holds(self, total: float) -> bool:
        """Return whether a network of this total keeps the limit."""
        return total <= self.value * (1 + TOLERANCE)


def expected_latency(
    base: float | Tensor, matrix: Tensor, op_weights: Tensor, depth_weights: list[Tensor], space: SearchSpace
) -> Tensor:
    """Return the latency of the mixture (paper, section 3.3), differentiable in both kinds of weights.

    It is a scalar tensor, or for several tables a tensor [tables].

    The latency of an exit is that of all blocks before it; a stage's is the sum of its exits' latencies weighted
    by softmax(betas).

    Args:
        base: of the fixed layers; for several tables [tables].
        matrix: of each operator, [blocks, ops]; for several tables [tables, blocks, ops].
        op_weights: mixture weights, [blocks, ops].
        depth_weights: of each stage, [exits].
    """
    per_block = (op_weights * matrix).sum(dim=-1)
    total = per_block.new_zeros(per_block.shape[:-1]) + base
    for blocks, stage, weights in zip(
        per_block.split([stage.depth for stage in space.stages], -1), space.stages, depth_weights, strict=True
    ):
        at_depth = F.pad(blocks.cumsum(-1), (1, 0))
        total = total + weights @ at_depth[..., stage.exit_depths.start :].movedim(-1, 0)
    return total


class LatencyLoss:
    """Loss of a mixture's latency, for the widths of one epoch: weight * |latency / target - 1| (paper, section 3.1).

    Limits add weight * max(0, latency / limit - 1) each, with the latency in their table.

    Args:
        widths: mid channels of every operator.
        target: in the table's unit.
        weight: lambda of the paper.
        limits: not in the paper.
    """

    def __init__(
        self,
        table: LatencyTable,
        widths: Widths,
        space: SearchSpace,
        target: float,
        weight: float,
        device: torch.device,
        limits: Sequence[Limit] = (),
    ):
        self.space, self.target, self.weight = space, target, weight
        self.base, self.matrix, self.limits = table.base, table.matrix(widths, space).to(device), None
        if limits:
            tables = [table, *(limit.table for limit in limits)]
            self.base = torch.tensor([one.base for one in tables], device=device)
            self.matrix = torch.stack([one.matrix(widths, space) for one in tables]).to(device)
            self.limits = torch.tensor([limit.value for limit in limits], device=device)

    def __call__(self, op_weights: Tensor, depth_weights: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the loss, a scalar tensor, and the latency: a scalar, or with limits that in each table, the target's
        first. Arguments: see `expected_latency`."""
        latency = expected_latency(self.base, self.matrix, op_weights, depth_weights, self.space)
        if self.limits is None:
            return self.weight * (latency / self.target - 1).abs(), latency
        excess = F.relu(latency[1:] / self.limits - 1).sum()
        return self.weight * ((latency[0] / self.target - 1).abs() + excess), latency


def device_note(table: LatencyTable, path: str | Path, device: str) -> str:
    """Return a line if a table is of another device than the one of this name; else ''."""
    if table.unit != 'ms' or table.is_of(device):
        return ''
    return (
        f'{path} is a table of {table.meta["device"]}, not of this device ({device}): latencies and targets are those'
        f' of {table.meta["device"]}; make a table of this device with: {_maker(table.img_size)}'
    )


def classes_note(table: LatencyTable, path: str | Path, num_classes: int) -> str:
    """Return a line if a table was made for another number of classes, which its base includes; else ''."""
    made_for = table.meta.get('num_classes', num_classes)
    return f'{path} is for {made_for} classes, not {num_classes}' if made_for != num_classes else ''


def load_table(
    path: str | Path, img_size: int, space: SearchSpace, log: Callable[[str], object] = print
) -> LatencyTable:
    """Read and check a table.

    Latencies that are negative, or fall with growing width, within the widths that a search can use, are replaced by
    `rising` curves. One line to `log` gives how far they moved. Widths that are missing between others are
    interpolated, those beyond by at most the distance between the nearest two. One line to `log` gives their number.

    Raises:
        BadInput: not a table, keys or widths of this space and size missing, values that are no finite numbers, or
            latencies that look like seconds or microseconds.
    """
    data = read_table(path)
    base = data.get('base')
    if not _is_number(base) or base <= 0:
        raise BadInput(f"{path}: 'base' is {base!r}, should be a positive latency in ms")
    wanted = space.table_widths(img_size)
    missing = [key for key in wanted if not isinstance(data.get(key), (dict, list))]
    unused = [key for key in data if key not in wanted and key not in ('base', 'meta')]
    if missing:
        also = f'; {len(unused)} others are of no block of this search space and size' if unused else ''
        raise BadInput(
            f'{path}: {len(missing)} of {len(wanted)} keys of input size {img_size} are missing: '
            f'{", ".join(missing[:3])}{", ..." if len(missing) > 3 else ""}{also}; '
            f'make a table of that size with: {_maker(img_size)}'
        )
    meta = data.get('meta') or {}
    if not isinstance(meta, dict):
        raise BadInput(f"{path}: 'meta' is a {type(meta).__name__}, should be a dict about how the table was made")
    if unused:
        log(f'{path}: {len(unused)} entries are unused: of no block of this search space at size {img_size}')
    curves, moved, absent = {}, [], 0
    table = LatencyTable(float(base), curves, meta, img_size)
    for key, (low, high) in wanted.items():
        try:
            curves[key], shares, count = _curve(by_width(data[key]), low, high, table.width_divisor)
        except ValueError as e:
            raise BadInput(f'{path}: {key} {e}; make a table with: {_maker(img_size)}') from e
        moved.append(shares)
        absent += count
    _check_unit(path, table, table.reach(space)[2])
    method = str(table.meta.get('method', ''))
    if warning := warn_of_errors(table.meta):
        log(f'{path}: {warning}')
    if method.startswith('estimated'):
        log(f'{path}: latencies of {table.meta.get("device")} are {method.split(":")[0]}')
    if absent:
        log(f'{path}: latencies of {absent} widths are interpolated between the given widths')
    moved = 100 * np.concatenate(moved)
    if moved.any():
        log(
            f'{path}: {(moved > 0).sum()} of {len(moved)} latencies moved to curves that rise with the width: '
            f'by {moved[moved > 0].mean():.2f} % on average, {moved.max():.2f} % at most'
        )
    return table


def warn_of_errors(meta: Mapping) -> str:
    """Return a warning if a table's `residual_mean_percent` is above `DOUBTFUL`; else ''."""
    error = meta.get('residual_mean_percent')
    if not _is_number(error) or error <= DOUBTFUL:
        return ''
    again = 'time its kit again on an idle device' if 'timed_with' in meta else 'make it again on an idle machine'
    more = 'more networks or --rounds' if 'timed_with' in meta else 'a larger --budget'
    return (
        f'WARNING: its predictions for unseen networks are off by {error:.1f} % on average, more than {DOUBTFUL:g} %:'
        f' not worth searching with; {again}, with {more}'
    )


def _check_unit(path: str | Path, table: LatencyTable, largest: float) -> None:
    """Raise BadInput if the latency of the largest network is not plausible in ms."""
    if largest < LEAST_PLAUSIBLE_MS and table.unit == 'ms':
        raise BadInput(f'{path}: the largest network would take {largest:.6f} ms; are these seconds? Tables are in ms')
    if 'unit' not in table.meta and largest > MOST_PLAUSIBLE_MS * max(table.img_size / 224, 1) ** 2:
        raise BadInput(
            f'{path}: the largest network would take {largest:.0f} ms; are these microseconds? Tables are in ms; '
            "if these are, give the table's 'meta' the unit: ms"
        )


def save_table(base: float, curves: dict[str, np.ndarray], meta: dict, path: str | Path) -> None:
    """Write a table in the published format plus `meta`, whole or not at all. `curves[key][width - 1]` in ms."""
    data = OrderedDict(base=float(base), meta=meta)
    for key, curve in curves.items():
        data[key] = OrderedDict((width, float(ms)) for width, ms in enumerate(curve, start=1))
    write_atomic(path, lambda f: pickle.dump(data, f, protocol=3))


def _curve(values: dict[int, object], low: int, high: int, divisor: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Make the curve of one key.

    Args:
        values: ms by width, in growing order.
        low, high: the least and the most width of a search.
        divisor: the curve rises at its multiples. Other widths take at least as long as the next multiple.

    Returns:
        The curve, [high]; the shares by which the given values moved to let it rise; and the number of widths from
        `low` to `high` that are not given.

    Raises:
        ValueError: a value that is no number, or too few widths.
    """
    widths = np.array(list(values), dtype=np.int64)
    given = widths[max(np.searchsorted(widths, low, 'right') - 1, 0) : np.searchsorted(widths, high) + 1]
    for width in widths[: np.searchsorted(widths, high) + 1].tolist():
        if not _is_number(values[width]):
            raise ValueError(f'at width {width} is {values[width]!r}, should be a latency in ms')
    outside = [width for width in range(low, high + 1) if not len(given) or not given[0] <= width <= given[-1]]
    if outside and (len(given) < 2 or given[0] - low > given[1] - given[0] or high - given[-1] > given[-1] - given[-2]):
        raise ValueError(
            f'lacks {len(outside)} widths of {low} to {high}: {", ".join(map(str, outside[:3]))}'
            f'{", ..." if len(outside) > 3 else ""}'
        )
    used = np.array([values[width] for width in given.tolist()], dtype=np.float64)
    fitted, on_grid = used.copy(), given % divisor == 0
    if on_grid.any():
        fitted[on_grid] = rising(used[on_grid])
    all_widths = np.arange(1, high + 1)
    curve = _interpolate(all_widths, given, fitted)
    curve[: low - 1] = [values.get(width, curve[low - 1]) for width in range(1, low)]
    curve = np.maximum(curve, curve[np.minimum(-(-all_widths // divisor) * divisor, high) - 1])
    moved = np.abs(used - fitted) / np.maximum(fitted, SMALLEST)
    return curve, moved, high - low + 1 - int(((low <= given) & (given <= high)).sum())


def _interpolate(at: np.ndarray, widths: np.ndarray, ms: np.ndarray) -> np.ndarray:
    """Return latencies between given widths, and those beyond the ends as the nearest two continue; at least 0."""
    curve = np.interp(at, widths, ms)
    if len(widths) > 1:
        below, above = at < widths[0], at > widths[-1]
        curve[below] = ms[0] + (ms[1] - ms[0]) / (widths[1] - widths[0]) * (at[below] - widths[0])
        curve[above] = ms[-1] + (ms[-1] - ms[-2]) / (widths[-1] - widths[-2]) * (at[above] - widths[-1])
    return np.maximum(curve, 0)


def rising(values: np.ndarray) -> np.ndarray:
    """Return the rising curve nearest to noisy latencies: their isotonic regression (least squares), without outliers.

    It keeps the mean, so noise does not become bias as in a running maximum. Values that rise already are returned as
    they are.

    Args:
        values: ms at growing widths, [widths].

    Raises:
        ValueError: the values' running median is not positive.
    """
    if values[0] >= 0 and (np.diff(values) >= 0).all():
        return values
    usual = _running_median(values)
    if usual.min() <= 0:
        raise ValueError('has many latencies that are negative or 0')
    return isotonic_regression(np.where(np.abs(values - usual) > OUTLIER * usual, usual, values)).x


def _running_median(values: np.ndarray) -> np.ndarray:
    """Return the median of a window around each value. Beyond its ends, the curve continues as a straight line.

    The windows are symmetric, which keeps the steps of a rising curve.
    """
    half = min(HALF_WINDOW, len(values) // 2)
    if not half:
        return values

    def beyond(start: np.ndarray) -> np.ndarray:
        near, far = np.median(start[:half]), np.median(start[half : 2 * half])
        return near + (near - far) / half * ((half - 1) / 2 + np.arange(half, 0, -1))

    padded = np.concatenate([beyond(values), values, beyond(values[::-1])[::-1]])
    return np.median(sliding_window_view(padded, 2 * half + 1), axis=1)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST


def _maker(img_size: int) -> str:
    flags = {'img_size': img_size, 'save_path': f'my_table_{img_size}.pkl'}
    return command('latency_pkl/make_lat_lut.py', flags)
