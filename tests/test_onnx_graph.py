"""The ONNX writer: the network's outputs for all layers and activations, any batch and size."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from training_runs import small_config

from models.config import ConvSpec, LinearSpec, MBSpec, NetworkConfig
from models.model_eval import NetworkEval, fuse_batch_norm
from models.onnx_graph import OPSET, to_onnx
from models.search_space import SPACE

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')


def config_of(act, **rest):
    """Each operator once, and: no expansion, an even size at stride 2, grouped stem, a batch norm in the classifier."""
    blocks = [MBSpec(8, 8 * op.expand, 5 * op.se, 8, op.kernel, 1, act, **rest) for op in SPACE.ops]
    return NetworkConfig(
        ConvSpec(3, 2, 3, 8, act, **rest),
        MBSpec(8, 6, 4, 8, 3, 1, act, **rest),
        {'stage1': blocks, 'stage2': [MBSpec(8, 30, 3, 12, 5, 2, None, **rest)], 'stage3': []},
        ConvSpec(1, 1, 12, 16, act, groups=4, **rest),
        LinearSpec(16, 5, bias=False, use_bn=True, affine=True, act_func=act),
    )


def trained(config):
    """Return the network with weights and statistics that are far from a new one's."""
    torch.manual_seed(3)
    net = NetworkEval(config)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if value.is_floating_point():
                value.copy_(
                    1 + 0.3 * torch.rand_like(value) if 'running_var' in name else value + 0.3 * torch.randn_like(value)
                )
        net.classifier.linear.weight.mul_(5)
    return net.eval()


def outputs(model, images):
    options = onnxruntime.SessionOptions()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=['CPUExecutionProvider'])
    return session.run(['logits'], {'images': images.numpy()})[0]


def assert_equal(net, model, size):
    onnx.checker.check_model(model, full_check=True)
    for batch in (1, 3):
        images = torch.randn(batch, 3, size, size)
        expected = net(images).detach().numpy()
        assert expected.std() > 0.1
        np.testing.assert_allclose(outputs(model, images), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize('act', ['relu', 'relu6', 'swish', 'h-swish'])
def test_outputs_of_every_layer_and_activation(act):
    net = trained(config_of(act))
    model = to_onnx(net.config, net.state_dict(), 33)
    assert model.opset_import[0].version == OPSET and model.ir_version == 8  # which older programs read too
    assert_equal(net, model, 33)


@pytest.mark.parametrize(
    'rest', [{'use_bn': False, 'bias': True}, {'use_bn': False}, {'affine': False}, {'bias': True}]
)
def test_layers_with_and_without_norm_scale_and_bias(rest):
    net = trained(config_of('swish', **rest))
    assert_equal(net, to_onnx(net.config, net.state_dict(), 32), 32)


def test_folded_norms_give_the_same_model():
    net = trained(small_config())
    model, folded = (to_onnx(one.config, one.state_dict(), 32) for one in (net, fuse_batch_norm(net)))
    for ours, theirs in zip(model.graph.initializer, folded.graph.initializer, strict=True):
        np.testing.assert_allclose(onnx.numpy_helper.to_array(ours), onnx.numpy_helper.to_array(theirs), atol=1e-5)


def test_nodes_are_named_by_block_and_the_model_by_classes():
    config = config_of('relu')
    model = to_onnx(config, 0, 32, metadata={'class_names': json.dumps(['a "b"', 'ü'])})
    places = {node.name.split('/')[0] for node in model.graph.node}
    assert places == {'first_stem', 'feature_mix_layer', 'classifier', *(place for place, _ in config.blocks())}
    assert len({node.name for node in model.graph.node}) == len(model.graph.node)
    assert json.loads(model.metadata_props[0].value) == ['a "b"', 'ü'] and model.metadata_props[0].key == 'class_names'
    assert not any(node.op_type == 'BatchNormalization' for node in model.graph.node)


def test_random_weights_are_those_of_the_seed():
    first, again, other = (to_onnx(small_config(), seed, 32).graph.initializer for seed in (1, 1, 2))
    assert all(a.raw_data == b.raw_data for a, b in zip(first, again, strict=True))
    assert all(a.raw_data != b.raw_data for a, b in zip(first, other, strict=True))
    values = np.concatenate([onnx.numpy_helper.to_array(t).ravel() for t in first])
    assert np.abs(values).max() <= 0.1 and values.std() == pytest.approx(0.1 / 3**0.5, rel=0.05)
    net = NetworkEval(replace(small_config(batch_norm=False)))
    shapes = [tuple(p.shape) for p in net.state_dict().values()]
    assert sorted(tuple(tensor.dims) for tensor in first) == sorted(shapes)
