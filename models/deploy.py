"""Found networks for use elsewhere: batch norms folded into convolutions, and source code that needs only torch."""

import re
from dataclasses import replace

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.config import NetworkConfig
from models.meta import Meta
from models.model_eval import NetworkEval

SOURCE = '''"""{title}

Needs only torch. The weights are in {weights!r} next to this file:

    from {module} import load
    net = load()

Inputs are RGB images of {size} x {size} pixels from 0 to 1, normalised: (image - MEAN) / STD.
"""

from pathlib import Path

import torch
from torch import nn

CLASSES = {names!r}
SIZE = {size}
MEAN = {mean!r}
STD = {std!r}


class Network(nn.Module):
    """Images [N, 3, SIZE, SIZE], normalised by MEAN and STD, -> logits [N, {classes}]."""

    def __init__(self):
        super().__init__()
        layers = {{
{layers}
        }}
        for name, layer in layers.items():
            *parents, own = name.split('.')
            place = self
            for parent in parents:
                if not hasattr(place, parent):
                    place.add_module(parent, nn.Module())
                place = getattr(place, parent)
            place.add_module(own, layer)

{forward}


def load(weights=Path(__file__).with_name({weights!r})):
    """Return the network with its weights, in evaluation mode."""
    net = Network()
    net.load_state_dict(torch.load(weights, map_location='cpu', weights_only=True))
    return net.eval()
'''


class _Tracer(fx.Tracer):
    """Tracer that enters this project's modules and keeps torch's layers and stochastic depth as calls."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        """Return whether to keep a module as one call."""
        return _drops(qualified_name) or super().is_leaf_module(module, qualified_name)


def _drops(name: str) -> bool:
    """Return whether a name is that of a block's stochastic depth."""
    return name.endswith('.drop_connect')


def to_source(net: NetworkEval, module: str, weights: str, title: str, meta: Meta) -> str:
    """Return Python source of a module with the layers, weight names and outputs of `net` in evaluation mode.

    torch.fx traces the forward pass, so the source cannot differ from the network. Layers are written as torch prints
    them, which is also how they are constructed. Stochastic depth is left out.

    Args:
        module: name under which the source will be imported.
        weights: name of the weights file, in the same folder.
        title: first line of the docstring; characters other than letters, digits and ( ) . - become _.
        meta: has img_size, mean, std and class_names.
    """
    graph = _Tracer().trace(net.eval())
    layers = dict(net.named_modules())
    for node in list(graph.nodes):
        if node.op == 'call_module' and (_drops(node.target) or isinstance(layers[node.target], nn.Identity)):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.lint()
    used = [node.target for node in graph.nodes if node.op == 'call_module']
    code = graph.python_code('self').src.strip('\n')
    forward = re.sub(r'^def forward\(self, x.*\):', 'def forward(self, x):', code, flags=re.MULTILINE)
    return SOURCE.format(
        names=list(meta.class_names),
        size=meta.img_size,
        mean=list(meta.mean),
        std=list(meta.std),
        title=re.sub(r'[^\w ().-]', '_', title),
        module=module,
        weights=weights,
        classes=net.config.classifier.out_features,
        layers='\n'.join(f'            {name!r}: nn.{layers[name]!r},' for name in used),
        forward='\n'.join(f'    {line}'.rstrip() for line in forward.splitlines()),
    )


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
