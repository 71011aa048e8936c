"""Autograd functions of the supernet that keep little memory for the backward pass.

Batch norms of the supernet have no parameters and use the statistics of the batch. In an architecture step its
convolutions need no weight gradient. So a batch norm with its activation keeps one activation tensor instead of three,
and a convolution keeps none.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

aten = torch.ops.aten


class Activation(NamedTuple):
    """An activation as a layer and as a function, and its gradient: (gradient of the output, input) -> gradient."""

    layer: type[nn.Module]
    function: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS = {
    None: Activation(nn.Identity, lambda y: y, lambda grad, y: grad),
    'relu': Activation(nn.ReLU, F.relu, lambda grad, y: aten.threshold_backward(grad, y, 0)),
    'relu6': Activation(nn.ReLU6, F.relu6, lambda grad, y: aten.hardtanh_backward(grad, y, 0, 6)),
    'swish': Activation(nn.SiLU, F.silu, aten.silu_backward),
    'h-swish': Activation(nn.Hardswish, F.hardswish, aten.hardswish_backward),
}
"""Activations by their `act_func` in a config."""

CACHED_BYTES = 4 << 20
"""Input size up to which a CPU's cache is assumed to hold the input and its gradient."""


class _NormAct(Function):
    @staticmethod
    def forward(ctx, x: Tensor, act_func: str | None, eps: float) -> Tensor:
        # with a float32 scale torch computes and returns the statistics of half-precision values in float32
        scale = _standard_statistics(x.shape[1], torch.float32, x.device)[1] if x.dtype.itemsize < 4 else None
        y, _, inv_std = torch.native_batch_norm(x, scale, None, None, None, True, 0.0, eps)
        ctx.save_for_backward(y, inv_std)
        ctx.act_func = act_func
        return ACTIVATIONS[act_func].function(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        y, inv_std = ctx.saved_tensors
        grad = ACTIVATIONS[ctx.act_func].gradient(grad, y)
        # the gradient from the output alone: that of a batch norm with input y, which has mean 0 and variance 1
        standard = _standard_statistics(len(inv_std), inv_std.dtype, inv_std.device)
        grad, _, _ = aten.native_batch_norm_backward(
            grad, y, inv_std, None, None, *standard, True, 0.0, [True, False, False]
        )
        return grad, None, None


class _FrozenConv(Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: None, stride: int, padding: int, dilation: int, groups: int):
        ctx.save_for_backward(weight)
        ctx.shape, ctx.options = x.shape, (stride, padding, groups)
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (weight,), (stride, padding, groups) = ctx.saved_tensors, ctx.options
        shape_only = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
        grad, _, _ = aten.convolution_backward(
            grad, shape_only, weight, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups,
            [True, False, False],
        )  # fmt: skip
        return grad, None, None, None, None, None, None


class _WideDepthwise(Function):
    """Depthwise convolution of kernel 5 on a CPU, with a faster weight gradient than oneDNN's (3.x).

    oneDNN is fast for three kernel columns with a padding of one, and up to ten times slower for five columns. Here the
    gradient is computed by kernels of three columns from an input shifted by one pixel, for as many images at a time as
    fit the cache.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return F.conv2d(x, weight, None, stride, 2, 1, len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (x, weight), stride = ctx.saved_tensors, ctx.stride
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _depthwise_backward(grad, x, weight, stride, 2, [True, False, False])[0]
        images = max(1, CACHED_BYTES // (x[0].numel() * x.element_size()))
        parts = zip(grad.split(images), x.split(images), strict=True)
        return grad_x, sum(_wide_weight_gradient(*part, weight, stride) for part in parts), None


def _wide_weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Return the weight gradient [C, 1, 5, 5] from the gradient of the output and the input [N, C, H, W]."""

    def columns(x: Tensor, weight: Tensor) -> Tensor:
        pad = weight.shape[-1] // 2
        return _depthwise_backward(grad, x, weight, stride, pad, [False, True, False])[1]

    three, moved = weight[..., 1:4], torch.zeros_like(x)
    moved[..., 1:] = x[..., :-1]
    left = columns(moved, three)
    moved[..., :-1] = x[..., 1:]
    moved[..., -1:] = 0
    right = columns(moved, three)
    # the shift dropped the last column of x, which matters if the centre of the kernel visits it
    middle = columns(x, weight[..., 2:3]) if (x.shape[-1] - 1) % stride == 0 else left[..., 2:]
    return torch.cat([left[..., :2], middle, right[..., 1:]], dim=-1)


def _depthwise_backward(grad: Tensor, x: Tensor, weight: Tensor, stride: int, pad_columns: int, wanted: list[bool]):
    """Return the gradients of a depthwise convolution that keeps the number of rows at stride 1."""
    padding = [weight.shape[2] // 2, pad_columns]
    return aten.convolution_backward(
        grad, x, weight, None, [stride] * 2, padding, [1, 1], False, [0, 0], len(weight), wanted
    )


class _MixNorms(Function):
    @staticmethod
    def forward(ctx, weights: Tensor, eps: float, *inputs: Tensor) -> Tensor:
        total, kept = None, []
        for weight, x in zip(weights.unbind(), inputs, strict=True):
            scale = weight.repeat(x.shape[1])
            y, mean, inv_std = torch.native_batch_norm(x, scale, None, None, None, True, 0.0, eps)
            total = y if total is None else total.add_(y)
            kept += [x, scale, mean, inv_std]
        ctx.save_for_backward(*kept)
        ctx.eps = eps
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        kept, grad_weights, grad_inputs = ctx.saved_tensors, [], []
        for x, scale, mean, inv_std in zip(*(kept[i::4] for i in range(4)), strict=True):
            grad_x, grad_scale, _ = aten.native_batch_norm_backward(
                grad, x, scale, None, None, mean, inv_std, True, ctx.eps, [True, True, False]
            )
            grad_inputs.append(grad_x)
            grad_weights.append(grad_scale.sum())
        return torch.stack(grad_weights), None, *grad_inputs


@lru_cache(maxsize=4096)
def _standard_statistics(channels: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return zeros and ones, cached because every backward pass of a norm needs them."""
    return torch.zeros(channels, dtype=dtype, device=device), torch.ones(channels, dtype=dtype, device=device)


def norm_act(x: Tensor, act_func: str | None, eps: float = 1e-5) -> Tensor:
    """Apply batch norm by the statistics of the batch, without parameters, then the activation; keeps [N, C, H, W].

    The backward pass needs only the normalised values: the gradient of the norm can be computed from them as well.
    """
    return _NormAct.apply(x, act_func, eps)


def mix_norms(inputs: list[Tensor], weights: Tensor, eps: float = 1e-5) -> Tensor:
    """Return the sum of the batch norms of k inputs of one shape, each scaled by its entry of `weights` [k]."""
    return _MixNorms.apply(weights, eps, *inputs)


def convolve(x: Tensor, weight: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
    """Convolve, padded to keep the size at stride 1. The input is not kept if the weight needs no gradient.

    Args:
        x: [N, C, H, W].
        weight: [C', C / groups, k, k].
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    if weight.requires_grad and _is_wide_depthwise(x, weight):
        return _WideDepthwise.apply(x, weight, stride)
    conv = F.conv2d if weight.requires_grad or not x.requires_grad else _FrozenConv.apply
    return conv(x, weight, None, stride, weight.shape[-1] // 2, 1, groups)


def _is_wide_depthwise(x: Tensor, weight: Tensor) -> bool:
    on_cpu = x.device.type == 'cpu' and x.dtype == torch.float32 and torch.is_grad_enabled()
    return on_cpu and weight.shape[1:] == (1, 5, 5) and x.shape[1] == len(weight) and x.shape[-1] > 4


def pool(x: Tensor) -> Tensor:
    """Return the mean over all pixels: [N, C, H, W] -> [N, C]. The gradient has the layout of `x`."""
    # that of x.mean((2, 3)) is contiguous, which slows down every operator that reads it beside a channels-last tensor
    return to_pixels(x).mean(1) if x.stride(1) == 1 else x.mean((2, 3))


def to_pixels(x: Tensor) -> Tensor:
    """Return a view [N, H * W, C] of [N, C, H, W]; x is channels-last, or a slice of such a tensor's channels."""
    return x.flatten(2).mT


def activate(x: Tensor, act_func: str | None) -> Tensor:
    """Apply the activation of that name, not in place."""
    return ACTIVATIONS[act_func].function(x)


def take(values: Tensor, rows: Sequence[int]) -> Tensor:
    """Return `values[rows]` of a vector, without the transfer of `rows` to a GPU that indexing makes."""
    each = values.unbind()
    return torch.stack([each[row] for row in rows])
