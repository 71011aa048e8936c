"""The found network elsewhere: exported files give its outputs, batch norms fold away, feature maps, safetensors."""

import shutil
import sys
from dataclasses import replace

import pytest
import torch
from training_runs import small_config

import test as test_script
from models import load_network
from models.config import dump_config, load_config
from models.model_eval import NetworkEval, fuse_batch_norm, largest_difference
from tools.errors import BadInput
from tools.export import need


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """The small network after a few batches, so that its statistics and outputs are not those of a new one."""
    made = tmp_path_factory.mktemp('export')
    torch.manual_seed(4)
    net = NetworkEval(small_config()).train()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
        net.classifier.linear.weight.mul_(10)
        for _ in range(4):
            net(2 + 3 * torch.randn(16, 3, 32, 32))
    torch.save({'state_dict': net.state_dict()}, made / 'weights.pth.tar')
    (made / 'small.config').write_text(dump_config(small_config()))
    return made


@pytest.fixture
def run_test(folder, monkeypatch, capsys):
    def call(*words, **changes):
        flags = {'config_path': folder / 'small.config', 'weights': folder / 'weights.pth.tar', 'num_classes': 3}
        flags |= {'img_size': 32, 'device': 'cpu'} | changes
        listed = [word for name, value in flags.items() for word in (f'--{name}', str(value))]
        monkeypatch.setattr(sys, 'argv', ['test.py', *listed, *map(str, words)])
        test_script.main(test_script.get_args())
        return capsys.readouterr().out

    return call


def reference(folder):
    return load_network(folder / 'small.config', folder / 'weights.pth.tar')


def images():
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize('more', [[], ['--fuse_bn']])
def test_onnx_gives_the_same_outputs_for_any_batch(run_test, folder, tmp_path, more):
    onnxruntime = pytest.importorskip('onnxruntime')
    printed = run_test('--export', tmp_path / 'net.onnx', *more)
    assert 'largest difference' in printed and 'onnxruntime' in printed and 'torch' in printed
    session = onnxruntime.InferenceSession(str(tmp_path / 'net.onnx'), providers=['CPUExecutionProvider'])
    (logits,) = session.run(['logits'], {'images': images().numpy()})
    expected = reference(folder)(images())
    assert expected.std() > 0.1 and torch.allclose(torch.from_numpy(logits), expected, atol=1e-4)


def test_a_program_of_torch_export(run_test, folder, tmp_path):
    run_test('--export', tmp_path / 'net.pt2')
    net = torch.export.load(tmp_path / 'net.pt2').module()
    assert torch.allclose(net(images()), reference(folder)(images()), atol=1e-5)


@pytest.mark.parametrize('more', [[], ['--fuse_bn']])
def test_safetensors_are_read_again_with_their_config(run_test, folder, tmp_path, more):
    pytest.importorskip('safetensors')
    run_test('--export', tmp_path / 'net.safetensors', *more)
    again = load_network(tmp_path / 'net.config', tmp_path / 'net.safetensors')
    assert torch.allclose(again(images()), reference(folder)(images()), atol=1e-5)
    assert load_config(tmp_path / 'net.config').first_stem.use_bn is not bool(more)
    (tmp_path / 'net.safetensors').write_bytes(b'\0' * 99)
    with pytest.raises(BadInput, match='net.safetensors: cannot be read'):
        load_network(tmp_path / 'net.config', tmp_path / 'net.safetensors')


@pytest.mark.parametrize('batch_norm', [True, False])
def test_folding_batch_norms_keeps_the_function_and_drops_the_layers(folder, batch_norm):
    net = reference(folder) if batch_norm else NetworkEval(small_config(batch_norm=False)).eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    fused = fuse_batch_norm(net)
    assert largest_difference(net, fused, 32) < 1e-5
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(isinstance(layer, torch.nn.modules.batchnorm._BatchNorm) for layer in fused.modules())
    with torch.no_grad():
        fused.second_stem.point_linear.conv.bias += 0.5
    assert largest_difference(net, fused, 32) > 1e-3  # the check can fail
    with torch.no_grad():
        fused.second_stem.point_linear.conv.bias += torch.nan
    assert not largest_difference(net, fused, 32) <= 1e-3


def test_a_layer_without_batch_norm_and_bias_folds_into_one_with_a_bias_of_zero():
    config = small_config()
    torch.manual_seed(5)
    net = NetworkEval(replace(config, first_stem=replace(config.first_stem, use_bn=False))).eval()
    assert net.first_stem.conv.bias is None
    fused = fuse_batch_norm(net)
    assert torch.equal(fused.first_stem.conv.weight, net.first_stem.conv.weight)
    assert fused.first_stem.conv.bias.abs().max() == 0
    assert largest_difference(net, fused, 32) < 1e-5


def test_feature_maps_of_every_stride():
    net = load_network('models/zoo/tf_nas_a.config', num_classes=10)
    x = torch.randn(2, 3, 64, 96)
    maps = net.forward_features_list(x)
    assert net.feature_info() == [(2, 16), (4, 24), (8, 40), (16, 112), (32, 320)]
    assert [tuple(m.shape) for m in maps] == [(2, ch, 64 // s, 96 // s) for s, ch in net.feature_info()]
    head = net.classifier(net.feature_mix_layer(maps[-1]).mean((2, 3)))
    assert torch.equal(head, net(x)) and head.shape == (2, 10)
    odd = net.forward_features_list(torch.randn(1, 3, 45, 45))
    assert [m.shape[-1] for m in odd] == [23, 12, 6, 3, 2]


@pytest.mark.parametrize('name', ['found.safetensors', 'found.onnx'])
def test_what_is_read_is_not_overwritten(run_test, folder, tmp_path, name):
    names = {'weights': 'found.pth', 'config_path': 'found.config'} if name != 'found.onnx' else {'weights': name}
    sources = {'weights': folder / 'weights.pth.tar', 'config_path': folder / 'small.config'}
    inputs = {flag: shutil.copy(sources[flag], tmp_path / inner) for flag, inner in names.items()}
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(BadInput, match='--export .*: would overwrite .*, which is read here'):
        run_test('--export', tmp_path / name, **inputs)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_missing_packages_are_named(monkeypatch):
    with pytest.raises(BadInput, match='--export x needs a package that is not here: pip install one two'):
        need('no_such_module', 'one two', '--export x')


@pytest.mark.parametrize(('name', 'message'), [('net.txt', 'should end in .onnx'), ('net.py', 'should end in .onnx')])
def test_names_that_cannot_be_exported_to(run_test, tmp_path, capsys, name, message):
    with pytest.raises(SystemExit):
        run_test('--export', tmp_path / name)
    assert message in capsys.readouterr().err
    with pytest.raises(BadInput, match='its folder does not exist'):
        run_test('--export', tmp_path / 'none' / 'net.onnx')
