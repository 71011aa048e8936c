"""A network and a search space as plain values, for logs and pictures."""

import logging
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models.config import MBSpec, NetworkConfig, build_config
from models.latency import LatencyTable
from models.model_eval import NetworkEval
from models.parsing import Masks, mask_widths, parse_architecture
from models.search_space import Arch, Op, SearchSpace, after_stride

log = logging.getLogger('tf-nas')

UNDECIDED = 0.9
"""Mean entropy of operator probabilities above which a search has not decided."""

UNSETTLED = 1 / 3
"""Share of blocks above which a choice that changed in the last epoch has not settled."""


def describe_space(img_size: int, space: SearchSpace) -> dict:
    """Return operators, blocks with the (least, start, most) width of each operator, and exit depths.

    Args:
        img_size: input size in pixels.
    """
    blocks = space.blocks(img_size)
    return {
        'ops': [{'label': op.label, 'kernel': op.kernel, 'expand': op.expand, 'se': op.se} for op in space.ops],
        'blocks': [
            {
                'stage': block.stage,
                'name': block.name,
                'size': block.in_size,
                'widths': [
                    (op.min_width(block.in_ch), op.start_width(block.in_ch), op.max_width(block.in_ch))
                    for op in space.ops
                ],
            }
            for block in blocks
        ],
        'exits': {name: list(stage.exit_depths) for name, stage in space.named_stages},
    }


def describe_network(
    config: NetworkConfig, img_size: int, space: SearchSpace, table: LatencyTable | None = None
) -> dict:
    """Return a network's blocks after the stem with their MACs, and with their latencies if a table is given.

    Returns:
        'blocks': one dict each: stage, place, kernel, stride, size (of its input), in, mid, out, se (channels), act,
        expand, low and high (nominal expansion, least and most mid channels of its operator; None if the block is not
        in `space`), macs (M), latency (None if not in the table). 'macs' (M), 'params' (M), 'latency': of the whole
        network. 'unit': of the latencies. 'img_size'.
    """
    with torch.device('meta'):
        net = NetworkEval(config).eval()
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            net(torch.zeros(1, 3, img_size, img_size))
    flops = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    rows = []
    size = after_stride(after_stride(img_size, config.first_stem.stride), config.second_stem.stride)
    for place, spec, key in config.table_keys(img_size):
        op = _operator(spec, space)
        curve = table.curves.get(key) if table else None
        known = curve is not None and spec.mid_channels <= len(curve)
        rows.append(
            {
                'stage': place.split('.')[0],
                'place': place,
                'kernel': spec.kernel_size,
                'stride': spec.stride,
                'size': size,
                'in': spec.in_channels,
                'mid': spec.mid_channels,
                'out': spec.out_channels,
                'se': spec.se_channels,
                'act': spec.act_func,
                'expand': op.expand if op else None,
                'low': op.min_width(spec.in_channels) if op else None,
                'high': op.max_width(spec.in_channels) if op else None,
                'macs': flops[f'NetworkEval.{place}'] / 2e6,
                'latency': float(curve[spec.mid_channels - 1]) if known else None,
            }
        )
        size = after_stride(size, spec.stride)
    latencies = [row['latency'] for row in rows]
    return {
        'blocks': rows,
        'macs': flops['Global'] / 2e6,
        'params': sum(p.numel() for p in net.parameters()) / 1e6,
        'latency': table.base + sum(latencies) if table and None not in latencies else None,
        'unit': table.unit if table else None,
        'img_size': img_size,
    }


def describe_table(table: LatencyTable, space: SearchSpace) -> dict:
    """Return unit, base, origin and reachable range of a latency table."""
    about = {name: table.meta.get(name) for name in ('device', 'batch_size', 'threads', 'method')}
    return {'unit': table.unit, 'base': table.base, 'reach': table.reach(space), **about}


def describe_architecture(
    state: Mapping[str, Tensor],
    masks: Masks,
    table: LatencyTable,
    space: SearchSpace,
    num_classes: int,
    arch: Arch | None = None,
) -> dict:
    """Return the current architecture of a search and the probabilities it was chosen by.

    Args:
        state: full-width weights, names without `module.`.
        arch: the current architecture; None: the most probable.

    Returns:
        'ops' (probabilities, [blocks][ops]), 'exits' (probabilities, by stage), 'widths' ([blocks][ops]), 'arch' and
        its 'network' (see `describe_network`).
    """
    widths = mask_widths(masks)
    blocks = space.blocks(table.img_size)
    arch = arch or parse_architecture(state, space)
    config = build_config(arch, widths, num_classes, space)
    return {
        'ops': [state[f'{block.stage}.{block.name}.log_alphas'].softmax(0).tolist() for block in blocks],
        'exits': {name: state[f'{name}.betas'].softmax(0).tolist() for name in space.stage_names},
        'widths': [list(widths[block.stage][block.name].values()) for block in blocks],
        'arch': arch,
        'network': describe_network(config, table.img_size, space, table),
    }


def architecture_line(network: Mapping) -> str:
    """Return the blocks of a described network by stage: kernel, expansion, mid channels.

    Such as `1: k3e3-64 k5e6se-144 | 2: ...`. Without an expansion if a block is not in the search space.

    Args:
        network: see `describe_network`.
    """
    stages: dict[str, list[str]] = {}
    for row in network['blocks']:
        expand = f'e{row["expand"]}' if row['expand'] else ''
        text = f'k{row["kernel"]}{expand}{"se" if row["se"] else ""}-{row["mid"]}'
        stages.setdefault(row['stage'].removeprefix('stage'), []).append(text)
    return ' | '.join(f'{stage}: {" ".join(blocks)}' for stage, blocks in stages.items())


def epoch_line(found: Mapping, numbers: Mapping, about: Mapping, num_classes: int, warming_up: bool) -> str:
    """Return the state of a search after an epoch: accuracy, and after the warm-up latency, target and architecture.

    The accuracy is that of the validation if there was one, else that of the weights in training.

    Args:
        found: see `describe_architecture`.
        numbers: of the epoch: w_top1, and val if there was a validation.
        about: of the latency: unit and target.
    """
    name, top1 = 'training', numbers['w_top1']
    if numbers.get('val'):
        name, top1 = 'validation', numbers['val']['top1']
    accuracy = f'{name} top-1 {top1:.2f} % (chance {100 / num_classes:.2f} %)'
    if warming_up:  # no architecture is chosen yet
        return accuracy
    unit, latency, entropy = about['unit'], found['network']['latency'], mean_entropy(found['ops'])
    return (
        f'{latency:.4f} {unit}, target {about["target"]:.4f} {unit}, mean entropy {entropy:.3f} of 1, {accuracy}, '
        f'{architecture_line(found["network"])}'
    )


def mean_entropy(ops: Sequence[Sequence[float]]) -> float:
    """Return the mean over blocks of the entropy of operator probabilities: 1 if all are equal, 0 if one has all.

    Args:
        ops: probabilities [blocks][ops].
    """
    most = [math.log(len(row)) or 1.0 for row in ops]  # a single operator has all
    entropies = [torch.special.entr(torch.tensor(row, dtype=torch.float64)).sum().item() for row in ops]
    return sum(entropy / limit for entropy, limit in zip(entropies, most, strict=True)) / len(ops)


def hardly_learned(top1: float, num_classes: int) -> bool:
    """Whether an accuracy in % is hardly better than chance: below twice its accuracy, or halfway to 100 %."""
    chance = 100 / num_classes
    return top1 < min(2 * chance, (chance + 100) / 2)


def warn_not_learned(top1: float, num_classes: int) -> None:
    """Log a warning if a supernet has `hardly_learned`.

    Args:
        top1: accuracy on Gumbel paths at the end of the warm-up, %.
    """
    if hardly_learned(top1, num_classes):
        log.warning(
            'The supernet has hardly learned: %.1f %% on Gumbel paths, chance is %.1f %%. Noise would choose the'
            ' architecture. --largest_epochs or more --warmup_epochs help, or a smaller --batch_size for more steps.',
            top1,
            100 / num_classes,
        )


def warn_not_decided(ops: Sequence[Sequence[float]], before: Arch | None, arch: Arch) -> None:
    """Log a warning if a search ends with operators that are nearly equally probable, or with a choice that changes.

    A high learning rate of the architecture makes noise decide, by any entropy; then each epoch has another choice.

    Args:
        ops: probabilities [blocks][ops].
        before: current architecture before the last epoch, if there was one.
        arch: current architecture after it.
    """
    if (entropy := mean_entropy(ops)) > UNDECIDED:
        log.warning(
            'The search has not decided: the mean entropy of its operators is %.2f, and 1 is uniform.'
            ' A higher --a_lr or a lower --a_wd helps.',
            entropy,
        )
    changed, blocks = changed_blocks(before or arch, arch)
    if changed > UNSETTLED * blocks:
        log.warning(
            'The choice has not settled: %d of %d blocks changed in the last epoch, so noise may have chosen.'
            ' More epochs with a lower --a_lr help.',
            changed,
            blocks,
        )


def changed_blocks(before: Arch, after: Arch) -> tuple[int, int]:
    """Return how many blocks two architectures do not share, operator included, and how many are in any of them."""
    one, other = (
        {(stage, place): op for stage, ops in arch.items() for place, op in enumerate(ops)} for arch in (before, after)
    )
    blocks = one.keys() | other.keys()
    return sum(one.get(block) != other.get(block) for block in blocks), len(blocks)


def largest_activation(config: NetworkConfig, img_size: int) -> int:
    """Return the number of elements of a network's largest activation, for one square input."""
    size = after_stride(img_size, config.first_stem.stride)
    found = [3 * img_size**2, config.first_stem.out_channels * size**2]
    for _, spec in config.blocks():
        out_size = after_stride(size, spec.stride)
        mid = max(spec.mid_channels, spec.in_channels)  # no expansion if mid_channels <= in_channels
        found += [mid * size**2, mid * out_size**2, spec.out_channels * out_size**2]
        size = out_size
    return max(*found, config.feature_mix_layer.out_channels * size**2)


def largest_mixture(img_size: int, space: SearchSpace) -> int:
    """Return the number of elements that a search's largest activation can get, for one square input.

    A GPU expands all operators of one kernel size together, and normalizes the outputs of all operators together (see
    `fused_mixture`). The widths are the most that elasticity-scaling may reach.
    """
    found = [3 * img_size**2, space.stem.conv_ch * after_stride(img_size, space.stem.stride) ** 2]
    for block in space.blocks(img_size):
        for kernel in {op.kernel for op in space.ops}:
            channels = sum(op.max_width(block.in_ch) for op in space.ops if op.kernel == kernel)
            found.append(channels * block.in_size**2)
        found.append(len(space.ops) * block.out_ch * after_stride(block.in_size, block.stride) ** 2)
    last = space.blocks(img_size)[-1]
    return max(*found, space.head.out_ch * after_stride(last.in_size, last.stride) ** 2)


def _operator(spec: MBSpec, space: SearchSpace) -> Op | None:
    """Return the operator of the space that a block can be; None if there is none."""
    in_ch = spec.in_channels
    for op in space.ops:
        if (op.kernel, op.se_width(in_ch)) == (spec.kernel_size, spec.se_channels):
            if op.min_width(in_ch) <= spec.mid_channels <= op.max_width(in_ch):
                return op
    return None


def count_params(net: nn.Module) -> float:
    """Return the number of parameters in millions."""
    return sum(p.numel() for p in net.parameters()) / 1e6


def count_mult_adds(net: nn.Module, img_size: int, channels: int = 3) -> float:
    """Return the MACs of convolutions and linear layers for one square input, in millions. Torch counts each as two."""
    device = next(net.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        net.eval()(torch.zeros(1, channels, img_size, img_size, device=device))
    return counter.get_total_flops() / 2e6
