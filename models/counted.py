"""Tables of MACs and of parameters: counted, in millions, in the format of latency tables."""

import numpy as np
import torch

from models.config import ConvSpec, MBSpec, fixed_layers, op_spec
from models.describe import count_mult_adds, count_params
from models.latency import LatencyTable
from models.layers import ConvLayer, MBInvertedResBlock
from models.search_space import Block, Op, SearchSpace, after_stride

COUNTED = {'macs': 'M MACs', 'params': 'M parameters'}  # what is counted, and its unit


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
