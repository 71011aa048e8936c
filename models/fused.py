"""The mixture of a block's operators in few kernel launches, for GPUs.

The expansions of all operators of one kernel size run as one convolution with concatenated weights. So do their
depthwise convolutions, batch norms and activations. Only squeeze-excitation (on pooled values) and the projections run
per operator.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from models.functions import activate, convolve, take
from models.layers import MBInvertedResBlock, SqueezeExcite


def fused_mixture(ops: Sequence[MBInvertedResBlock], x: Tensor, weights: Tensor) -> Tensor:
    """Return the sum of the operators' branches (see `MBInvertedResBlock.branch`) weighted by `weights` [ops].

    Args:
        ops: of one block, all with an expansion, convolutions without bias and batch norms without parameters.
        x: [N, in_ch, H, W], channels last.
    """
    order = sorted(range(len(ops)), key=lambda i: (ops[i].spec.kernel_size, ops[i].squeeze_excite is not None))
    projected = []
    for _, group in groupby((ops[i] for i in order), key=lambda op: op.spec.kernel_size):
        projected += _project(list(group), x)
    wide = torch.cat(projected, dim=3).permute(0, 3, 1, 2)
    channels = projected[0].shape[3]
    scales = take(weights, order).repeat_interleave(channels)
    normed = F.batch_norm(wide, None, None, scales, None, training=True, eps=ops[0].point_linear.bn.eps)
    return normed.unflatten(1, (len(ops), channels)).sum(1)


def _project(ops: list[MBInvertedResBlock], x: Tensor) -> list[Tensor]:
    """Return the projections of operators of one kernel size before their batch norm, [N, H', W', out_ch] each."""
    spec = ops[0].spec
    mids = [op.depth_conv.spec.in_channels for op in ops]
    x = convolve(x, torch.cat([op.inverted_bottleneck.conv.weight for op in ops]))
    x = ops[0].depth_conv.norm_act(x, spec.act_func)
    x = convolve(x, torch.cat([op.depth_conv.conv.weight for op in ops]), spec.stride, groups=sum(mids))
    x = ops[0].depth_conv.norm_act(x, spec.act_func)
    gated = [op.squeeze_excite for op in ops if op.squeeze_excite is not None]  # sorted last by `fused_mixture`
    if gated:
        plain = len(ops) - len(gated)
        kept, scaled = x.split([sum(mids[:plain]), sum(mids[plain:])], dim=1)
        scaled = scaled * _gates(gated, scaled.mean((2, 3)), mids[plain:], spec.act_func)[:, :, None, None]
        pieces = [*kept.split(mids[:plain], dim=1), *scaled.split(mids[plain:], dim=1)]
    else:
        pieces = x.split(mids, dim=1)
    return [
        F.linear(piece.permute(0, 2, 3, 1), op.point_linear.conv.weight.flatten(1))
        for op, piece in zip(ops, pieces, strict=True)
    ]


def _gates(layers: list[SqueezeExcite], pooled: Tensor, mids: list[int], act_func: str | None) -> Tensor:
    """Return the squeeze-excitation gates of all operators: pooled [N, mid channels] -> the same shape."""
    hidden = [_linear(layer.conv_reduce, x) for layer, x in zip(layers, pooled.split(mids, dim=1), strict=True)]
    sizes = [h.shape[1] for h in hidden]
    hidden = activate(torch.cat(hidden, dim=1), act_func).split(sizes, dim=1)
    return torch.cat([_linear(layer.conv_expand, h) for layer, h in zip(layers, hidden, strict=True)], dim=1).sigmoid()


def _linear(conv, x: Tensor) -> Tensor:
    return F.linear(x, conv.weight.flatten(1), conv.bias)
