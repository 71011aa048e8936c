"""The steps of a search against their plain form: the same numbers with fewer calls, less memory, fewer waits."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from benchmarks.counting import Calls, host_reads, saved_megabytes
from benchmarks.plain_search import (
    make_plain,
    plain_architecture_step,
    plain_forward,
    plain_weight_step,
)
from conftest import NUM_CLASSES, RECIPE, make_table
from models import functions
from models.functions import ACTIVATIONS, convolve, mix_norms, norm_act
from models.model_search import ExecutionMode, HostCopy, Network
from models.search import backward_on_mixture, backward_on_paths, train_only
from models.search_space import SPACE, Op
from models.targeting import Target
from tools.precision import Precision
from tools.rng import generator_for

MODES = [
    ExecutionMode(),
    ExecutionMode(recompute=True),
    ExecutionMode(fused=True),
    ExecutionMode(fused=True, recompute=True),
]
FULL = Precision(torch.device('cpu'))


def make_net(space, mode=MODES[0]):
    """A supernet of an architecture that is not uniform; the same in every mode."""
    torch.manual_seed(0)
    net = Network(space.start_widths(), NUM_CLASSES, space, mode).train()
    with torch.no_grad():
        for p in net.arch_parameters():
            p.copy_(torch.randn_like(p).log_softmax(0))
    return net


def make_loss(net, img_size):
    """Latency loss of a made-up table: weight 0.1, target 2."""
    table = make_table(net.space, img_size)
    return Target(table, net.space, 2.0, 1).loss(net.widths(), 0.1, torch.device('cpu'))


def architecture_step(net, optimizer, images, labels, op_weights, latency_loss, grad_clip, precision=FULL):
    """The architecture step of a search, as `train_search.py` makes it."""
    train_only(net.arch_parameters(), net.weight_parameters())
    result = backward_on_mixture(net, images, labels, op_weights, latency_loss, precision)
    precision.step(optimizer, grad_clip)
    net.project_architecture()
    return result


def weight_step(net, optimizer, images, labels, paths, grad_clip, precision=FULL):
    """The weight step of a search, as `train_search.py` makes it."""
    train_only(net.weight_parameters(), net.arch_parameters())
    losses, logits = backward_on_paths(net, images, labels, paths, precision)
    precision.step(optimizer, grad_clip)
    return losses[0], logits


def batch(size=32, images=6):
    return torch.randn(images, 3, size, size), torch.arange(images) % NUM_CLASSES


def gradients(parameters):
    return torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in parameters])


def close(a, b):
    return torch.allclose(a, b, rtol=1e-5, atol=1e-5 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize('act', [a for a in ACTIVATIONS])
def test_norm_act_equals_batch_norm_and_activation(act):
    x, grad = torch.randn(5, 7, 4, 4, dtype=torch.float64) * 3 + 2, torch.randn(5, 7, 4, 4, dtype=torch.float64)
    x.requires_grad_()
    expected = ACTIVATIONS[act].layer()(torch.nn.BatchNorm2d(7, affine=False, track_running_stats=False).double()(x))
    (expected_grad,) = torch.autograd.grad(expected, x, grad)
    got = norm_act(x, act)
    (got_grad,) = torch.autograd.grad(got, x, grad)
    assert torch.allclose(got, expected) and torch.allclose(got_grad, expected_grad)


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('size', [5, 6, 9])
@pytest.mark.parametrize('cached', [1, 1 << 20])
def test_gradients_of_wide_depthwise_convolutions_equal_torchs(monkeypatch, stride, size, cached):
    """The input is not square, and its images are taken one at a time or all together."""
    monkeypatch.setattr(functions, 'CACHED_BYTES', cached)
    x = torch.randn(3, 7, size + 2, size).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(7, 1, 5, 5, requires_grad=True)
    expected = F.conv2d(x, weight, None, stride, 2, 1, 7)
    got = convolve(x, weight, stride, 7)
    assert torch.equal(got, expected) and 'WideDepthwise' in type(got.grad_fn).__name__
    grad = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(got, (x, weight), grad), torch.autograd.grad(expected, (x, weight), grad), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-5)


def test_mix_norms_passes_gradcheck():
    inputs = [torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weights = torch.rand(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w, *x: mix_norms(list(x), w), (weights, *inputs))


@pytest.mark.parametrize('mode', MODES)
def test_architecture_step_equals_the_plain_one(small_space, mode):
    x, labels = batch()
    results = []
    for net, step in [
        (make_plain(make_net(small_space)), plain_architecture_step),
        (make_net(small_space, mode), architecture_step),
    ]:
        train_only(net.arch_parameters(), net.weight_parameters())
        weights = net.mixture_weights(5.0, generator_for(0, 'draws', 0, 0))
        optimizer = torch.optim.SGD(net.arch_parameters(), 1.0)
        loss, logits, latency = step(net, optimizer, x, labels, weights, make_loss(net, 32), 1e9)
        assert not any(p.grad is not None for p in net.weight_parameters())
        results.append((logits, latency, loss, torch.cat(net.arch_parameters())))
    for plain, ours in zip(*results, strict=True):
        assert close(ours, plain)


@pytest.mark.parametrize('mode', MODES)
def test_weight_step_equals_the_plain_one(small_space, mode):
    x, labels = batch()
    paths = [[0, 1, 2, 0, 1], [1, 2, 0, 1, 1]]
    results = []
    for net, step in [
        (make_plain(make_net(small_space)), plain_weight_step),
        (make_net(small_space, mode), weight_step),
    ]:
        train_only(net.weight_parameters(), net.arch_parameters())
        optimizer = torch.optim.SGD(net.weight_parameters(), 1.0)
        loss, logits = step(net, optimizer, x, labels, paths, 1e9)
        results.append((logits, loss, torch.cat([p.detach().flatten() for p in net.weight_parameters()])))
    for plain, ours in zip(*results, strict=True):
        assert close(ours, plain)


def test_steps_on_changing_paths_equal_the_plain_ones_under_momentum(small_space):
    """Some weights get their first gradient at a later step than others."""
    x, labels = batch()
    plain, net = make_plain(make_net(small_space)), make_net(small_space)
    optimizer, _ = replace(RECIPE, w_lr=0.1, w_wd=1e-3).make_optimizers(net, 0)
    plain_optimizer = torch.optim.SGD(plain.weight_parameters(), 0.1, 0.9, weight_decay=1e-3, foreach=False)
    train_only(net.weight_parameters(), net.arch_parameters())
    for paths in ([[0, 1, 2, 0, 1], [1, 2, 0, 1, 1]], [[2, 1, 1, 0, 0], [0, 0, 0, 1, 2]], [[0, 1, 2, 0, 1]]):
        plain_weight_step(plain, plain_optimizer, x, labels, paths, 5.0)
        weight_step(net, optimizer, x, labels, paths, 5.0)
    for p, q in zip(net.weight_parameters(), plain.weight_parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-4)


@pytest.mark.parametrize('mode', MODES)
def test_mixture_gives_weights_their_gradients_where_they_want_them(small_space, mode):
    x, _ = batch()
    plain, net = make_plain(make_net(small_space)), make_net(small_space, mode)
    weights = torch.rand(5, 3).softmax(1)
    plain_forward(plain, x, weights).square().sum().backward()
    net(x, weights).square().sum().backward()
    assert close(gradients(net.parameters()), gradients(plain.parameters()))


def test_fused_mode_serves_spaces_of_other_operators(small_space):
    for ops in [
        (Op(3, 2, True), Op(5, 4, True)),
        (Op(7, 3, False), Op(3, 3, True), Op(7, 3, True)),
        (Op(3, 3, False),),
    ]:
        space = replace(small_space, ops=ops)
        x, _ = batch()
        weights = torch.rand(5, len(ops)).softmax(1)
        plain, net = make_plain(make_net(space)), make_net(space, ExecutionMode(fused=True))
        assert close(net(x, weights), plain_forward(plain, x, weights))


def test_costs_of_an_architecture_step_of_the_whole_space():
    """The countable bars: 0.4 of the plain calls, 0.6 and 0.2 of the kept memory, and no reads."""
    x, labels = batch(112, 4)

    def run(net, step):
        train_only(net.arch_parameters(), net.weight_parameters())
        weights = net.mixture_weights(5.0, generator_for(0, 'draws', 0, 0))
        optimizer = torch.optim.Adam(net.arch_parameters(), fused=step is architecture_step)
        latency_loss = make_loss(net, 64)
        step(net, optimizer, x, labels, weights, latency_loss, 1e9)
        with Calls() as calls, host_reads() as reads:
            step(net, optimizer, x, labels, net.mixture_weights(5.0, generator_for(0)), latency_loss, 1e9)
        return calls.count, reads[0]

    def kept(net, forward):
        train_only(net.arch_parameters(), net.weight_parameters())
        weights = net.mixture_weights(5.0, generator_for(0, 'draws', 0, 0))
        return saved_megabytes(lambda: forward(net, x, weights))

    plain, fused = make_plain(make_net(SPACE)), make_net(SPACE, ExecutionMode(fused=True))
    (plain_calls, _), (fused_calls, reads) = run(plain, plain_architecture_step), run(fused, architecture_step)
    assert fused_calls <= 0.4 * plain_calls
    assert reads == 0
    plain_kept = kept(plain, plain_forward)
    assert kept(make_net(SPACE), Network.__call__) <= 0.6 * plain_kept
    assert kept(fused, Network.__call__) <= 0.6 * plain_kept
    assert kept(make_net(SPACE, ExecutionMode(recompute=True)), Network.__call__) <= 0.2 * plain_kept
    train_only(fused.weight_parameters(), fused.arch_parameters())
    log_alphas = HostCopy(fused.log_alphas())
    with host_reads(['cpu', 'item']) as transfers:  # `tolist` is of draws, which are made on the CPU
        first = fused.sample('gumbel', generator_for(0), log_alphas=log_alphas)
        paths = [first, fused.sample('random', generator_for(1), exclude=first)]
    optimizer = torch.optim.SGD(fused.weight_parameters(), 0.1, fused=True)
    with host_reads() as reads:
        weight_step(fused, optimizer, x, labels, paths, 5.0)
    assert (transfers[0], reads[0]) == (0, 0)


@pytest.mark.parametrize('mode', [ExecutionMode(), ExecutionMode(fused=True)])
def test_mixed_precision_stays_close_to_full(small_space, mode):
    x, labels = batch(64, 16)
    half, results = Precision(torch.device('cpu'), torch.bfloat16), []
    for precision in (FULL, half):
        net = make_net(small_space, mode)
        train_only(net.arch_parameters(), net.weight_parameters())
        weights = net.mixture_weights(5.0, generator_for(0, 'draws', 0, 0))
        optimizer = torch.optim.SGD(net.arch_parameters(), 1.0)
        architecture_step(net, optimizer, x, labels, weights, make_loss(net, 32), 1e9, precision)
        train_only(net.weight_parameters(), net.arch_parameters())
        optimizer = torch.optim.SGD(net.weight_parameters(), 1.0)
        loss, _ = weight_step(net, optimizer, x, labels, [[0, 1, 2, 0, 1]], 1e9, precision)
        stem = net.first_stem.conv.weight.detach() - make_net(small_space, mode).first_stem.conv.weight.detach()
        results.append((torch.cat(net.arch_parameters()).detach(), loss, stem.flatten()))
    (full_arch, full_loss, full_stem), (arch, loss, stem) = results
    assert torch.allclose(arch, full_arch, atol=0.02) and not torch.equal(arch, full_arch)
    assert abs(loss - full_loss) < 0.05
    assert torch.cosine_similarity(stem, full_stem, dim=0) > 0.95
