"""Configs, found networks and their weights, parsing of search checkpoints."""

import json
import random

import pytest
import torch
from torch import nn

from conftest import NUM_CLASSES, ROOT, random_arch
from models import NetworkEval, load_network
from models.config import MBSpec, build_config, dump_config, load_config, parse_config
from models.describe import count_mult_adds, count_params, describe_network, describe_space
from models.elasticity import full_weights, start_masks
from models.layers import MBInvertedResBlock
from models.parsing import load_architecture, parse_architecture
from models.search_space import SPACE
from tools.files import put_weights, read_weights, save_checkpoint

TF_NAS_A = ROOT / 'models' / 'zoo' / 'tf_nas_a.config'


def test_tf_nas_a_has_the_published_size():
    net = load_network(TF_NAS_A)
    assert count_params(net) == pytest.approx(8.757527, abs=1e-6)
    assert count_mult_adds(net, 224) == pytest.approx(456.68, abs=0.005)


def test_tf_nas_a_has_the_published_operators():
    config = load_config(TF_NAS_A)
    rows = [(op.kernel, op.expand, op.se) for op in SPACE.ops]
    found = [
        [
            rows.index((spec.kernel_size, round(spec.se_channels / spec.in_channels) * 3, True))
            if spec.se_channels
            else (1 if spec.kernel_size == 3 else 3)
            for spec in blocks
        ]
        for blocks in config.stages.values()
    ]
    assert found == [[5, 3], [5, 1, 7], [7, 1, 1, 1], [5, 1, 5, 5], [1, 1, 5, 5], [7]]
    mids = [spec.mid_channels for blocks in config.stages.values() for spec in blocks]
    assert mids == [83, 128, 138, 297, 170, 248, 500, 424, 477, 504, 796, 723, 555, 813, 1370, 1138, 1359, 1203]


def test_names_of_a_found_networks_weights():
    with torch.device('meta'):
        state = NetworkEval(load_config(TF_NAS_A)).state_dict()
    names = """first_stem.conv.weight first_stem.bn.running_mean second_stem.depth_conv.bn.weight
        stage3.1.inverted_bottleneck.bn.bias stage3.1.depth_conv.conv.weight stage3.1.point_linear.bn.running_var
        stage1.0.squeeze_excite.conv_reduce.bias feature_mix_layer.bn.num_batches_tracked classifier.linear.bias"""
    assert set(names.split()) <= set(state)
    assert 'second_stem.inverted_bottleneck.conv.weight' not in state


def test_config_survives_writing_and_reading(small_space):
    config = build_config(*random_arch(small_space, random.Random(0)), NUM_CLASSES, small_space)
    assert parse_config(dump_config(config), 'text') == config
    keys = json.loads(TF_NAS_A.read_text())
    assert list(keys) == ['first_stem', 'second_stem', *SPACE.stage_names, 'feature_mix_layer', 'classifier']
    shared = {'name', 'has_shuffle', 'stride', 'groups', 'kernel_size', 'in_channels', 'out_channels'}
    common = {'bias', 'use_bn', 'affine', 'act_func'}
    assert set(keys['first_stem']) == shared | common | {'ops_order'}
    assert set(keys['stage1'][0]) == shared | common | {'mid_channels', 'se_channels'}
    assert set(keys['classifier']) == common | {'name', 'in_features', 'out_features', 'ops_order'}


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda c: c.pop('stage3'), "'stage3' is missing"),
        (lambda c: c.pop('classifier'), "'classifier' is missing"),
        (lambda c: c['stage2'][1].update(mid_channels=0), r'stage2\[1\]: mid_channels is 0'),
        (lambda c: c['stage2'][1].update(mid_channels=10**9), 'mid_channels is 1000000000'),
        (lambda c: c['stage2'][1].update(mid_channels='96'), "mid_channels is '96'"),
        (lambda c: c['stage2'][1].update(mid_channels=True), 'mid_channels is True'),
        (lambda c: c['stage2'][1].update(kernel_size=4), 'kernel_size is 4.*odd'),
        (lambda c: c['stage2'][1].update(act_func='gelu'), "act_func is 'gelu'.*h-swish"),
        (lambda c: c['stage2'][1].update(extra=1), r"unknown keys \['extra'\]"),
        (lambda c: c['stage2'][1].pop('bias'), r"missing keys \['bias'\]"),
        (lambda c: c['stage2'][1].update(in_channels=41), r'stage2.1 takes 41 channels, the layer before it gives 40'),
        (lambda c: c['classifier'].update(in_features=1279), 'classifier takes 1279'),
        (lambda c: c['stage2'].append(None), r'stage2\[3\]'),
        (lambda c: c['first_stem'].update(in_channels=1), 'images have 3'),
    ],
)
def test_bad_configs_are_refused_by_name(change, message):
    data = json.loads(TF_NAS_A.read_text())
    change(data)
    with pytest.raises(ValueError, match=message):
        parse_config(json.dumps(data), 'net.config')


@pytest.mark.parametrize('text', ['', '{', '[]', '3', '[' * 100000])
def test_text_that_is_no_config_is_refused(text):
    with pytest.raises(ValueError, match='net.config'):
        parse_config(text, 'net.config')


def test_block_by_hand():
    block = MBInvertedResBlock(MBSpec(4, 8, 2, 4, 3, 1, 'swish')).eval()
    x = torch.randn(2, 4, 5, 5)

    def norm(y, bn):
        shape = (1, -1, 1, 1)
        y = (y - bn.running_mean.view(shape)) / torch.sqrt(bn.running_var.view(shape) + bn.eps)
        return y * bn.weight.view(shape) + bn.bias.view(shape)

    y = nn.functional.conv2d(x, block.inverted_bottleneck.conv.weight)
    y = norm(y, block.inverted_bottleneck.bn)
    y = y * torch.sigmoid(y)
    y = norm(nn.functional.conv2d(y, block.depth_conv.conv.weight, padding=1, groups=8), block.depth_conv.bn)
    y = y * torch.sigmoid(y)
    se, pooled = block.squeeze_excite, y.mean((2, 3), keepdim=True)
    pooled = nn.functional.conv2d(pooled, se.conv_reduce.weight, se.conv_reduce.bias)
    pooled = nn.functional.conv2d(pooled * torch.sigmoid(pooled), se.conv_expand.weight, se.conv_expand.bias)
    y = y * torch.sigmoid(pooled)
    y = norm(nn.functional.conv2d(y, block.point_linear.conv.weight), block.point_linear.bn)
    assert torch.allclose(block(x), x + y, atol=1e-5)


def test_drop_connect_grows_with_depth_and_drops_whole_branches(small_space):
    arch, widths = {'stage1': [0], 'stage2': [0, 0], 'stage3': [0, 0]}, small_space.start_widths()
    net = NetworkEval(build_config(arch, widths, NUM_CLASSES, small_space), drop_connect_rate=0.6)
    rates = [m.drop_connect.p for m in net.modules() if isinstance(m, MBInvertedResBlock)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    block, x = net.stage3[1].train(), torch.randn(500, 8, 2, 2)
    kept = (block(x) != x).flatten(1).any(1)
    assert 0.3 < kept.float().mean() < 0.5


def test_search_checkpoints_parse_to_the_most_probable(tmp_path, small_space):
    full, masks = full_weights(NUM_CLASSES, torch.device('cpu'), small_space), start_masks(small_space)
    for name, best in {'stage1.block1': 2, 'stage2.block1': 1, 'stage2.block2': 0, 'stage3.block1': 1}.items():
        full[f'{name}.log_alphas'][best] = 1.0
    full['stage2.betas'].copy_(torch.tensor([0.1, 0.3, 0.2]))  # exits after 0, 1, 2 blocks
    full['stage3.betas'].copy_(torch.tensor([0.5, 0.1]))
    assert parse_architecture(full, small_space) == {'stage1': [2], 'stage2': [1], 'stage3': [1]}
    masks['stage1']['block1'][2][:] = torch.tensor([1.0] * 20 + [0.0] * 12)
    state = {f'module.{name}': value for name, value in full.items()}
    save_checkpoint({'state_dict': state, 'mc_mask_dddict': masks}, tmp_path / 'searched.pth.tar')
    config = load_architecture(tmp_path / 'searched.pth.tar', small_space)
    assert [len(blocks) for blocks in config.stages.values()] == [1, 1, 1]
    spec = config.stages['stage1'][0]
    assert (spec.kernel_size, spec.mid_channels, spec.se_channels, spec.stride) == (3, 20, 0, 2)
    full['stage2.betas'].copy_(torch.tensor([0.4, 0.3, 0.2]))
    assert parse_architecture(full, small_space)['stage2'] == []


def test_checkpoints_of_other_things_are_refused(tmp_path, small_space):
    full, masks = full_weights(NUM_CLASSES, torch.device('cpu'), small_space), start_masks(small_space)
    path = tmp_path / 'c.pth.tar'
    save_checkpoint({'state_dict': full}, path)
    with pytest.raises(ValueError, match='neither a model.config nor a searched model'):
        load_architecture(path, small_space)
    save_checkpoint({'state_dict': full, 'mc_mask_dddict': masks}, path)
    with pytest.raises(ValueError, match='another search space'):
        load_architecture(path, SPACE)
    masks['stage1']['block1'][0][0] = 0.5
    save_checkpoint({'state_dict': full, 'mc_mask_dddict': masks}, path)
    with pytest.raises(ValueError, match='mask of stage1.block1 op 0'):
        load_architecture(path, small_space)
    path.write_bytes(b'\x00rubbish')
    with pytest.raises(ValueError, match='cannot be read as a checkpoint'):
        load_architecture(path, small_space)


@pytest.mark.parametrize('wrap', [lambda s: s, lambda s: {'state_dict': s, 'epoch': 3}])
@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_weights_load_with_and_without_prefix(tmp_path, small_space, wrap, prefix):
    config = build_config(*random_arch(small_space, random.Random(2)), NUM_CLASSES, small_space)
    net, other = NetworkEval(config).eval(), NetworkEval(config).eval()
    save_checkpoint(wrap({prefix + name: value for name, value in net.state_dict().items()}), tmp_path / 'w.pth')
    put_weights(other, read_weights(tmp_path / 'w.pth').state, 'w.pth')
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(net(x), other(x))


def test_weights_of_another_network_are_refused_by_name(tmp_path, small_space):
    config = build_config(*random_arch(small_space, random.Random(2)), NUM_CLASSES, small_space)
    net = NetworkEval(config)
    state = net.state_dict()
    state['extra'] = state.pop('first_stem.conv.weight')
    state['classifier.linear.bias'] = torch.zeros(9)
    save_checkpoint(state, tmp_path / 'w.pth')
    message = r'1 missing \(first_stem.conv.weight\); 1 unexpected \(extra\); 1 wrong shape \(classifier.linear.bias'
    with pytest.raises(ValueError, match=message):
        put_weights(net, read_weights(tmp_path / 'w.pth').state, 'w.pth')


def test_a_network_is_described_by_its_own_numbers(small_space):
    config = load_config('models/zoo/tf_nas_a.config')
    about = describe_network(config, 224, SPACE)
    assert about['macs'] == pytest.approx(456.68, abs=0.01) and about['params'] == pytest.approx(8.757527)
    rows = about['blocks']
    assert len(rows) == 18 and [row['size'] for row in rows if row['stride'] == 2] == [112, 56, 28, 14]
    assert all(row['low'] <= row['mid'] <= row['high'] for row in rows) and rows[0]['latency'] is None
    # 1x1, 3x3 depthwise, pooled SE, 1x1 of the first block
    row = rows[0]
    mid, se = row['mid'], row['se']
    counted = 112**2 * 16 * mid + 56**2 * (row['kernel'] ** 2 * mid + mid * 24) + 2 * mid * se
    assert row['macs'] == pytest.approx(counted / 1e6)
    arch = {'stage1': [0], 'stage2': [], 'stage3': [1, 2]}
    described = describe_network(build_config(arch, small_space.start_widths(), 3, small_space), 32, small_space)
    assert [(row['kernel'], row['expand'], row['mid']) for row in described['blocks']] == [
        (3, 3, 12), (5, 3, 18), (3, 6, 48)
    ]  # fmt: skip
    assert describe_space(32, small_space)['exits']['stage2'] == [0, 1, 2]
    assert torch.get_default_device() == torch.device('cpu')
