"""Limits beside the target: `--limit TABLE=VALUE`, counted tables, and whether target and limits can be met."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.config import ConvSpec, MBSpec, NetworkConfig, fixed_layers, op_spec
from models.describe import count_mult_adds, count_params, describe_table
from models.latency import LatencyTable, Limit, classes_note, load_table
from models.layers import ConvLayer, MBInvertedResBlock
from models.parsing import parse_architecture
from models.search_space import Arch, Block, Op, SearchSpace, Widths, after_stride
from models.targeting import is_reachable, log_probability, target_range
from tools.errors import BadInput

COUNTED = {'macs': 'M MACs', 'params': 'M parameters'}
"""Names of tables that need no file, and their units."""

CLOSE = 1e-3
"""Precision of the value that a limit should be raised to, as a share of it."""


def counted_table(what: str, img_size: int, num_classes: int, space: SearchSpace) -> LatencyTable:
    """Return a table of MACs or parameters in millions, which are linear in the width.

    Args:
        what: 'macs' or 'params'.
        num_classes: outputs of the classifier, which is part of the base.
    """
    fixed = fixed_layers(num_classes, space)

    def amount(kind: type, spec: ConvSpec | MBSpec, in_ch: int, size: int) -> float:
        with torch.device('meta'):
            layer = kind(spec)
        return count_params(layer) if what == 'params' else count_mult_adds(layer, size, in_ch)

    curves, ranges = {}, space.table_widths(img_size)
    for key, (block, op) in {block.key(op): (block, op) for block, _, op in space.positions(img_size)}.items():
        high = ranges[key][1]
        ends = block.in_ch + 1, high
        if what == 'macs':  # torch counts the same, in a hundred times the time
            at = [block_macs(block, op, width) for width in ends]
        else:
            at = [amount(MBInvertedResBlock, op_spec(block, op, w), block.in_ch, block.in_size) for w in ends]
        slope = (at[1] - at[0]) / (ends[1] - ends[0])
        curves[key] = at[1] + slope * (np.arange(1, high + 1) - high)
    blocks = space.blocks(img_size)
    last_size = after_stride(blocks[-1].in_size, blocks[-1].stride)
    base = amount(ConvLayer, fixed['first_stem'], 3, img_size)
    base += amount(MBInvertedResBlock, fixed['second_stem'], fixed['second_stem'].in_channels, blocks[0].in_size)
    base += amount(ConvLayer, fixed['feature_mix_layer'], blocks[-1].out_ch, last_size)
    base += fixed['classifier'].in_features * num_classes / 1e6
    if what == 'params':
        base += num_classes / 1e6
    return LatencyTable(base, curves, {'unit': COUNTED[what], 'device': 'any', 'method': 'counted'}, img_size)


def block_macs(block: Block, op: Op, width: int | np.ndarray) -> float | np.ndarray:
    """Return the M MACs of an operator at one or more widths: expansion, depthwise, squeeze-excitation, projection."""
    pixels, out_pixels = block.in_size**2, after_stride(block.in_size, block.stride) ** 2
    per_channel = pixels * block.in_ch + out_pixels * (op.kernel**2 + block.out_ch) + 2 * op.se_width(block.in_ch)
    return width * per_channel / 1e6


def limit_names(texts: Sequence[str]) -> list[str]:
    """Return a short name for each `--limit`: the word of a counted table, the name of a file without its ending."""
    tables = [text.rpartition('=')[0] for text in texts]
    names = [Path(table).stem for table in tables]
    return [name if names.count(name) == 1 else table for name, table in zip(names, tables, strict=True)]


def read_limits(
    texts: Sequence[str],
    img_size: int,
    num_classes: int,
    space: SearchSpace,
    log: Callable[[str], object] = print,
) -> tuple[Limit, ...]:
    """Read the limits of `--limit`, and check their tables as that of the target is checked.

    Args:
        texts: TABLE=VALUE each. TABLE is a file, 'params' or 'macs'; VALUE a number in its unit, or a share such as
            '40%' of the way from the least to the most that networks have.
        num_classes: outputs of the classifier, for counted tables.

    Raises:
        BadInput: not of this form, the same table twice, a bad table, or a value that no network keeps.
    """
    limits: list[Limit] = []
    for text, name in zip(texts, limit_names(texts), strict=True):
        path, _, value_text = text.rpartition('=')
        if not path:
            raise BadInput(f'--limit {text}: should be TABLE=VALUE, such as params=5 or latency_pkl/phone.pkl=40')
        if name in [limit.name for limit in limits]:
            raise BadInput(f'--limit {text}: a limit in {path} is there twice; give the lower one')
        if path in COUNTED:
            table = counted_table(path, img_size, num_classes, space)
        else:
            table = load_table(path, img_size, space, log)
            if note := classes_note(table, path, num_classes):
                log(note)
        least, _, most = table.reach(space)
        value = table.amount(value_text, space)
        if not least <= value < math.inf:
            raise BadInput(
                f'--limit {text}: networks have from {least:.4f} to {most:.4f} {table.unit}; should be a number of at '
                f'least {_up(least)}, or a share such as 40%'
            )
        limits.append(Limit(name, table, value))
    return tuple(limits)


def check_reachable(
    table: LatencyTable,
    space: SearchSpace,
    targets: Sequence[float],
    divisor: int = 1,
    limits: Sequence[Limit] = (),
    log: Callable[[str], object] = print,
) -> None:
    """Check that some architecture and widths meet each target and keep all limits. Log the targets that limits leave.

    Raises:
        BadInput: none does for a target; gives the nearest targets, and the values to which a limit may be raised
            instead.
    """
    names = ', '.join(f'{limit.name} of at most {limit.value:.4f} {limit.table.unit}' for limit in limits)
    if limits:
        least, most = target_range(table, space, divisor, limits)
        if least is None:
            raise BadInput(f'--limit: no network keeps all of {names}; raise one of them')
        log(f'{names}: networks reach targets from {_up(least)} to {_down(most)} {table.unit}, to 0.1 %')
    unmet = [target for target in targets if not is_reachable(table, space, target, divisor, limits)]
    if not unmet:
        return
    target = unmet[0]
    above, below = target_range(table, space, divisor, limits, target, target)
    near = [text for value, text in ((below, _down(below)), (above, _up(above))) if value is not None]
    message = f'target {target:.4f} {table.unit}: no architecture of the space can meet it'
    message += f' with {names}' if limits else ''
    message += f'; the nearest targets that can be met: {" and ".join(near)}'
    raised = [_raised(i, table, space, target, divisor, limits) for i in range(len(limits))]
    if found := [text for text in raised if text]:
        message += f'; or for this target raise one limit: {", or ".join(found)}'
    elif limits:
        message += '; raising one limit alone is not enough for this target'
    raise BadInput(message)


def log_limits(
    arch: Arch, before: Widths, after: Widths, limits: Sequence[Limit], space: SearchSpace, log: Callable[..., object]
) -> dict[str, dict[str, float]]:
    """Log and return an architecture's total in the table of each limit before and after scaling, by the limit's name.

    Args:
        log: called with a format and its arguments, such as `RunLogger.log`.
    """
    found = {}
    for limit in limits:
        totals = [limit.table.total(arch, widths, space) for widths in (before, after)]
        found[limit.name] = {'limit': limit.value, 'before': totals[0], 'after': totals[1]}
        for when, total in zip(('Before', 'After'), totals, strict=True):
            log('%s, the current %s: %.4f, at most: %.4f', when, limit.name, total, limit.value)
    return found


def describe_fit(
    arch: Arch,
    config: NetworkConfig,
    state: Mapping[str, Tensor],
    table: LatencyTable,
    target: float,
    limits: Sequence[Limit],
    space: SearchSpace,
) -> dict:
    """Return what a target costs.

    Args:
        state: has log_alphas and betas, names without `module.`.

    Returns:
        'target' and 'latency' in the table's unit, the log-probability 'given_up', and by name the share of each limit
        that is 'used'.
    """
    lost = log_probability(parse_architecture(state, space), state, space) - log_probability(arch, state, space)
    used = {limit.name: limit.table.of_config(config) / limit.value for limit in limits}
    return {'target': target, 'latency': table.of_config(config), 'given_up': lost, 'used': used}


def describe_limits(limits: Sequence[Limit], space: SearchSpace) -> dict[str, dict]:
    """Return value, unit and range of each limit, by its name."""
    return {limit.name: {'limit': limit.value, **describe_table(limit.table, space)} for limit in limits}


def _raised(
    index: int, table: LatencyTable, space: SearchSpace, target: float, divisor: int, limits: Sequence[Limit]
) -> str:
    """Return a limit with the least value that makes the target reachable, rounded up; empty if no value does."""
    limit = limits[index]

    def reachable(value: float) -> bool:
        changed = [*limits[:index], Limit(limit.name, limit.table, value), *limits[index + 1 :]]
        return is_reachable(table, space, target, divisor, changed)

    low, high = limit.value, limit.table.reach(space)[2]
    if high <= low or not reachable(high):
        return ''
    while high - low > CLOSE * high:
        middle = (low + high) / 2
        low, high = (low, middle) if reachable(middle) else (middle, high)
    return f'{limit.name}={_up(high)}'


def _up(value: float | None) -> str:
    """Return a number rounded up to four decimals."""
    return '' if value is None else f'{math.ceil(value * 1e4 - 1e-6) / 1e4:.4f}'


def _down(value: float | None) -> str:
    """Return a number rounded down to four decimals."""
    return '' if value is None else f'{math.floor(value * 1e4 + 1e-6) / 1e4:.4f}'
