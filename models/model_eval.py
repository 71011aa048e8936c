"""One network, built from a config; its weights, and batch norms folded into convolutions."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.config import NetworkConfig, load_config
from models.layers import ConvLayer, LinearLayer, MBInvertedResBlock, init_weights
from tools.files import put_weights, read_weights


class NetworkEval(nn.Module):
    """A found network: images [N, 3, H, W] -> logits [N, classes].

    Args:
        config: the network.
        dropout_rate: dropout before the classifier.
        drop_connect_rate: rate of the last block; block i of n (the stem's block is 1) has rate * i / n.
    """

    def __init__(self, config: NetworkConfig, dropout_rate: float = 0.0, drop_connect_rate: float = 0.0):
        super().__init__()
        self.config = config
        count = sum(1 for _ in config.blocks())
        blocks = {
            place: MBInvertedResBlock(spec, drop_connect=drop_connect_rate * i / count)
            for i, (place, spec) in enumerate(config.blocks(), start=1)
        }
        self.first_stem = ConvLayer(config.first_stem)
        self.second_stem = blocks['second_stem']
        self.stage_names = list(config.stages)
        for name, specs in config.stages.items():
            self.add_module(name, nn.Sequential(*(blocks[f'{name}.{i}'] for i in range(len(specs)))))
        self.feature_mix_layer = ConvLayer(config.feature_mix_layer)
        self.dropout = nn.Dropout(dropout_rate)
        self.classifier = LinearLayer(config.classifier)
        init_weights(self)

    def forward_features_list(self, x: Tensor) -> list[Tensor]:
        """Return the last feature map of each resolution, for detection and segmentation, of images [N, 3, H, W].

        TF-NAS networks have maps of strides 2, 4, 8, 16 and 32; see `feature_info`.
        """
        maps = [self.second_stem(self.first_stem(x))]
        for name, keeps in zip(self.stage_names, self._keeps_size(), strict=True):
            x = getattr(self, name)(maps[-1])
            maps = [*(maps[:-1] if keeps else maps), x]
        return maps

    def feature_info(self) -> list[tuple[int, int]]:
        """Return (stride, channels) of each map of `forward_features_list`."""
        stem = self.config.second_stem
        info = [(self.config.first_stem.stride * stem.stride, stem.out_channels)]
        for specs, keeps in zip(self.config.stages.values(), self._keeps_size(), strict=True):
            stride = info[-1][0] * math.prod(spec.stride for spec in specs)
            last = stride, specs[-1].out_channels if specs else info[-1][1]
            info = [*(info[:-1] if keeps else info), last]
        return info

    def _keeps_size(self) -> list[bool]:
        """Return whether each stage keeps the resolution of its input."""
        return [all(spec.stride == 1 for spec in specs) for specs in self.config.stages.values()]

    def parts(self) -> list[Callable[[Tensor], Tensor]]:
        """Return the parts of a forward pass in order (stem, each block, head), to be timed separately."""
        blocks = [block for name in self.stage_names for block in getattr(self, name)]
        return [lambda x: self.second_stem(self.first_stem(x)), *blocks, self._classify]

    def forward(self, x: Tensor) -> Tensor:
        x = self.second_stem(self.first_stem(x))
        for name in self.stage_names:
            x = getattr(self, name)(x)
        return self._classify(x)

    def _classify(self, x: Tensor) -> Tensor:
        """Return the logits of the last feature map."""
        x = self.feature_mix_layer(x).mean((2, 3))
        return self.classifier(self.dropout(x))


def load_network(
    config_path: str | Path, weights: str | Path | None = None, num_classes: int | None = None
) -> NetworkEval:
    """Return a found network in evaluation mode, with the weights of a file if one is given.

        net = load_network('model.config', weights='model_best.pth.tar')
        maps = net.forward_features_list(images)

    Args:
        weights: a checkpoint, a state dict or safetensors; None: initial weights.
        num_classes: None: as in the config. A classifier of another size in the weights is left out, and initial.

    Raises:
        BadInput: a file cannot be read, or the weights are of another network.
    """
    config = load_config(config_path)
    net = NetworkEval(config.with_classes(num_classes) if num_classes else config)
    if weights is not None:
        start_from_weights(net, weights)
    return net.eval()


def start_from_weights(net: NetworkEval, path: str | Path) -> str:
    """Load the weights in a file, all but a classifier of another number of classes; returns a line about it.

    Raises:
        BadInput: unreadable, or weights of another network.
    """
    weights, key, _ = read_weights(path)
    own = net.state_dict()
    left_out = [
        name
        for name, value in weights.items()
        if name.startswith('classifier.') and name in own and value.shape != own[name].shape
    ]
    put_weights(net, weights | {name: own[name] for name in left_out}, path)
    source = f'{path} ({key})' if key else str(path)
    return f'weights of {source}' + (f'; left out: {", ".join(left_out)}, of other classes' if left_out else '')


def fuse_batch_norm(net: NetworkEval) -> NetworkEval:
    """Return an equal network in evaluation mode, with every batch norm folded into the convolution before it."""
    fused = NetworkEval(_without_batch_norm(net.config)).eval()
    layers = dict(net.named_modules())
    state = net.state_dict()
    for name in layers:
        if isinstance(getattr(layers[name], 'bn', None), nn.BatchNorm2d):
            conv = fuse_conv_bn_eval(layers[name].conv, layers[name].bn)
            state |= {f'{name}.conv.{key}': value for key, value in conv.state_dict().items()}
    # a convolution that had neither batch norm nor bias gets a bias of zeros
    fused.load_state_dict({key: state.get(key, torch.zeros_like(value)) for key, value in fused.state_dict().items()})
    return fused.to(next(net.parameters()).device)


def _without_batch_norm(config: NetworkConfig) -> NetworkConfig:
    """Return the config with biases instead of batch norms in all convolutions."""

    def plain(spec):
        return replace(spec, use_bn=False, bias=True)

    return replace(
        config,
        first_stem=plain(config.first_stem),
        second_stem=plain(config.second_stem),
        stages={name: [plain(spec) for spec in specs] for name, specs in config.stages.items()},
        feature_mix_layer=plain(config.feature_mix_layer),
    )


@torch.inference_mode()
def largest_difference(net: nn.Module, other, img_size: int) -> float:
    """Return the largest difference of outputs on random images, relative to the largest output if that is below 1.

    NaN if any output is NaN.

    Args:
        other: called with the same images [N, 3, img_size, img_size]; returns a tensor or array.
    """
    differences, generator = [], torch.Generator().manual_seed(0)
    for batch_size in (1, 3):
        images = torch.randn(batch_size, 3, img_size, img_size, generator=generator)
        expected = net(images)
        difference = (expected - torch.as_tensor(other(images))).abs().max()
        differences.append(difference / expected.abs().max().clamp(1e-12, 1))
    return torch.stack(differences).max().item()
