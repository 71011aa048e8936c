"""Latency tables on disk: pickle, JSON and CSV, as plain values. Nothing in a file is executed.

All three hold 'base', by key of a block shape the latencies by width, and optionally 'meta'. Widths may be numbers or
their texts; in place of a dict, a list or NumPy array has the latencies of widths 1, 2, ....
"""

import csv
import io
import json
import math
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np

from models.config import unique_keys
from tools.errors import BadInput

POINTER = b'version https://git-lfs'
"""Beginning of the file that git leaves in place of one in Git LFS."""

MAX_WIDTH = 2**31

MOST_VALUES = 10**7
"""Most values of a pickled table. The published tables have 73,095."""

NUMERIC = frozenset('biuf')
"""Kinds of NumPy's data types that a table may hold: bool, int, unsigned, float."""


def read_table(path: str | Path) -> dict:
    """Return the contents of a table file: dicts, lists, numbers and strings.

    A `.json` file is read as JSON, a `.csv` file as rows of key, width, ms, any other file as a pickle.

    Raises:
        BadInput: no such file, damaged, a Git LFS pointer, or a pickle of other objects.
    """
    try:
        raw = Path(path).read_bytes()
    except OSError as e:
        make = 'python latency_pkl/make_lat_lut.py --save_path latency_pkl/my_table.pkl'
        raise BadInput(f'{path}: no latency table there ({e.strerror}); make one with: {make}') from e
    if raw.startswith(POINTER):
        raise BadInput(f'{path}: a Git LFS pointer, not the table itself; fetch the table with: git lfs pull')
    kind, read = READERS.get(Path(path).suffix.lower(), ('a pickled', _from_pickle))
    try:
        data = read(raw)
    except BadInput as e:
        raise BadInput(f'{path}: {e}') from e
    except Exception as e:  # a damaged pickle can raise anything at all
        reason = ' '.join(str(e).split())
        also = '' if Path(path).suffix.lower() in READERS else '; name JSON and CSV tables .json and .csv'
        raise BadInput(f'{path}: not {kind} latency table ({type(e).__name__}: {reason}){also}') from e
    if not isinstance(data, dict):
        raise BadInput(f'{path}: holds a {type(data).__name__}, should be a dict of latencies by block shape')
    return data


def table_size(path: str | Path) -> int | None:
    """Return the input size that a table names in its meta; None if it names none.

    Raises:
        BadInput: see `read_table`.
    """
    meta = read_table(path).get('meta')
    size = meta.get('img_size') if isinstance(meta, dict) else None
    return size if type(size) is int and size > 0 else None


def by_width(values: dict | list) -> dict[int, object]:
    """Return the latencies of one key by width as a whole number, in growing order.

    Raises:
        ValueError: a width that is no whole number, or there twice.
    """
    pairs = values.items() if isinstance(values, dict) else enumerate(values, start=1)
    found: dict[int, object] = {}
    for text, ms in pairs:
        width = _width(text)
        if width in found:
            raise ValueError(f'has width {width} twice')
        found[width] = ms
    return dict(sorted(found.items()))


def _width(value: object) -> int:
    try:
        width = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
        if width.is_integer() and abs(width) < MAX_WIDTH:
            return int(width)
    except (ValueError, OverflowError):
        pass
    raise ValueError(f'has a width {value!r}, should be a whole number')


def _from_json(raw: bytes) -> object:
    return json.loads(raw.decode('utf-8-sig'), object_pairs_hook=unique_keys)


def _from_csv(raw: bytes) -> dict:
    """Rows key, width, ms; base,,ms; and meta, name, value. The first row may be a header."""
    data: dict = {}
    reader = csv.reader(io.StringIO(raw.decode('utf-8-sig'), newline=''))
    for row in filter(None, reader):
        if len(row) != 3:
            raise BadInput(f'line {reader.line_num} has {len(row)} columns, should have 3: key, width, ms')
        key, width, text = (cell.strip() for cell in row)
        value = _number(text)
        if key == 'meta':
            data.setdefault('meta', {})[width] = text if value is None else value
        elif value is not None:
            at, name = (data, key) if key == 'base' else (data.setdefault(key, {}), width)
            if name in at:
                raise BadInput(f'line {reader.line_num}: {key},{width} is there twice')
            at[name] = value
        elif data or key == 'base' or _number(width) is not None:
            raise BadInput(f'line {reader.line_num}: {text!r} should be a latency in ms')
    return data


def _number(text: str) -> int | float | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return None


READERS = {'.json': ('a JSON', _from_json), '.csv': ('a CSV', _from_csv)}
"""By a file's suffix: what it is, and how it is read."""


def _from_pickle(raw: bytes) -> object:
    data = _TableUnpickler(io.BytesIO(raw), encoding='latin1').load()  # Python 2 pickled bytes as text
    if _count(data, {}) > MOST_VALUES:
        raise BadInput(f'holds more than {MOST_VALUES} values, by references to the same ones')
    return _plain(data)


class _Dtype:
    """A data type of NumPy as pickled. NumPy's own class trusts the state that a pickle gives it."""

    def __init__(self, name: str = '', *_: object):
        self.name, self.order = name, ''

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1].replace('|', '=')

    def read(self, data: object) -> np.ndarray:
        """Return the numbers in pickled bytes, [n]."""
        if self.name[:1] not in NUMERIC or not self.name[1:].isdigit():
            raise BadInput(
                f'refused, the file asks for NumPy data of type {self.name!r}; '
                'a latency table holds only dicts, numbers and strings'
            )
        data = data.data if isinstance(data, _Encoded) else data
        data = data.encode('latin1') if isinstance(data, str) else data
        return np.frombuffer(data, np.dtype(self.order + self.name))


class _Encoded:
    """Bytes as pickled by old protocols: _codecs.encode(text, 'latin1')."""

    def __init__(self, text: str, encoding: str = 'latin1'):
        self.data = text.encode({'latin1': 'latin1', 'latin-1': 'latin1'}[encoding])

    def __setstate__(self, state: object) -> None:
        raise ValueError('bytes have no state')


class _Scalar:
    """A NumPy scalar as pickled."""

    def __init__(self, dtype: _Dtype, data: object):
        (self.value,) = dtype.read(data).tolist()

    def __setstate__(self, state: object) -> None:
        raise ValueError('a scalar has no state')


class _Array:
    """A NumPy array as pickled by protocols 0 to 4: _reconstruct(ndarray, (0,), b'b') and a state."""

    value: object = None

    def __init__(self, *_: object):
        pass

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        self.value = dtype.read(data).reshape(shape, order='F' if fortran else 'C').tolist()


class _Buffer(_Array):
    """A NumPy array as pickled by protocol 5."""

    def __init__(self, data: bytes, dtype: _Dtype, shape: tuple, order: str, *_: object):
        self.value = dtype.read(data).reshape(shape, order=order).tolist()


NUMPY = {
    ('multiarray', 'scalar'): _Scalar,
    ('multiarray', '_reconstruct'): _Array,
    ('numeric', '_frombuffer'): _Buffer,
}
ADMITTED = {
    ('collections', 'OrderedDict'): OrderedDict,
    ('_codecs', 'encode'): _Encoded,
    ('numpy', 'dtype'): _Dtype,
    ('numpy', 'ndarray'): _Array,
    **{(f'numpy.{core}.{module}', name): ours for (module, name), ours in NUMPY.items() for core in ('core', '_core')},
}
"""What a pickle may ask for, and what it gets: NumPy's numbers are decoded here, not by NumPy."""


class _TableUnpickler(pickle.Unpickler):
    """Admits `ADMITTED` besides what a pickle holds natively (dict, list, tuple, str, int, float, bool, None)."""

    def find_class(self, module: str, name: str) -> type:
        if (module, name) in ADMITTED:
            return ADMITTED[module, name]
        raise BadInput(
            f'refused, the file asks for {module}.{name}; a latency table holds only dicts, numbers and strings'
        )


def _count(value: object, counts: dict[int, float]) -> float:
    """Return how many values there are inside a value, each as often as it is reached; infinity for one within itself.

    Args:
        counts: results by the id of a value. A small pickle may have one value in very many places.
    """
    if not isinstance(value, (dict, list, tuple)):
        return 1
    if id(value) not in counts:
        counts[id(value)] = math.inf
        values = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        counts[id(value)] = 1 + sum(_count(one, counts) for one in values)
    return counts[id(value)]


def _plain(value: object) -> object:
    """Return a value with NumPy's numbers as Python's."""
    if isinstance(value, dict):
        return {_plain(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value))
    return value.value if isinstance(value, (_Scalar, _Array)) else value
