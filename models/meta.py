"""What travels from step to step with a network: the optional `meta` of configs, searched models and weights."""

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from tools.errors import BadInput
from tools.files import CLASS_NAMES

META = 'meta'
"""Key in configs and checkpoints."""

MOST_TEXT, MOST_NAMES = 4096, 65536
LEAST_SIZE, MOST_SIZE = 32, 4096


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= MOST_TEXT and '\0' not in value


def _is_size(value: object) -> bool:
    return type(value) is int and LEAST_SIZE <= value <= MOST_SIZE


def _is_triple(value: object) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 3 and all(map(_is_number, value))


def _is_mean(value: object) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 3 and all(one == 0 or _is_number(one) for one in value)


def _are_names(value: object) -> bool:
    return isinstance(value, (list, tuple)) and 2 <= len(value) <= MOST_NAMES and all(map(_is_text, value))


SIZE = _is_size, f'a whole number from {LEAST_SIZE} to {MOST_SIZE}'
THREE_NUMBERS = _is_mean, 'three numbers of at least 0'
THREE_POSITIVE = _is_triple, 'three positive numbers'
NAMES = _are_names, f'a list of 2 to {MOST_NAMES} texts'
TEXT = _is_text, f'a text of at most {MOST_TEXT} characters'
NUMBER = _is_number, 'a positive number'
KINDS: Mapping[str, tuple[Callable[[object], bool], str]] = {
    'img_size': SIZE, 'mean': THREE_NUMBERS, 'std': THREE_POSITIVE, 'class_names': NAMES, 'table': TEXT, 'unit': TEXT,
    'target': NUMBER, 'target_given': TEXT, 'predicted': NUMBER, 'measured': NUMBER, 'measured_on': TEXT,
}  # fmt: skip
"""By entry: a check of its value, and what the value should be."""


@dataclass(frozen=True)
class Meta:
    """Input, classes and latencies of a network; None for what no step has given yet."""

    img_size: int | None = None
    """Height and width of the input in pixels."""
    mean: tuple[float, ...] | None = None
    """Of red, green and blue in images from 0 to 1; inputs are (image - mean) / std."""
    std: tuple[float, ...] | None = None
    class_names: tuple[str, ...] | None = None
    table: str | None = None
    """Path of the latency table."""
    unit: str | None = None
    """Of `target` and `predicted`."""
    target: float | None = None
    target_given: str | None = None
    """The target as `--target_lat` had it, such as '50%'."""
    predicted: float | None = None
    """Latency by the table."""
    measured: float | None = None
    """Latency by the clock, in ms."""
    measured_on: str | None = None

    @classmethod
    def from_dict(cls, data: object, where: str) -> 'Meta':
        """Check plain values and build the meta from them; None is none. Entries of other names are ignored.

        Args:
            where: name of the source in error messages.

        Raises:
            BadInput: an entry of the wrong type or out of bounds.
        """
        if data is None:
            return cls()
        if not isinstance(data, Mapping):
            raise BadInput(f'{where}: {META} is a {type(data).__name__}, should be an object')
        values = {name: data[name] for name in KINDS if data.get(name) is not None}
        for name, value in values.items():
            good, wanted = KINDS[name]
            if not good(value):
                raise BadInput(f'{where}: {META}: {name} is {reprlib.repr(value)}, should be {wanted}')
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """Return the entries that are there, as plain values."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def at_size(self, img_size: int) -> 'Meta':
        """Return the meta at an input size, without table and latencies if they are of another one."""
        if self.img_size in (None, img_size):
            return replace(self, img_size=img_size)
        return Meta(img_size, self.mean, self.std, self.class_names)

    def latencies(self) -> str:
        """Return the latencies in words, each with what it is; '' without any."""
        given = f', given as {self.target_given}' if self.target_given else ''
        unit = self.unit or 'ms'
        parts = [
            f'target {self.target:.4f} {unit}{given}' if self.target else '',
            f'predicted by the table {self.predicted:.4f} {unit}' if self.predicted else '',
            f'measured by the clock {self.measured:.4f} ms' if self.measured else '',
        ]
        return '; '.join(filter(None, parts))


def checkpoint_meta(checkpoint: Mapping, where: str) -> Meta:
    """Return the meta of a checkpoint; of one without, what its flags and class names give.

    Raises:
        BadInput: see `Meta.from_dict`.
    """
    names = checkpoint.get(CLASS_NAMES)
    found = {CLASS_NAMES: names} if NAMES[0](names) else {}
    if isinstance(checkpoint.get(META), Mapping):  # checkpoints of other programs may have anything there
        return Meta.from_dict({**checkpoint[META], **found}, where)
    flags = checkpoint.get('flags')
    size = flags.get('img_size') if isinstance(flags, Mapping) else None
    return Meta.from_dict(found | ({'img_size': size} if SIZE[0](size) else {}), where)
