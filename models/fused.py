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

from models.functions import activate, convolve, norm_act, pool, take, to_pixels
from models.layers import MBInvertedResBlock, SqueezeExcite


def fused_mixture(ops: Sequence[MBInvertedResBlock], x: Tensor, weights: Tensor) -> Tensor:
    """Return the sum of the operators' branches (see `MBInvertedResBlock.branch`) weighted by `weights` [ops].

    Args:
        ops: of one block, all with an expansion, convolutions without bias and batch norms without parameters.
        x: [N, in_ch, H, W], channels last.
    """
    order = sorted(range(len(ops)), key=lambda i: (ops[i].spec.kernel_size, ops[i].squeeze_excite is not None))
    projected, spec = [], ops[0].point_linear.spec
    for _, group in groupby((ops[i] for i in order), key=lambda op: op.spec.kernel_size):
        projected += _project(list(group), x)
    stride = ops[0].spec.stride
    rows, columns = ((size - 1) // stride + 1 for size in x.shape[2:])
    wide = torch.cat(projected, dim=2).mT.unflatten(2, (rows, columns))
    scales = take(weights, order).repeat_interleave(spec.out_channels)
    normed = F.batch_norm(wide, None, None, scales, None, training=True, eps=ops[0].point_linear.bn.eps)
    # summed as pixels to stay channels-last; with a dtype, autocast does not sum in float32
    by_op = to_pixels(normed).flatten(0, 1).unflatten(1, (len(ops), spec.out_channels))
    return by_op.sum(1, dtype=normed.dtype).unflatten(0, (len(x), rows * columns)).mT.unflatten(2, (rows, columns))


def _project(ops: list[MBInvertedResBlock], x: Tensor) -> list[Tensor]:
    """Return the projections of operators of one kernel size before their batch norm, [N, H' * W', out_ch] each."""
    spec = ops[0].spec
    mids = [op.depth_conv.spec.in_channels for op in ops]
    x = convolve(x, torch.cat([op.inverted_bottleneck.conv.weight for op in ops]))
    x = norm_act(x, spec.act_func)
    x = convolve(x, torch.cat([op.depth_conv.conv.weight for op in ops]), spec.stride, groups=sum(mids))
    x = norm_act(x, spec.act_func)
    plain = sum(op.squeeze_excite is None for op in ops)  # sorted first by `fused_mixture`
    pieces, gated = [], x
    if 0 < plain < len(ops):
        kept, gated = x.split([sum(mids[:plain]), sum(mids[plain:])], dim=1)
        pieces = [*kept.split(mids[:plain], dim=1)]
    if plain < len(ops):
        gates = _gates([op.squeeze_excite for op in ops[plain:]], pool(gated), mids[plain:], spec.act_func)
        gated = gated * gates[:, :, None, None]
    pieces += gated.split(mids[len(pieces) :], dim=1)
    return [
        F.linear(to_pixels(piece), op.point_linear.conv.weight.flatten(1))
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
