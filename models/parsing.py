"""Reading of search checkpoints: architecture, widths, and the config of the found network."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from models.config import NetworkConfig, build_config, load_config
from models.meta import MOST_NAMES, Meta, checkpoint_meta
from models.search_space import Arch, SearchSpace, Widths
from tools.errors import BadInput
from tools.files import load_checkpoint, strip_module_prefix

Masks = dict[str, dict[str, dict[int, Tensor]]]
"""0/1 masks of mid channels, [max width] each: masks[stage name][block name][op index]."""

MASKS_KEY = 'mc_mask_dddict'
"""Key of the masks in a search checkpoint."""

ARCH_KEY = 'arch'
"""Key of the current architecture in a search checkpoint; published ones have none."""

USUAL_CLASSES = 1000
"""Number of classes if a searched model has none, as published ones."""


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


def load_architecture(path: str | Path, space: SearchSpace) -> NetworkConfig:
    """Return the config of the network in `path`, a searched model or a `model.config`, with its meta.

    A searched model has the classes of its search.

    Raises:
        BadInput: the file is neither.
    """
    if is_config_file(path):
        return load_config(path)
    checkpoint = _read_search_checkpoint(path)
    state, masks = unpack_search_checkpoint(checkpoint, path, space)
    arch = saved_architecture(checkpoint, path, space) or parse_architecture(state, space)
    meta, searched_classes = search_meta(path)
    config = build_config(arch, mask_widths(masks), searched_classes, space)
    return replace(config, meta=meta).with_classes(searched_classes)


def search_meta(path: str | Path) -> tuple[Meta, int]:
    """Return the meta of a searched model, and the number of classes of its search; `USUAL_CLASSES` if it has none.

    Raises:
        BadInput: unreadable, or see `Meta.from_dict`.
    """
    checkpoint = load_checkpoint(path, whole=False)
    meta = checkpoint_meta(checkpoint if isinstance(checkpoint, dict) else {}, str(path))
    count = search_flags(path).get('num_classes')
    if type(count) is not int or not 2 <= count <= MOST_NAMES:
        count = len(meta.class_names or ()) or USUAL_CLASSES
    return meta, count


def search_flags(path: str | Path) -> Mapping[str, Any]:
    """Return the flags that a searched model was made with; none if it has none, as published ones.

    Raises:
        BadInput: unreadable.
    """
    checkpoint = load_checkpoint(path, whole=False)
    flags = checkpoint.get('flags') if isinstance(checkpoint, dict) else None
    return flags if isinstance(flags, Mapping) else {}


def load_search_checkpoint(path: str | Path, space: SearchSpace) -> tuple[dict[str, Tensor], Masks]:
    """Return the full-width weights (names without `module.`) and masks of a searched model.

    Raises:
        BadInput: not a search checkpoint, or one of another search space.
    """
    return unpack_search_checkpoint(_read_search_checkpoint(path), path, space)


def _read_search_checkpoint(path: str | Path) -> dict:
    checkpoint = load_checkpoint(path)
    state = checkpoint.get('state_dict') if isinstance(checkpoint, dict) else None
    if (
        not (isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values()))
        or MASKS_KEY not in checkpoint
    ):
        raise BadInput(f'{path}: neither a model.config nor a searched model (no state_dict and {MASKS_KEY} in it)')
    return checkpoint


def unpack_search_checkpoint(
    checkpoint: Mapping, path: str | Path, space: SearchSpace
) -> tuple[dict[str, Tensor], Masks]:
    """Check a searched model that was read from `path`; return its full-width weights and masks.

    Raises:
        BadInput: it is of another search space.
    """
    state, masks = strip_module_prefix(checkpoint['state_dict']), checkpoint[MASKS_KEY]
    for block, index, op in space.positions():
        where = f'{block.stage}.{block.name}'
        alphas = state.get(f'{where}.log_alphas')
        ops = len(space.ops)
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
        if (width := int(mask.sum())) < least:  # the block might have no expansion
            raise BadInput(
                f'{path}: mask of {where} op {index} keeps {width} channels, should keep at least {least} of {most}'
            )
    for name, stage in space.named_stages:
        if f'{name}.betas' not in state or state[f'{name}.betas'].shape != (len(stage.exit_depths),):
            raise BadInput(f'{path}: {name}.betas should be {len(stage.exit_depths)} values; another search space?')
    return state, masks


def saved_architecture(checkpoint: Mapping, path: str | Path, space: SearchSpace) -> Arch | None:
    """Return the current architecture in a searched model that was read from `path`; None if it has none.

    Its widths in the masks meet the target of the search.

    Args:
        checkpoint: passed `unpack_search_checkpoint`.

    Raises:
        BadInput: it is of another search space.
    """
    arch = checkpoint.get(ARCH_KEY)
    if arch is None:
        return None
    state = strip_module_prefix(checkpoint['state_dict'])
    for name, stage in space.named_stages:
        ops = arch.get(name) if isinstance(arch, dict) else None
        good = isinstance(ops, list) and len(ops) in stage.exit_depths
        for i, op in enumerate(ops if good else (), start=1):
            good = good and type(op) is int and 0 <= op < len(state[f'{name}.block{i}.log_alphas'])
        if not good:
            raise BadInput(
                f'{path}: {ARCH_KEY}.{name} should be a list of {stage.exit_depths[0]} to {stage.depth} operators by '
                f'number; another search space?'
            )
    return {name: arch[name] for name in space.stage_names}
