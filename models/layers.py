"""Layers of networks and supernets. A layer is built from its spec and keeps it as `.spec`."""

import torch
from torch import Tensor, nn

from models.config import ConvSpec, LinearSpec, MBSpec
from models.functions import ACTIVATIONS, convolve, norm_act, pool

MID_DIMS = {
    'inverted_bottleneck.conv.weight': 0,
    'depth_conv.conv.weight': 0,
    'squeeze_excite.conv_reduce.weight': 1,
    'squeeze_excite.conv_expand.weight': 0,
    'squeeze_excite.conv_expand.bias': 0,
    'point_linear.conv.weight': 1,
}
"""Dimension of the mid channels in each weight of an MBInvertedResBlock that has one."""


def activation(name: str | None) -> nn.Module:
    """Return the layer of a config's `act_func`. It works in place, which is safe after a batch norm or convolution."""
    layer = ACTIVATIONS[name].layer
    return layer() if name is None else layer(inplace=True)


class ConvLayer(nn.Module):
    """Conv2d, BatchNorm2d, activation: [N, in_channels, H, W] -> [N, out_channels, ceil(H / stride), ceil(W / stride)].

    Args:
        spec: the layer.
        searched: part of a supernet, whose batch norms have no parameters and use the statistics of the batch.
    """

    def __init__(self, spec: ConvSpec, searched: bool = False):
        super().__init__()
        self.spec = spec
        self.conv = nn.Conv2d(
            spec.in_channels,
            spec.out_channels,
            spec.kernel_size,
            spec.stride,
            padding=spec.kernel_size // 2,
            groups=spec.groups,
            bias=spec.bias,
        )
        if spec.use_bn:
            self.bn = nn.BatchNorm2d(spec.out_channels, affine=spec.affine, track_running_stats=not searched)
        else:
            self.bn = nn.Identity()
        self.act = activation(spec.act_func)
        self.searched = searched

    def forward(self, x: Tensor) -> Tensor:
        if self.searched:
            return norm_act(self.convolve(x), self.spec.act_func, self.bn.eps)
        return self.act(self.bn(self.conv(x)))

    def convolve(self, x: Tensor) -> Tensor:
        """Apply only the convolution, as a supernet does."""
        return convolve(x, self.conv.weight, self.spec.stride, self.spec.groups)


class LinearLayer(nn.Module):
    """Linear, optional BatchNorm1d and activation: [N, in_features] -> [N, out_features]."""

    def __init__(self, spec: LinearSpec):
        super().__init__()
        self.spec = spec
        self.linear = nn.Linear(spec.in_features, spec.out_features, bias=spec.bias)
        self.bn = nn.BatchNorm1d(spec.out_features, affine=spec.affine) if spec.use_bn else nn.Identity()
        self.act = activation(spec.act_func)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.linear(x)))


class SqueezeExcite(nn.Module):
    """Channel attention (Hu et al. 2018): pool, reduce, act, expand, sigmoid, scale. Keeps the shape [N, C, H, W].

    Args:
        searched: part of a supernet; see `ConvLayer`.
    """

    def __init__(self, channels: int, se_channels: int, act_func: str | None, searched: bool):
        super().__init__()
        self.searched = searched
        self.conv_reduce = nn.Conv2d(channels, se_channels, 1)
        self.act = activation(act_func)
        self.conv_expand = nn.Conv2d(se_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        # `pool` keeps the gradient in the layout of x; exports and other programs know the plain mean
        pooled = pool(x)[:, :, None, None] if self.searched else x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.conv_expand(self.act(self.conv_reduce(pooled))))


class MBInvertedResBlock(nn.Module):
    """Inverted residual block (Sandler et al. 2018) with optional squeeze-excitation after the depthwise convolution.

    [N, in_channels, H, W] -> [N, out_channels, ceil(H / stride), ceil(W / stride)]. The input is added to the output
    if their shapes are equal. If mid_channels <= in_channels there is no expansion: the depthwise runs on in_channels.

    Args:
        spec: the block.
        searched: part of a supernet; see `ConvLayer`.
        drop_connect: probability of dropping the residual branch of an image in training (Huang et al. 2016).
    """

    def __init__(self, spec: MBSpec, searched: bool = False, drop_connect: float = 0.0):
        super().__init__()
        self.spec = spec
        convs = spec.convs()
        expansion, depthwise = convs.get('inverted_bottleneck'), convs['depth_conv']
        mid = depthwise.in_channels
        self.inverted_bottleneck = ConvLayer(expansion, searched) if expansion else None
        self.depth_conv = ConvLayer(depthwise, searched)
        self.squeeze_excite = None
        if spec.se_channels:
            self.squeeze_excite = SqueezeExcite(mid, spec.se_channels, spec.act_func, searched)
        self.point_linear = ConvLayer(convs['point_linear'], searched)
        self.residual = spec.residual
        self.drop_connect = _stochastic_depth(drop_connect)

    def branch(self, x: Tensor) -> Tensor:
        """Run the block without its residual connection."""
        return self.point_linear(self.expanded(x))

    def projected(self, x: Tensor) -> Tensor:
        """Run the block up to its last convolution, without the batch norm after it."""
        return self.point_linear.convolve(self.expanded(x))

    def expanded(self, x: Tensor) -> Tensor:
        """Run the block up to its projection: x -> [N, mid_channels, H', W']."""
        if self.inverted_bottleneck is not None:
            x = self.inverted_bottleneck(x)
        x = self.depth_conv(x)
        return x if self.squeeze_excite is None else self.squeeze_excite(x)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_connect(self.branch(x)) if self.residual else self.branch(x)


def _stochastic_depth(p: float) -> nn.Module:
    """Return torchvision's layer, whose import takes seconds, only if it has an effect."""
    if not p:
        return nn.Identity()
    from torchvision.ops import StochasticDepth

    return StochasticDepth(p, 'row')


def init_weights(net: nn.Module) -> None:
    """Initialise as MobileNetV2: Kaiming-normal convolutions (fan out), normal(0, 0.01) linear layers, zero biases."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode='fan_out')
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)
