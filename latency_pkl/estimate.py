"""Latency tables of cards that are not available: a physical model of a block with a few parameters a card.

The time of a layer is the sum of the times of its memory traffic and of its MACs. MACs run at different rates in 1x1
(dense), depthwise and squeeze-excitation convolutions. A block takes the larger of this sum and of the host's time to
launch its kernels:

    max(bytes / bandwidth + dense / rate + depthwise / rate + squeeze / rate, kernels * launch)

Kernels are those of unfused float32 layers: convolution, batch norm, ReLU in place or swish as x * sigmoid(x),
squeeze-excitation, residual sum. A row has the data-sheet bandwidth and throughput of a card. The shares of them that
such layers reach were fitted to the paper's published table of a Titan RTX, and are assumed for other cards too.
"""

from dataclasses import dataclass

import numpy as np

from models.config import ConvSpec, MBSpec, fixed_layers, op_spec
from models.search_space import SearchSpace, after_stride

BANDWIDTH_SHARE = 0.8931
DENSE_SHARE = 0.6102
DEPTHWISE_SHARE = 0.0705
SQUEEZE_SHARE = 0.02354
"""Shares of the data-sheet bandwidth and float32 throughput that layers reach. Fitted, see above."""

FLOAT_BYTES = 4
SWISH_KERNELS, SWISH_TRAFFIC = 2, 5  # sigmoid reads and writes, the product reads two and writes one
RELU_KERNELS, RELU_TRAFFIC = 1, 2


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet."""

    name: str
    bandwidth: float
    """GB/s"""
    throughput: float
    """float32 TFLOP/s (two operations a MAC), without tensor cores"""
    launch: float
    """Host time of one kernel, ms. Fitted for the Titan RTX (PyTorch 1.1); today's usual value for others."""


CARDS = {
    'titan_rtx': Card('NVIDIA Titan RTX', 672, 16.3, 0.0220),
    'v100': Card('NVIDIA V100 SXM2', 900, 15.7, 0.008),
    'rtx_2080_ti': Card('NVIDIA GeForce RTX 2080 Ti', 616, 13.4, 0.008),
    'rtx_3090': Card('NVIDIA GeForce RTX 3090', 936, 35.6, 0.008),
    'rtx_4090': Card('NVIDIA GeForce RTX 4090', 1008, 82.6, 0.008),
    'a100': Card('NVIDIA A100 SXM4 40 GB', 1555, 19.5, 0.008),
    'h100': Card('NVIDIA H100 SXM5', 3350, 67.0, 0.008),
}


@dataclass
class Work:
    """Work of some layers: floats moved, MACs, kernels. Numbers, or arrays over widths."""

    traffic: np.ndarray | float = 0.0
    dense: np.ndarray | float = 0.0
    depthwise: np.ndarray | float = 0.0
    squeeze: np.ndarray | float = 0.0
    kernels: float = 0.0

    def conv(self, inputs, outputs, per_output, depthwise: bool = False, act: str | None = None) -> None:
        """Add convolution, batch norm and activation. `inputs`, `outputs`: floats; `per_output`: MACs."""
        self.traffic = self.traffic + inputs + outputs + 2 * outputs
        self.kernels += 2
        if depthwise:
            self.depthwise = self.depthwise + outputs * per_output
        else:
            self.dense = self.dense + outputs * per_output
        if act:
            swish = act == 'swish'
            self.traffic = self.traffic + (SWISH_TRAFFIC if swish else RELU_TRAFFIC) * outputs
            self.kernels += SWISH_KERNELS if swish else RELU_KERNELS

    def time(self, card: Card) -> np.ndarray:
        """Return the time on a card, ms."""
        per_ms = card.throughput * 1e9 / 2
        memory = self.traffic * FLOAT_BYTES / (card.bandwidth * 1e6 * BANDWIDTH_SHARE)
        compute = self.dense / (per_ms * DENSE_SHARE) + self.depthwise / (per_ms * DEPTHWISE_SHARE)
        compute = compute + self.squeeze / (per_ms * SQUEEZE_SHARE)
        return np.maximum(memory + compute, self.kernels * card.launch)


def block_work(spec: MBSpec, mid, size: int, batch: int) -> Work:
    """Return the work of one block with `mid` channels (one width or an array) in place of `spec.mid_channels`."""
    work, pixels = Work(), batch * size**2
    out_pixels = batch * after_stride(size, spec.stride) ** 2
    if np.all(mid > spec.in_channels):
        work.conv(pixels * spec.in_channels, pixels * mid, spec.in_channels, act=spec.act_func)
    work.conv(pixels * mid, out_pixels * mid, spec.kernel_size**2, depthwise=True, act=spec.act_func)
    if spec.se_channels:
        work.traffic = work.traffic + 3 * out_pixels * mid
        work.squeeze = work.squeeze + 2 * batch * mid * spec.se_channels
        work.kernels += 6 + (spec.act_func == 'swish')
    work.conv(out_pixels * mid, out_pixels * spec.out_channels, mid)
    if spec.stride == 1 and spec.in_channels == spec.out_channels:
        work.traffic = work.traffic + 3 * out_pixels * spec.out_channels
        work.kernels += 1
    return work


def estimate(card: Card, img_size: int, batch: int, num_classes: int, space: SearchSpace):
    """Return base and curves of a card, ms: (float, {key: [widths from 1 on]})."""
    fixed, curves, ranges = fixed_layers(num_classes, space), {}, space.table_widths(img_size)
    for block, _, op in space.positions(img_size):
        key = block.key(op)
        high = ranges[key][1]
        widths = np.arange(block.in_ch + 1, high + 1)  # with an expansion, as in the whole reach of a search
        times = block_work(op_spec(block, op, high), widths, block.in_size, batch).time(card)
        slope = times[1] - times[0]
        below = times[0] - slope * np.arange(block.in_ch, 0, -1)
        curves[key] = np.concatenate([np.maximum(below, times[0] / 2), times])
    stem: ConvSpec = fixed['first_stem']
    last = space.blocks(img_size)[-1]
    stem_size, last_size = after_stride(img_size, stem.stride), after_stride(last.in_size, last.stride)
    ends = Work()
    stem_outputs = batch * stem_size**2 * stem.out_channels
    ends.conv(batch * img_size**2 * 3, stem_outputs, 3 * stem.kernel_size**2, act=stem.act_func)
    mix_outputs = batch * last_size**2 * space.head.out_ch
    ends.conv(batch * last_size**2 * last.out_ch, mix_outputs, last.out_ch, act=space.head.act)
    ends.traffic += mix_outputs
    ends.dense += batch * space.head.out_ch * num_classes
    ends.kernels += 2
    second = fixed['second_stem']
    base = ends.time(card) + block_work(second, second.mid_channels, stem_size, batch).time(card)
    return float(base), curves
