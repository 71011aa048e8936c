"""A network as an ONNX model, written straight from its config and weights."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from models.config import ConvSpec, LinearSpec, MBSpec, NetworkConfig
from tools.export import need
from tools.files import write_atomic

OPSET = 17  # version of ONNX's operators: the newest that TensorRT 8 and OpenCV read
BATCH_NORM_EPS = 1e-5  # torch's default
RANDOM_BOUND = 0.1  # on the random weights of networks to be timed


def to_onnx(
    config: NetworkConfig,
    weights: Mapping[str, Tensor] | int,
    img_size: int,
    metadata: Mapping[str, str] | None = None,
):
    """Return an ONNX model for any batch size: 'images' [batch, 3, img_size, img_size] -> 'logits' [batch, classes].

    Batch norms are folded into the convolutions before them. Names of nodes begin with the place of their block in the
    config: 'stage1.0/depth_conv/Conv'.

    Args:
        weights: state dict of a `NetworkEval` of this config; or a seed of random weights, for a network to be timed.
        metadata: see `tools.export.describe_input`.

    Raises:
        BadInput: onnx is missing.
    """
    onnx = need('onnx', 'onnx', 'an ONNX model')
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    graph = _Graph(onnx, weights)
    graph.network(config)
    graph.nodes[-1].output[0] = 'logits'
    body = helper.make_graph(
        graph.nodes,
        'network',
        [helper.make_tensor_value_info('images', floats, ['batch', 3, img_size, img_size])],
        [helper.make_tensor_value_info('logits', floats, ['batch', config.classifier.out_features])],
        graph.tensors,
    )
    opsets = [helper.make_opsetid('', OPSET)]
    model = helper.make_model(body, opset_imports=opsets, ir_version=helper.find_min_ir_version_for(opsets))
    helper.set_model_props(model, dict(metadata or {}))
    return model


def save_onnx(model, path: str | Path) -> None:
    """Write a model of `to_onnx`."""
    write_atomic(path, lambda f: f.write(model.SerializeToString()))


class _Graph:
    """Nodes and weights of a model. A node's output has the node's name."""

    def __init__(self, onnx, weights: Mapping[str, Tensor] | int):
        self.onnx, self.nodes, self.tensors = onnx, [], []
        self.state = None if isinstance(weights, int) else weights
        self.random = np.random.default_rng(weights if self.state is None else 0)

    def add(self, op: str, place: str, *inputs: str, **attributes: object) -> str:
        """Add a node; returns the name of its output."""
        name = f'{place}/{op}'
        self.nodes.append(self.onnx.helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def constant(self, name: str, value: np.ndarray) -> str:
        """Add a tensor; returns its name."""
        self.tensors.append(self.onnx.numpy_helper.from_array(np.ascontiguousarray(value, np.float32), name))
        return name

    def network(self, config: NetworkConfig) -> None:
        """Add all nodes: see `NetworkEval.forward`."""
        x = self.conv('images', config.first_stem, 'first_stem', 'first_stem.conv')
        for place, spec in config.blocks():
            x = self.block(x, spec, place)
        x = self.conv(x, config.feature_mix_layer, 'feature_mix_layer', 'feature_mix_layer.conv')
        x = self.add('GlobalAveragePool', 'classifier', x)
        self.linear(self.add('Flatten', 'classifier', x), config.classifier, 'classifier')

    def block(self, x: str, spec: MBSpec, place: str) -> str:
        """Add a block: see `MBInvertedResBlock.forward`."""
        block_input = x
        for layer, conv in spec.convs().items():
            if layer == 'point_linear' and spec.se_channels:
                x = self.squeeze_excite(x, spec, conv.in_channels, f'{place}/squeeze_excite')
            x = self.conv(x, conv, f'{place}/{layer}', f'{place}.{layer}.conv')
        return self.add('Add', place, block_input, x) if spec.residual else x

    def squeeze_excite(self, x: str, spec: MBSpec, channels: int, place: str) -> str:
        """Add channel attention: see `SqueezeExcite.forward`."""
        key = place.replace('/', '.')
        reduce, expand = (
            ConvSpec(1, 1, *ends, act, bias=True, use_bn=False)
            for *ends, act in ((channels, spec.se_channels, spec.act_func), (spec.se_channels, channels, None))
        )
        scale = self.add('GlobalAveragePool', place, x)
        scale = self.conv(scale, reduce, f'{place}/conv_reduce', f'{key}.conv_reduce')
        scale = self.conv(scale, expand, f'{place}/conv_expand', f'{key}.conv_expand')
        return self.add('Mul', place, x, self.add('Sigmoid', place, scale))

    def conv(self, x: str, spec: ConvSpec, place: str, key: str) -> str:
        """Add a convolution whose weights are `key` in the state dict, its batch norm and activation."""
        kernel, pad = [spec.kernel_size] * 2, spec.kernel_size // 2
        shape = (spec.out_channels, spec.in_channels // spec.groups, *kernel)
        x = self.add(
            'Conv',
            place,
            x,
            *self.weights(place, key, shape, spec.use_bn),
            kernel_shape=kernel,
            strides=[spec.stride] * 2,
            pads=[pad] * 4,
            group=spec.groups,
        )
        return self.activate(x, spec.act_func, place)

    def linear(self, x: str, spec: LinearSpec, place: str) -> str:
        """Add a fully connected layer: see `LinearLayer.forward`."""
        weights = self.weights(place, f'{place}.linear', (spec.out_features, spec.in_features), spec.use_bn)
        return self.activate(self.add('Gemm', place, x, *weights, transB=1), spec.act_func, place)

    def weights(self, place: str, key: str, shape: tuple[int, ...], has_norm: bool) -> tuple[str, str]:
        """Add the weight and bias of a layer with its batch norm folded in; returns their names."""
        if self.state is None:
            weight, bias = (
                self.random.random(s, np.float32) * 2 * RANDOM_BOUND - RANDOM_BOUND for s in (shape, shape[0])
            )
        else:
            weight, bias = self.value(f'{key}.weight'), self.value(f'{key}.bias', np.zeros(shape[0]))
            if has_norm:
                norm = f'{key.rpartition(".")[0]}.bn'
                mean, variance = self.value(f'{norm}.running_mean'), self.value(f'{norm}.running_var')
                scale = self.value(f'{norm}.weight', np.ones(shape[0])) / np.sqrt(variance + BATCH_NORM_EPS)
                weight = weight * scale.reshape(-1, *[1] * (len(shape) - 1))
                bias = (bias - mean) * scale + self.value(f'{norm}.bias', np.zeros(shape[0]))
        return self.constant(f'{place}/weight', weight), self.constant(f'{place}/bias', bias)

    def value(self, name: str, usual: np.ndarray | None = None) -> np.ndarray:
        """Return a tensor of the state dict as float64; `usual` if it is not there."""
        if name not in self.state and usual is not None:
            return usual
        return self.state[name].detach().cpu().double().numpy()

    def activate(self, x: str, act_func: str | None, place: str) -> str:
        """Add an activation by its name in a config."""
        if act_func == 'relu':
            return self.add('Relu', place, x)
        if act_func == 'relu6':
            bounds = (self.constant(f'{place}/{name}', np.array(bound)) for name, bound in (('least', 0), ('most', 6)))
            return self.add('Clip', place, x, *bounds)
        if act_func == 'swish':
            return self.add('Mul', place, x, self.add('Sigmoid', place, x))
        if act_func == 'h-swish':
            return self.add('HardSwish', place, x)
        return x
