"""The supernet: names, paths, mixtures, sinks, draws."""

import re

import pytest
import torch
from torch import nn

from conftest import NUM_CLASSES
from models.layers import MBInvertedResBlock
from models.model_search import HostCopy, Network
from models.search_space import SPACE


@pytest.fixture
def net(small_space):
    net = Network(small_space.start_widths(), NUM_CLASSES, small_space).train()
    with torch.no_grad():
        for p in net.arch_parameters():
            p.copy_(torch.randn_like(p))
    return net


def test_state_dict_names_are_those_of_published_checkpoints():
    with torch.device('meta'):
        state = Network(SPACE.max_widths(), 100, SPACE).state_dict()
    op = r'm_ops\.[0-7]\.'
    layers = [
        r'inverted_bottleneck\.conv\.weight', r'depth_conv\.conv\.weight', r'point_linear\.conv\.weight',
        r'squeeze_excite\.conv_reduce\.(weight|bias)', r'squeeze_excite\.conv_expand\.(weight|bias)',
    ]  # fmt: skip
    names = re.compile(
        rf'stage[1-6]\.block[1-4]\.({op}({"|".join(layers)})|log_alphas)|stage[1-6]\.betas|first_stem\.conv\.weight'
        rf'|second_stem\.(depth_conv\.conv\.weight|point_linear\.conv\.weight|squeeze_excite\..*)'
        r'|feature_mix_layer\.conv\.weight|classifier\.linear\.(weight|bias)'
    )
    assert all(names.fullmatch(name) for name in state)
    # 18 blocks of 8 operators: 3 convolutions each, 4 SE tensors for half of them, log_alphas; betas; the rest
    assert len(state) == 18 * (8 * 3 + 4 * 4 + 1) + 6 + 1 + 6 + 1 + 2
    assert state['stage3.block2.m_ops.5.depth_conv.conv.weight'].shape == (640, 1, 3, 3)
    assert state['stage3.block2.m_ops.5.squeeze_excite.conv_reduce.weight'].shape == (160, 640, 1, 1)
    assert state['stage5.betas'].shape == (4,) and state['stage5.block4.log_alphas'].shape == (8,)


def test_architecture_parameters_start_uniform():
    with torch.device('cpu'):
        net = Network(SPACE.start_widths(), 10, SPACE)
    assert torch.allclose(net.log_alphas(), torch.full((18, 8), 1 / 8).log())
    assert all(torch.equal(stage.betas, torch.zeros_like(stage.betas)) for stage in net.stages())
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not any(m.affine or m.track_running_stats for m in norms) and len(norms) > 400


def slow_forward(net, x, op_weights):
    """The supernet written out: every operator with its own residual, weighted and summed, then the sink."""
    x, row = net.second_stem(net.first_stem(x)), 0
    for stage in net.stages():
        exits = [x] if stage.stage.input_is_exit else []
        for name in stage.block_names:
            ops = getattr(stage, name).m_ops
            x = sum(op_weights[row, i] * op(x) for i, op in enumerate(ops))
            row += 1
            exits.append(x)
        sink = torch.exp(stage.betas) / torch.exp(stage.betas).sum()
        x = torch.zeros_like(exits[-1])
        for weight, y in zip(sink, exits, strict=True):
            x = x + weight * y
    return net.classifier(net.feature_mix_layer(x).mean((2, 3)))


def test_mixture_equals_the_written_out_sum_with_gradients(net):
    x, logits = torch.randn(4, 3, 32, 32), torch.randn(5, 3, requires_grad=True)
    weights = logits.softmax(1)  # rows that sum to 1, of which the shared residual makes use
    expected, got = slow_forward(net, x, weights), net(x, weights)
    assert torch.allclose(got, expected, atol=1e-5)
    parameters = [logits, *net.weight_parameters(), *(s.betas for s in net.stages())]
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), parameters, retain_graph=True),
        torch.autograd.grad(expected.square().sum(), parameters),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-4, rtol=1e-4)


def test_path_equals_mixture_of_one_hot_weights(net):
    x, path = torch.randn(4, 3, 32, 32), [2, 0, 1, 1, 0]
    one_hot = nn.functional.one_hot(torch.tensor(path), 3).float()
    assert torch.allclose(net(x, path), slow_forward(net, x, one_hot), atol=1e-5)


def test_path_runs_exactly_one_operator_a_block(net):
    ran = []
    for name, module in net.named_modules():
        if isinstance(module, MBInvertedResBlock) and 'm_ops' in name:
            module.point_linear.register_forward_hook(lambda *_, name=name: ran.append(name))
    net(torch.randn(2, 3, 32, 32), [2, 0, 1, 1, 0])
    expected = ['stage1.block1.m_ops.2', 'stage2.block1.m_ops.0', 'stage2.block2.m_ops.1', 'stage3.block1.m_ops.1']
    assert ran == [*expected, 'stage3.block2.m_ops.0']


def test_sink_weights_by_hand(net):
    with torch.no_grad():
        net.stage2.betas.copy_(torch.tensor([0.0, 1.0, 2.0]))
    assert net.depth_weights()[1].tolist() == pytest.approx([0.0900306, 0.2447285, 0.6652410], abs=1e-6)


def test_gumbel_draws_follow_the_probabilities(net):
    probabilities = torch.tensor([0.7, 0.2, 0.1])
    with torch.no_grad():
        for op in net.mixed_ops():
            op.log_alphas.copy_(probabilities.log())
    generator = torch.Generator().manual_seed(1)
    draws = torch.tensor([net.sample('gumbel', generator) for _ in range(4000)])
    share = nn.functional.one_hot(draws, 3).float().mean(0)
    assert torch.allclose(share, probabilities.expand(5, 3), atol=0.03)


def test_draws_from_a_copy_follow_the_values_at_its_time(net):
    expected = [net.sample('gumbel', torch.Generator().manual_seed(seed)) for seed in range(20)]
    copy = HostCopy(net.log_alphas())
    with torch.no_grad():
        for op in net.mixed_ops():
            op.log_alphas.copy_(torch.tensor([0.0, 9.0, 0.0]))
    got = [net.sample('gumbel', torch.Generator().manual_seed(seed), log_alphas=copy) for seed in range(20)]
    assert got == expected
    assert net.sample('gumbel', torch.Generator().manual_seed(0)) == [1] * 5 != got[0]


def test_random_draws_are_uniform_over_the_other_operators(net):
    generator = torch.Generator().manual_seed(1)
    first = [0, 1, 2, 1, 0]
    draws = torch.tensor([net.sample('random', generator, exclude=first) for _ in range(4000)])
    share = nn.functional.one_hot(draws, 3).float().mean(0)
    for row, excluded in zip(share, first, strict=True):
        assert row[excluded] == 0
        assert all(abs(p - 0.5) < 0.04 for i, p in enumerate(row.tolist()) if i != excluded)
    free = torch.tensor([net.sample('random', generator) for _ in range(3000)])
    assert torch.allclose(nn.functional.one_hot(free, 3).float().mean(0), torch.full((5, 3), 1 / 3), atol=0.04)
    with pytest.raises(ValueError, match="'gumble'"):
        net.sample('gumble', generator)


def test_seed_decides_every_draw(net):
    def draws(seed):
        generator = torch.Generator().manual_seed(seed)
        first = net.sample('gumbel', generator)
        return first, net.sample('random', generator, first), net.mixture_weights(2.0, generator).tolist()

    assert draws(7) == draws(7)
    assert draws(7) != draws(8)


def test_mixture_weights_are_a_gumbel_softmax(net):
    temperature, noise = 0.7, torch.Generator().manual_seed(3)
    weights = net.mixture_weights(temperature, torch.Generator().manual_seed(3))
    gumbel = -torch.log(torch.empty(5, 3).exponential_(generator=noise))
    scores = torch.exp((net.log_alphas() + gumbel) / temperature)
    assert torch.allclose(weights, scores / scores.sum(1, keepdim=True), atol=1e-6)
    weights[0, 0].backward()
    assert net.stage1.block1.log_alphas.grad.abs().sum() > 0


def test_projection_makes_logarithms_of_probabilities(net):
    before = [p.detach().softmax(0) for p in net.arch_parameters()]
    net.project_architecture()
    for p, probabilities in zip(net.arch_parameters(), before, strict=True):
        assert torch.allclose(p.exp(), probabilities, atol=1e-6)


def test_parameters_are_weights_or_architecture(net):
    arch, weights = net.arch_parameters(), net.weight_parameters()
    assert len(arch) == 5 + 3
    assert {id(p) for p in arch} | {id(p) for p in weights} == {id(p) for p in net.parameters()}
    assert not {id(p) for p in arch} & {id(p) for p in weights}
