"""Random networks of the search space, and samples from timing them block by block while they run."""

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from latency_pkl.timing import LAUNCHES, Passes, typical_parts
from models.config import NetworkConfig, build_config
from models.latency import LatencyTable
from models.model_eval import NetworkEval
from models.onnx_graph import RANDOM_BOUND
from models.search_space import Arch, SearchSpace, Widths
from tools.errors import BadInput

FULL_DEPTH_SHARE = 0.5
END_SHARE = 0.15


@dataclass(frozen=True)
class Sample:
    """Times of one network's parts, ms, from an undisturbed core. Parts that were never timed on one are missing."""

    fixed: float
    """Stem, mix layer, pool and classifier; nan if one of them is missing."""
    blocks: list[tuple[str, int, float]]
    """(latency key, mid channels, ms)"""

    @property
    def total(self) -> float:
        """Time of all parts that are not missing."""
        return sum(ms for _, _, ms in self.blocks) + (0.0 if math.isnan(self.fixed) else self.fixed)

    def predicted(self, base: float, curves: Mapping[str, np.ndarray]) -> float:
        """Return the latency of the same parts in a table."""
        blocks = sum(float(curves[key][width - 1]) for key, width, _ in self.blocks)
        return blocks + (0.0 if math.isnan(self.fixed) else base)


class Decks:
    """Draws without replacement from lists that are shuffled again when they are used up."""

    def __init__(self, rng: random.Random):
        self.rng, self.decks = rng, {}

    def draw(self, name: object, items: Sequence) -> object:
        """Return one of the items; `name`: of their deck."""
        deck = self.decks.setdefault(name, [])
        if not deck:
            deck += self.rng.sample(items, len(items))
        return deck.pop()


def random_network(
    rng: random.Random, ends: bool, space: SearchSpace, divisor: int = 1, decks: Decks | None = None
) -> tuple[Arch, Widths]:
    """Draw depths, operators and widths.

    Args:
        ends: give half of the networks full depth, and some blocks the least or the most width, so that all keys occur
            over their whole range. Otherwise all draws are uniform.
        divisor: all widths are multiples of it, the next above what was drawn.
        decks: draw operators from them, so that networks drawn together have each operator in each block equally often.
    """
    arch: Arch = {}
    blocks, ops = space.blocks(), range(len(space.ops))
    for name, stage in space.named_stages:
        full = ends and rng.random() < FULL_DEPTH_SHARE
        depth = stage.depth if full else rng.choice(stage.exit_depths)
        own = [block for block in blocks if block.stage == name]
        arch[name] = [decks.draw(block, ops) if decks else rng.randrange(len(ops)) for block in own[:depth]]
    widths = space.start_widths()
    for block, index in space.chosen(arch):
        op = space.ops[index]
        low, high = op.min_width(block.in_ch), op.max_width(block.in_ch)
        at_end = ends and rng.random() < END_SHARE
        width = rng.choice((low, high)) if at_end else rng.randint(low, high)
        widths[block.stage][block.name][index] = min(-(-width // divisor), high // divisor) * divisor
    return arch, widths


def random_config(
    rng: random.Random, ends: bool, num_classes: int, space: SearchSpace, divisor: int = 1, decks: Decks | None = None
) -> NetworkConfig:
    """Return the config of a `random_network`."""
    return build_config(*random_network(rng, ends, space, divisor, decks), num_classes, space)


class _Uninitialised(TorchFunctionMode):
    """Leave parameters uninitialised. The meta device would need a second of imports in every new process."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, '__name__', '') in ('kaiming_uniform_', 'kaiming_normal_', 'uniform_', 'normal_'):
            return kwargs['tensor'] if 'tensor' in kwargs else args[0]
        return func(*args, **kwargs)


def build_network(config: NetworkConfig, device: torch.device, seed: int) -> NetworkEval:
    """Build a network to be timed. Its weights are uniform noise, which is faster than a real initialisation."""
    generator = torch.Generator(device).manual_seed(seed)
    with torch.device(device), _Uninitialised():
        net = NetworkEval(config).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.uniform_(-RANDOM_BOUND, RANDOM_BOUND, generator=generator)
    return net


def reference_config(num_classes: int, space: SearchSpace) -> NetworkConfig:
    """Return the reference network; re-timing it gives the machine's slowdown.

    It is the middle of the search space in depths and widths, and cycles through the operators, so that a slowdown
    affects it as much as other networks of the space.
    """
    depths = [stage.exit_depths[len(stage.exit_depths) // 2] for stage in space.stages]
    turns = itertools.cycle(range(len(space.ops)))
    arch = {name: [next(turns) for _ in range(depth)] for name, depth in zip(space.stage_names, depths, strict=True)}
    return build_config(arch, space.start_widths(), num_classes, space)


def launch_of(table: LatencyTable, device: torch.device) -> str:
    """Return how networks are timed beside a table, one of `LAUNCHES`: as its `launch`; 'eager' without, and on a CPU.

    Raises:
        BadInput: another launch.
    """
    launch = table.meta.get('launch', 'eager')
    if launch not in LAUNCHES:
        raise BadInput(f"the latency table's launch is {launch!r}, should be {' or '.join(LAUNCHES)}")
    return launch if device.type == 'cuda' else 'eager'


def tf32_of(table: LatencyTable) -> bool:
    """Return whether networks are timed in TF32 beside a table; True without `tf32`.

    Raises:
        BadInput: neither True nor False.
    """
    tf32 = table.meta.get('tf32', True)
    if type(tf32) is not bool:
        raise BadInput(f"the latency table's tf32 is {tf32!r}, should be True or False")
    return tf32


def sample_of(config: NetworkConfig, passes: Passes, img_size: int, fastest: float) -> Sample:
    """Make a sample of the times of a network's parts.

    Args:
        fastest: the `fastest_probe` of all passes of a table, ms; a larger value counts disturbed timings too.
    """
    stem, *blocks, end = np.where(passes.seen(fastest), typical_parts([passes], fastest), math.nan).tolist()
    keys = [(key, spec.mid_channels) for _, spec, key in config.table_keys(img_size)]
    timed = [(key, mid, ms) for (key, mid), ms in zip(keys, blocks, strict=True) if not math.isnan(ms)]
    return Sample(stem + end, timed)
