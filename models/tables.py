"""Files of latency tables: read, check and write.

A table is a pickled OrderedDict, or JSON: 'base' -> ms of stem, mix layer, pool and classifier, and by block shape
`MBInvertedResBlock_{input size}_{in}_{se}_{out}_k{kernel}_s{stride}_{act}` -> dict of mid channels -> ms. A list stands
for the widths 1, 2, .... An optional 'meta', a dict of plain values, describes how the table was made.
"""

import io
import json
import logging
import math
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from scipy.optimize import isotonic_regression

from models.config import unique_keys
from models.latency import LatencyTable
from models.search_space import SearchSpace
from tools.chain import command
from tools.errors import BadInput
from tools.files import write_atomic

log = logging.getLogger('tf-nas')

SMALLEST, LARGEST = 1e-30, 1e30  # bounds on table entries above 0
LEAST_PLAUSIBLE_MS = 0.2  # of the largest network; a faster one indicates a table in seconds
MOST_PLAUSIBLE_MS = 5_000  # at 224 pixels: a slow phone may take 2 s; a table in us of an H100 has some 6,000
DOUBTFUL = 10.0  # mean error in % above which a table is not worth searching with
FAR_FROM_MEDIAN = 0.25  # of an outlier, as a share of the running median
HALF_WINDOW = 10  # widths on each side that the running median takes in
MOST_VALUES = 10**7  # of a pickled table; the published ones have 73,095
GIT_LFS = b'version https://git-lfs'  # begins the file that git leaves in place of one in Git LFS


def read_table(path: str | Path) -> dict:
    """Return the contents of a table file, JSON (`.json`) or a pickle: dicts, lists, numbers and strings. Runs nothing.

    Raises:
        BadInput: no such file, damaged, a Git LFS pointer, or a pickle of other objects.
    """
    try:
        raw = Path(path).read_bytes()
    except OSError as e:
        make = 'python latency_pkl/make_lat_lut.py --save_path latency_pkl/my_table.pkl'
        raise BadInput(f'{path}: no latency table there ({e.strerror}); make one with: {make}') from e
    if raw.startswith(GIT_LFS):
        raise BadInput(f'{path}: a Git LFS pointer, not the table itself; fetch the table with: git lfs pull')
    try:
        if Path(path).suffix.lower() == '.json':
            data = json.loads(raw.decode('utf-8-sig'), object_pairs_hook=unique_keys)
        else:
            data = _TableUnpickler(io.BytesIO(raw)).load()
            _check_size(data)
    except BadInput as e:
        raise BadInput(f'{path}: {e}') from e
    except Exception as e:  # a damaged pickle can raise anything at all
        raise BadInput(f'{path}: not a latency table, a pickle or .json ({type(e).__name__}: {e})') from e
    if not isinstance(data, dict):
        raise BadInput(f'{path}: holds a {type(data).__name__}, should be a dict of latencies by block shape')
    return data


class _TableUnpickler(pickle.Unpickler):
    """Admits OrderedDict besides what a pickle holds natively: dict, list, tuple, str, int, float, bool, None."""

    def find_class(self, module: str, name: str) -> type:
        if (module, name) == ('collections', 'OrderedDict'):
            return OrderedDict
        also = '; write NumPy numbers by float()' if module.startswith('numpy') else ''
        raise BadInput(
            f'refused, the file asks for {module}.{name}; a table holds only dicts, numbers and strings{also}'
        )


def _check_size(data: object) -> None:
    """Raise BadInput if a pickle holds too many values; a small one may hold one value in very many places."""
    counts: dict[int, float] = {}

    def count(value: object) -> float:
        if not isinstance(value, (dict, list, tuple)):
            return 1
        if id(value) not in counts:
            counts[id(value)] = math.inf  # of one within itself
            inner = value.values() if isinstance(value, dict) else value
            counts[id(value)] = 1 + sum(map(count, inner))
        return counts[id(value)]

    if count(data) > MOST_VALUES:
        raise BadInput(f'holds more than {MOST_VALUES} values, by references to the same ones')


def table_size(path: str | Path) -> int | None:
    """Return the input size that a table names in its meta; None if it names none.

    Raises:
        BadInput: see `read_table`.
    """
    meta = read_table(path).get('meta')
    size = meta.get('img_size') if isinstance(meta, dict) else None
    return size if type(size) is int and size > 0 else None


def load_table(path: str | Path, img_size: int, space: SearchSpace) -> LatencyTable:
    """Read and check a table. Log what had to be changed.

    Latencies that are negative, or fall with growing width, are replaced by `rising` curves. Widths that are missing
    between others are interpolated, those beyond by at most the distance between the nearest two.

    Raises:
        BadInput: not a table, keys or widths of this space and size missing, values that are no finite numbers, or
            latencies that look like seconds or microseconds.
    """
    data = read_table(path)
    base, meta = data.get('base'), data.get('meta') or {}
    if not _is_number(base) or base <= 0:
        raise BadInput(f"{path}: 'base' is {base!r}, should be a positive latency in ms")
    if not isinstance(meta, dict):
        raise BadInput(f"{path}: 'meta' is a {type(meta).__name__}, should be a dict about how the table was made")
    wanted = space.table_widths(img_size)
    _check_keys(data, wanted, img_size, path)
    curves, moved, absent = {}, [], 0
    table = LatencyTable(float(base), curves, meta, img_size)
    for key, (low, high) in wanted.items():
        try:
            curves[key], shares, count = _curve(_by_width(data[key]), low, high, table.width_divisor)
        except ValueError as e:
            raise BadInput(f'{path}: {key} {e}; make a table with: {_maker(img_size)}') from e
        moved.append(shares)
        absent += count
    _check_unit(path, table, table.reach(space)[2])
    if warning := warn_of_errors(meta):
        log.warning('%s: %s', path, warning)
    method = str(meta.get('method', ''))
    if method.startswith('estimated'):
        log.info('%s: latencies of %s are %s', path, meta.get('device'), method.split(':')[0])
    if absent:
        log.info('%s: latencies of %d widths are interpolated between the given widths', path, absent)
    moved = 100 * np.concatenate(moved)
    if moved.any():
        text = '%s: %d of %d latencies moved to curves that rise with the width: by %.2f %% on average, %.2f %% at most'
        log.info(text, path, (moved > 0).sum(), len(moved), moved[moved > 0].mean(), moved.max())
    return table


def _check_keys(data: dict, wanted: Mapping[str, tuple[int, int]], img_size: int, path: str | Path) -> None:
    missing = [key for key in wanted if not isinstance(data.get(key), (dict, list))]
    unused = [key for key in data if key not in wanted and key not in ('base', 'meta')]
    if missing:
        raise BadInput(
            f'{path}: {len(missing)} of {len(wanted)} keys of input size {img_size} are missing, such as {missing[0]}; '
            f'{len(unused)} others are of no block of this search space and size; '
            f'make a table of that size with: {_maker(img_size)}'
        )
    if unused:
        log.warning('%s: %d entries are unused: of no block of this space at size %d', path, len(unused), img_size)


def _by_width(values: dict | list) -> dict[int, object]:
    """Return the latencies of one key by width, in growing order; JSON has widths as texts."""
    pairs = values.items() if isinstance(values, dict) else enumerate(values, start=1)
    found: dict[int, object] = {}
    for text, ms in pairs:
        whole = type(text) is int or isinstance(text, str) and text.isdecimal()
        width = int(text) if whole else -1
        if width < 0:
            raise ValueError(f'has a width {text!r}, should be a whole number')
        if width in found:
            raise ValueError(f'has width {width} twice')
        found[width] = ms
    return dict(sorted(found.items()))


def warn_of_errors(meta: Mapping) -> str:
    """Return a warning if a table's `residual_mean_percent` is above `DOUBTFUL`; else ''."""
    error = meta.get('residual_mean_percent')
    if not _is_number(error) or error <= DOUBTFUL:
        return ''
    again = 'time its kit again on an idle device' if 'timed_with' in meta else 'make it again on an idle machine'
    more = 'more networks or --rounds' if 'timed_with' in meta else 'a larger --budget'
    return (
        f'its predictions for unseen networks are off by {error:.1f} % on average, more than {DOUBTFUL:g} %:'
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
    return isotonic_regression(np.where(np.abs(values - usual) > FAR_FROM_MEDIAN * usual, usual, values)).x


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


def compare_table(table: LatencyTable, path: str | Path, device: str, num_classes: int) -> None:
    """Log if a table is of another device, or was made for another number of classes, which its base includes."""
    if table.unit == 'ms' and not table.is_of(device):
        other, make = table.meta['device'], _maker(table.img_size)
        text = '%s is a table of %s, not of this device (%s), and so are latencies and targets; make one with: %s'
        log.warning(text, path, other, device, make)
    made_for = table.meta.get('num_classes', num_classes)
    if made_for != num_classes:
        log.info('%s is for %s classes, not %d', path, made_for, num_classes)
