"""Networks for a device that is not at hand, and the table from their times there. See docs/latency.md."""

import hashlib
import json
import math
import random
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from latency_pkl.fit import Fit
from latency_pkl.fit_whole import FAR, LEAST_FITTED, fit_whole, wild_timings
from latency_pkl.measured import errors_of
from latency_pkl.sampling import Decks, reference_config
from models.config import NetworkConfig, build_config, load_config, unique_keys
from models.latency import LatencyTable
from models.onnx_graph import RANDOM_BOUND, save_onnx, to_onnx
from models.search_space import Arch, SearchSpace
from models.tables import LEAST_PLAUSIBLE_MS, MOST_PLAUSIBLE_MS
from tools.errors import BadInput
from tools.files import write_atomic, write_text

REFERENCE = 'reference'
"""Name of the reference network in a kit."""

NETWORKS, LEAST_NETWORKS, WIDTH_DIVISOR = 120, 40, 8
"""Usual and fewest random networks of a kit, and what their widths are usually multiples of."""

LEAST_HELD_BACK = 5
"""Timed networks that a table needs besides those of the fit."""

STRATA = 8
"""Parts of a block's range of widths that are drawn equally often."""

LEVELLED = 3
"""One in so many networks has similar positions in the ranges of widths, all low or all high, as scaled ones have."""

NEAR = 0.25
"""Distance of these positions from their network's level."""

PAGE = 4096
"""Bytes at whose multiples weights begin, as ONNX advises for files that are mapped into memory."""

WEIGHTS, LEAST_SHARED = 'weights.bin', 64
"""File with the weights of all networks, and bytes of a tensor up to which it stays in its model."""

SUFFIXES = ('.onnx', '.config', '.tflite', '.engine', '.plan', '.xml')
"""Of files that a line of timings may name."""

README = """Time these networks on a device, for a latency table of it.

    pip install onnxruntime numpy
    python time_networks.py

writes timings.csv (python time_networks.py --help lists threads, providers and more). Other programs can write it too:
it needs a line 'network,ms' for each file in networks/, such as 'net_000,14.2'. Copy timings.csv back:

    python latency_pkl/make_lat_lut.py --timings {folder}/timings.csv --save_path my_table.pkl

networks/weights.bin has the weights of all networks; keep it beside them. Input: images [batch, 3, {size}, {size}].
"""


def held_back_of(count: int) -> int:
    """Return how many of a kit's random networks are not fitted but give the table's error.

    Those of the smallest kit leave room for a few wild timings on both sides.
    """
    return min(20, count // 5)


def kit_networks(
    count: int, num_classes: int, space: SearchSpace, divisor: int, rng: random.Random
) -> dict[str, NetworkConfig]:
    """Return networks by name: the reference, those for the fit, then those that are held back from it.

    In those for the fit, each block has each operator about equally often, in all parts of its range of widths; half
    of the stages have full depth. Those that are held back are uniform draws. Widths are multiples of `divisor`, except
    in the reference, which is not fitted either.
    """
    decks = Decks(rng)
    networks = {REFERENCE: reference_config(num_classes, space)}
    for number in range(count):
        arch: Arch = {}
        held_back = number >= count - held_back_of(count)
        for name, stage in space.named_stages:
            depths, ops = list(stage.exit_depths), range(len(space.ops))
            depth = rng.choice(depths) if held_back else decks.draw(name, depths + [stage.depth] * len(depths))
            places = range(depth)
            arch[name] = [rng.choice(ops) if held_back else decks.draw((name, place), ops) for place in places]
        widths, level = space.start_widths(), rng.random()
        for block, index in space.chosen(arch):
            op, key = space.ops[index], block.key(space.ops[index])
            if held_back:
                at = rng.random()
            elif number % LEVELLED == 0:
                at = level + rng.uniform(-NEAR, NEAR)
            else:
                at = (decks.draw(key, range(STRATA)) + rng.uniform(-0.5, 0.5)) / (STRATA - 1)
            low, high = op.min_width(block.in_ch), op.max_width(block.in_ch)
            widths[block.stage][block.name][index] = _multiple(low + (high - low) * at, low, high, divisor)
        networks[f'net_{number:03d}'] = build_config(arch, widths, num_classes, space)
    return networks


def _multiple(width: float, low: int, high: int, divisor: int) -> int:
    """Return the nearest multiple within a range."""
    return min(max(round(width / divisor) * divisor, -(-low // divisor) * divisor), high // divisor * divisor)


def write_kit(folder: str | Path, networks: Mapping[str, NetworkConfig], settings: dict, held_back: int = 0) -> int:
    """Write a folder of networks as ONNX, with the program that times them, and the same as a zip file beside it.

    The weights of all networks are parts of one file of random numbers. So the kit is small, and no runtime can
    simplify them. Within a network, no two layers share numbers, since they would share cache lines too.

    Args:
        networks: by name, the `REFERENCE` among them.
        settings: img_size, batch_size, opset, and others to keep in networks.json.
        held_back: number of networks, the last ones, that are not for the fit.

    Returns:
        Bytes of the zip file.

    Raises:
        BadInput: the folder exists, or onnx is missing.
    """
    folder = Path(folder)
    check_kit_folder(folder)
    (folder / 'networks').mkdir(parents=True)
    size, entries = 0, {}
    for number, (name, config) in enumerate(networks.items()):
        model = to_onnx(config, 0, settings['img_size'])
        size = max(size, _share_weights(model))
        file = f'networks/{name}.onnx'
        save_onnx(model, folder / file)
        use = 'reference' if name == REFERENCE else 'held back' if number >= len(networks) - held_back else 'fit'
        entries[name] = {'file': file, 'use': use, 'config': config.to_dict()}
    write_atomic(folder / 'networks' / WEIGHTS, lambda f: f.write(random_weights(size // 4).tobytes()))
    text = json.dumps(entries)
    kit = hashlib.sha256(text.encode()).hexdigest()[:16]
    write_text(folder / 'networks.json', json.dumps({'kit': kit, **settings, 'networks': entries}, indent=1) + '\n')
    write_text(folder / 'README.md', README.format(folder=folder.name, size=settings['img_size']))
    program = Path(__file__).with_name('time_networks.py')
    write_text(folder / program.name, program.read_text(encoding='utf-8'))
    write_atomic(folder.with_name(f'{folder.name}.zip'), lambda f: _zip(folder, f))
    return folder.with_name(f'{folder.name}.zip').stat().st_size


def check_kit_folder(folder: Path) -> None:
    """Raise BadInput if a kit cannot be written there."""
    for path in (folder, folder.with_name(f'{folder.name}.zip')):
        if path.exists():
            raise BadInput(f'--kit {folder}: {path} exists; choose another name, or delete it')
    if not folder.absolute().parent.is_dir():
        raise BadInput(f'--kit {folder}: its folder does not exist; make it first')


def random_weights(count: int) -> np.ndarray:
    """Return uniform random numbers, float32 [count]. They have 8 bits of precision, so that they can be compressed."""
    values = np.random.default_rng(0).random(count, np.float32) * (2 * RANDOM_BOUND) - RANDOM_BOUND
    return (values.view(np.uint32) & 0xFFFF0000).view(np.float32)


def _share_weights(model) -> int:
    """Move the weights of an ONNX model to consecutive parts of `WEIGHTS`. Return the bytes that it needs there."""
    end = 0
    for tensor in model.graph.initializer:
        length = len(tensor.raw_data)
        if length <= LEAST_SHARED:
            continue
        tensor.ClearField('raw_data')
        tensor.data_location = tensor.EXTERNAL
        for key, value in (('location', WEIGHTS), ('offset', end), ('length', length)):
            tensor.external_data.add(key=key, value=str(value))
        end += -(-length // PAGE) * PAGE
    return end


def _zip(folder: Path, file) -> None:
    with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for path in sorted(folder.rglob('*')):
            archive.write(path, path.relative_to(folder.parent))


class Row(NamedTuple):
    """A line of timings."""

    line: int
    name: str
    """The network's file without folder and suffix."""
    ms: float
    file: str
    """The name as written."""


@dataclass(frozen=True)
class Timings:
    """A file of timings."""

    path: Path
    meta: dict[str, str]
    """Its lines '# name: value'."""
    rows: list[Row]

    def where(self, row: Row) -> str:
        """Return the place of a row, and its network."""
        return f'{self.path}, line {row.line}: {row.name}'

    def setting(self, name: str, usual: int) -> int:
        """Return a whole number of its meta lines.

        Raises:
            BadInput: not a whole number of at least 1.
        """
        text = self.meta.get(name, str(usual))
        if not text.isascii() or not text.isdigit() or int(text) < 1:
            raise BadInput(f'{self.path}: {name} is {text!r}, should be a whole number of at least 1')
        return int(text)


def read_timings(path: str | Path, log: Callable[[str], object] = print) -> Timings:
    """Read lines of 'network,ms'. A network is named by its file, with or without folder and suffix.

    Lines '# name: value' describe the device; the header is optional. Lines that are neither are left out; each gives
    a line to `log`.

    Raises:
        BadInput: the file cannot be read.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding='utf-8-sig').splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f'{path}: cannot be read as timings ({e}); expected lines such as net_000,14.2') from e
    meta, rows, seen = {}, [], {}
    for number, line in enumerate(lines, start=1):
        if line.lstrip().startswith('#'):
            name, colon, value = line.lstrip('# ').partition(':')
            meta |= {name.strip(): value.strip()} if colon else {}
            continue
        cells = [cell.strip() for cell in line.split(',')]
        if not line.strip() or cells == ['network', 'ms']:
            continue
        name = _plain_name(cells[0])
        try:
            (ms,) = map(float, cells[1:])
        except ValueError:
            ms = math.nan
        if not 0 < ms < math.inf or not name:
            log(f'{path}, line {number}: {line.strip()[:60]!r} is not network,ms; left out')
        elif name in seen:
            log(f'{path}, line {number}: {name} is there already, in line {seen[name]}; left out')
        else:
            rows.append(Row(number, name, ms, cells[0]))
            seen[name] = number
    return Timings(path, meta, rows)


def _plain_name(text: str) -> str:
    name = text.replace('\\', '/').rpartition('/')[2]
    return name.rpartition('.')[0] if name.lower().endswith(SUFFIXES) else name


@dataclass(frozen=True)
class Kit:
    """Contents of networks.json."""

    settings: dict
    networks: dict[str, NetworkConfig]
    held_back: set[str]


def read_kit(folder: str | Path) -> Kit:
    """Read the networks.json of a kit.

    Raises:
        BadInput: there is none, or it has something missing or wrong.
    """
    path = Path(folder) / 'networks.json'
    try:
        data = json.loads(path.read_text(encoding='utf-8-sig'), object_pairs_hook=unique_keys)
        entries = data['networks'].items()
        settings = {name: data[name] for name in ('img_size', 'num_classes', 'batch_size', 'width_divisor', 'seed')}
        kinds = {name: (entry['use'], entry['config']) for name, entry in entries}
    except OSError as e:
        raise BadInput(f'{path}: cannot be read ({e.strerror}); --kit names the folder of the timed networks') from e
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise BadInput(f'{path}: not a list of networks as --kit writes it ({type(e).__name__}: {e})') from e
    for name, value in settings.items():
        if type(value) is not int or value < (name != 'seed'):
            raise BadInput(f'{path}: {name} is {value!r}, should be a whole number of at least 1')
    networks = {name: NetworkConfig.from_dict(data, f'{path}: {name}') for name, (_, data) in kinds.items()}
    held_back = {name for name, (use, _) in kinds.items() if use == 'held back'}
    return Kit({**settings, 'kit': data.get('kit')}, networks, held_back)


def timed_table(
    timings: Timings, kit: Kit, space: SearchSpace, note: str | None, log: Callable[[str], object] = print
) -> tuple[Fit, dict]:
    """Fit a table to timings of a kit. Lines that are left out are logged, and so are the errors.

    Args:
        note: name of the device; None: as the timings name it.

    Returns:
        The fit, and the table's meta.

    Raises:
        BadInput: timings of another kit, in another unit, or too few good ones.
    """
    img_size, divisor = kit.settings['img_size'], kit.settings['width_divisor']
    good, wild = _good_timings(timings, kit, space, log)
    unseen = [one for name, one in good.items() if name in kit.held_back]
    fitted = [one for name, one in good.items() if name not in kit.held_back and name != REFERENCE]
    if len(fitted) < LEAST_FITTED or len(unseen) < LEAST_HELD_BACK:
        raise BadInput(
            f'{timings.path}: {len(fitted)} good timings for the fit and {len(unseen)} of networks that are held back;'
            f' should be at least {LEAST_FITTED} and {LEAST_HELD_BACK}; time more of them, or a larger kit'
        )
    fit = fit_whole(fitted, img_size, space, divisor)
    table = LatencyTable(fit.base, fit.curves, {}, img_size)
    mean, worst, bias = errors_of((table.of_config(config), ms) for config, ms in unseen)
    log(f'{len(fitted)} networks fitted; {wild} wild timings left out')
    log(f'Against {len(unseen)} held-back networks: mean error {mean:.2f} %, worst {worst:.2f} %, bias {bias:+.2f} %')
    meta = {
        'unit': 'ms',
        'device': note or timings.meta.get('device', 'unknown'),
        'timed_with': timings.meta.get('runtime', 'unknown'),
        'batch_size': timings.setting('batch_size', kit.settings['batch_size']),
        'method': 'whole networks timed on the device, fitted by a physical model with corrections',
        'width_divisor': divisor,
        'samples': len(fitted),
        'unseen_networks': len(unseen),
        'residual_mean_percent': round(mean, 3),
        'residual_worst_percent': round(worst, 3),
        'residual_bias_percent': round(bias, 3),
        'img_size': img_size,
        'num_classes': kit.settings['num_classes'],
        'seed': kit.settings['seed'],
    }
    if 'threads' in timings.meta:
        meta['threads'] = timings.setting('threads', 1)
    return fit, meta | ({'kit_reference_ms': good[REFERENCE][1]} if REFERENCE in good else {})


def _good_timings(
    timings: Timings, kit: Kit, space: SearchSpace, log: Callable[[str], object]
) -> tuple[dict[str, tuple[NetworkConfig, float]], int]:
    """Return (config, ms) of the networks whose timings count, by name, and the number of wild timings."""
    if timings.meta.get('kit', kit.settings['kit']) != kit.settings['kit']:
        raise BadInput(f'{timings.path}: timings of another kit; --kit names the folder of their networks.json')
    img_size = kit.settings['img_size']
    known = [row for row in timings.rows if row.name in kit.networks]
    for row in timings.rows:
        if row.name not in kit.networks:
            log(f'{timings.where(row)} is no network of the kit; left out')
    if absent := sorted(kit.networks.keys() - {row.name for row in known}):
        some = f'{", ".join(absent[:5])}{", ..." if len(absent) > 5 else ""}'
        log(f'{timings.path}: {len(absent)} networks have no timing: {some}')
    check_unit(timings, known, img_size)
    timed = [(kit.networks[row.name], row.ms) for row in known]
    wild = wild_timings(timed, img_size, space) if len(timed) >= LEAST_FITTED else {}
    for i, expected in wild.items():
        unit = '; is it in seconds?' if 300 < expected / known[i].ms < 3000 else ''
        log(f'{timings.where(known[i])} took {known[i].ms:.5g} ms, by all others {expected:.5g}{unit}; left out')
    good = {row.name: timed[i] for i, row in enumerate(known) if i not in wild}
    return good, len(known) - len(good)


def check_unit(timings: Timings, rows: Sequence[Row], img_size: int) -> None:
    """Raise BadInput if most timings are not plausible in ms."""
    if not rows:
        raise BadInput(f'{timings.path}: has no timing of a network of the kit; expected lines such as net_000,14.2')
    usual = float(np.median([row.ms for row in rows]))
    slowest = MOST_PLAUSIBLE_MS * max(img_size / 224, 1) ** 2
    if not LEAST_PLAUSIBLE_MS / 2 <= usual <= slowest:
        unit = 'microseconds' if usual > slowest else 'seconds'
        raise BadInput(f'{timings.path}: a usual network takes {usual:.5g} ms; are these {unit}? Timings are in ms')


SAME_SETTING = ('batch_size', 'threads', 'img_size', 'num_classes')
"""Settings that timings must share with a table for the reference networks of both to be compared."""


class Found(NamedTuple):
    """A found network that was timed."""

    config: NetworkConfig
    predicted: float
    """Its latency in the table, ms."""
    ms: float


def found_networks(timings: Timings, table: LatencyTable, log: Callable[[str], object] = print) -> list[Found]:
    """Return the networks of timings with their latencies in a table.

    A line names a network of the kit beside it, or a config file: relative to the timings, or to the current folder. If
    the reference network was timed too, in the setting of the table, times are at its speed when the table was made.

    Raises:
        BadInput: no line names a network, a file is no config of the table's space, or the times are of another input
            or batch size than the table's.
    """
    for name, own in (('img_size', table.img_size), ('batch_size', table.meta.get('batch_size'))):
        if own is not None and timings.meta.get(name, str(own)) != str(own):
            raise BadInput(f'{timings.path}: timed with {name} {timings.meta[name]}, the table has {own}')
    beside = timings.path.parent
    networks = read_kit(beside).networks if (beside / 'networks.json').exists() else {}
    slowness, found = _slowness(timings, table), []
    if slowness != 1:
        log(f'The device takes {slowness:.3f} times as long as when its table was made; corrected for')
    for row in timings.rows:
        if row.name == REFERENCE:
            continue
        files = [folder / Path(row.file).with_name(f'{row.name}.config') for folder in (beside, Path())]
        file = next((file for file in files if file.exists()), None)
        if row.name not in networks and not file:
            log(f'{timings.where(row)}: no such config, neither {files[0]} nor {files[1]}; left out')
            continue
        config = networks.get(row.name) or load_config(file)
        predicted = table.of_config(config)
        if not 1 / FAR < row.ms / slowness / predicted < FAR:
            log(f'{timings.where(row)} took {row.ms:.5g} ms, by the table {predicted:.5g}; left out')
            continue
        found.append(Found(config, predicted, row.ms / slowness))
    if not found:
        raise BadInput(f'{timings.path}: has no timing of a found network; expected lines such as found.config,14.2')
    return found


def _slowness(timings: Timings, table: LatencyTable) -> float:
    """Return the time of the reference network over that in a table; 1 if one of them is unknown."""
    now = next((row.ms for row in timings.rows if row.name == REFERENCE), None)
    then = table.meta.get('kit_reference_ms')
    same = all(timings.meta.get(name) == str(table.meta.get(name)) for name in SAME_SETTING)
    return now / then if now and same and isinstance(then, (int, float)) and 0 < then < math.inf else 1.0
