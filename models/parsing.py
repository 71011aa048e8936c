"""Reading of search checkpoints: architecture, widths, and the config of the found network."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.config import NetworkConfig, build_config, load_config
from models.meta import MOST_NAMES, Meta, checkpoint_meta
from models.search_space import Arch, SearchSpace, Widths
from tools.errors import BadInput
from tools.files import load_checkpoint, strip_module_prefix

Masks = dict[str, dict[str, dict[int, Tensor]]]  # 0/1, [max width] each: masks[stage name][block name][op index]

MASKS_KEY = 'mc_mask_dddict'  # of the masks in a search checkpoint, as published
ARCH_KEY = 'arch'  # of the current architecture in a search checkpoint; published ones have none
USUAL_CLASSES = 1000  # of a searched model that names none, as published ones


def parse_architecture(state: Mapping[str, Tensor], space: SearchSpace) -> Arch:
    """Return the most probable exit of each stage, and the most probable operator of each block before it.

    Args:
        state: has log_alphas and betas, names without `module.`.
    """
    arch: Arch = {}
    for name, stage in space.named_stages:
        depth = stage.exit_depths[int(state[f'{name}.betas'].argmax())]
        arch[name] = [int(state[f'{name}.block{i}.log_alphas'].argmax()) for i in range(1, depth + 1)]
    return arch


def random_probabilities(seed: int, space: SearchSpace) -> dict[str, Tensor]:
    """Return random log_alphas and betas: all depths and operators are equally likely to be the most probable."""
    sizes = {f'{block.stage}.{block.name}.log_alphas': len(space.ops) for block in space.blocks()}
    sizes |= {f'{name}.betas': len(stage.exit_depths) for name, stage in space.named_stages}
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.rand(size, generator=draw).log_softmax(0) for name, size in sizes.items()}


def mask_widths(masks: Masks) -> Widths:
    """Return the number of channels that each mask keeps."""
    return {
        stage: {block: {op: int(mask.sum()) for op, mask in ops.items()} for block, ops in blocks.items()}
        for stage, blocks in masks.items()
    }


def is_config_file(path: str | Path) -> bool:
    """Return whether a file holds JSON text (a config) rather than a checkpoint.

    Raises:
        BadInput: the file cannot be read.
    """
    try:
        with open(path, 'rb') as f:
            return f.read(64).lstrip(b'\xef\xbb\xbf \t\r\n').startswith((b'{', b'['))
    except OSError as e:
        raise BadInput(f'{path}: cannot be read ({e.strerror}); expected a searched model or a model.config') from e


@dataclass(frozen=True)
class Searched:
    """What a parser needs of a search.

    Attributes:
        state: log_alphas and betas, and full-width weights if it was read from a searched model.
        widths: of all operators.
        arch: current architecture, whose widths meet the target of the search.
        flags: of the search; none if it has none, as published ones.
    """

    state: dict[str, Tensor]
    widths: Widths
    arch: Arch
    meta: Meta
    num_classes: int
    flags: Mapping[str, Any]

    def config(self, space: SearchSpace) -> NetworkConfig:
        """Return the config of the current architecture, with the meta of the search."""
        config = build_config(self.arch, self.widths, self.num_classes, space)
        return replace(config, meta=self.meta).with_classes(self.num_classes)


def read_searched(path: str | Path, space: SearchSpace) -> Searched:
    """Read a searched model.

    Raises:
        BadInput: not a search checkpoint, or one of another search space.
    """
    checkpoint = load_checkpoint(path)
    weights = checkpoint.get('state_dict') if isinstance(checkpoint, dict) else None
    named = isinstance(weights, dict) and all(isinstance(value, Tensor) for value in weights.values())
    if not named or MASKS_KEY not in checkpoint:
        raise BadInput(f'{path}: neither a model.config nor a searched model (no state_dict and {MASKS_KEY} in it)')
    state, masks = unpack_search_checkpoint(checkpoint, path, space)
    arch = saved_architecture(checkpoint, path, space) or parse_architecture(state, space)
    meta, flags = checkpoint_meta(checkpoint, str(path)), checkpoint.get('flags')
    flags = flags if isinstance(flags, Mapping) else {}
    count = flags.get('num_classes')
    if type(count) is not int or not 2 <= count <= MOST_NAMES:
        count = len(meta.class_names or ()) or USUAL_CLASSES
    return Searched(state, mask_widths(masks), arch, meta, count, flags)


def random_search(seed: int, num_classes: int, space: SearchSpace) -> Searched:
    """Return what a search might have found by chance: a random architecture at the widths of a search's start."""
    state = random_probabilities(seed, space)
    return Searched(state, space.start_widths(), parse_architecture(state, space), Meta(), num_classes, {})


def load_architecture(path: str | Path, space: SearchSpace) -> NetworkConfig:
    """Return the config of the network in `path`, a searched model or a `model.config`, with its meta.

    Raises:
        BadInput: the file is neither.
    """
    return load_config(path) if is_config_file(path) else read_searched(path, space).config(space)


def unpack_search_checkpoint(
    checkpoint: Mapping, path: str | Path, space: SearchSpace
) -> tuple[dict[str, Tensor], Masks]:
    """Check a searched model that was read from `path`; return its full-width weights and masks.

    Raises:
        BadInput: it is of another search space.
    """
    state, masks, ops = strip_module_prefix(checkpoint['state_dict']), checkpoint[MASKS_KEY], len(space.ops)
    for block, index, op in space.positions():
        where = f'{block.stage}.{block.name}'
        alphas = state.get(f'{where}.log_alphas')
        if alphas is None or alphas.shape != (ops,) or not alphas.isfinite().all():
            raise BadInput(f'{path}: {where}.log_alphas should be {ops} values; another search space?')
        least, most = op.min_width(block.in_ch), op.max_width(block.in_ch)
        try:
            mask = masks[block.stage][block.name][index]
            good = mask.shape == (most,) and bool(((mask == 0) | (mask == 1)).all())
        except (KeyError, IndexError, TypeError, AttributeError):
            good = False
        if not good:
            raise BadInput(f'{path}: mask of {where} op {index} is not {most} zeros and ones')
        width = int(mask.sum())
        if width < least:  # the block might have no expansion
            raise BadInput(
                f'{path}: mask of {where} op {index} keeps {width} channels, should keep at least {least} of {most}'
            )
    for name, stage in space.named_stages:
        betas, exits = state.get(f'{name}.betas'), len(stage.exit_depths)
        if betas is None or betas.shape != (exits,):
            raise BadInput(f'{path}: {name}.betas should be {exits} values; another search space?')
    return state, masks


def saved_architecture(checkpoint: Mapping, path: str | Path, space: SearchSpace) -> Arch | None:
    """Return the current architecture in a searched model that was read from `path`; None if it has none.

    Raises:
        BadInput: it is of another search space.
    """
    arch = checkpoint.get(ARCH_KEY)
    if arch is None:
        return None
    for name, stage in space.named_stages:
        ops = arch.get(name) if isinstance(arch, dict) else None
        good = isinstance(ops, list) and len(ops) in stage.exit_depths
        if not good or not all(type(op) is int and 0 <= op < len(space.ops) for op in ops):
            raise BadInput(
                f'{path}: {ARCH_KEY}.{name} should be a list of {stage.exit_depths[0]} to {stage.depth} operators by '
                f'number; another search space?'
            )
    return {name: arch[name] for name in space.stage_names}
