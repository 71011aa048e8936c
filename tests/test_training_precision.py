"""Number formats: what they hold in which format, scaling and clipping, their flags, apex behind the same interface."""

import sys
from types import ModuleType

import pytest
import torch
from torch import nn
from training_runs import (
    assert_same_end,
    data,  # noqa: F401  (a fixture)
    flags,
    load,
    run_here,
    small_config,
)

from models.model_eval import NetworkEval
from tools.errors import BadInput
from tools.files import put_weights, read_weights
from tools.options import Parser, add_amp_args
from tools.precision import ApexPrecision, Precision, make_precision
from tools.training import TrainState, begin_momentum, make_optimizer

CPU, GPU = torch.device('cpu'), torch.device('cuda')


def choose(*words, device=CPU):
    """The precision of these flags."""
    parser = Parser('')
    add_amp_args(parser)
    args = parser.parse_args(words)
    level = args.opt_level or 'O0'
    return make_precision(device, level, args.amp_dtype, args.loss_scale, args.amp_backend)


def prepared(precision):
    """The small network and its optimizer in a precision, always from the same weights."""
    torch.manual_seed(1)
    net = NetworkEval(small_config())
    return precision.prepare(net, torch.optim.SGD(net.parameters(), 0.1, 0.9, fused=True))


def train(precision, steps=3, grad_clip=5.0, images=4):
    """A few steps; returns the network, its optimizer and the float32 state dict."""
    net, optimizer = prepared(precision)
    torch.manual_seed(2)
    x, y = torch.randn(images, 3, 32, 32), torch.arange(images) % 3
    for _ in range(steps):
        with precision.autocast():
            loss = nn.functional.cross_entropy(net(x).float(), y)
        precision.backward(loss)
        precision.step(optimizer, grad_clip)
    return net, optimizer, {name: value.clone() for name, value in net.state_dict().items()}


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_formats_and_closeness_to_full_precision(dtype):
    net, optimizer, state = train(choose('--opt_level', 'O1', '--amp_dtype', dtype))
    assert {p.dtype for group in optimizer.param_groups for p in group['params']} == {torch.float32}
    assert all(value.dtype in (torch.float32, torch.int64) for value in state.values())
    _, _, exact = train(choose())
    assert max((state[name] - exact[name]).abs().max() for name in state) < 0.1
    assert any(not torch.equal(state[name], exact[name]) for name in state)


@pytest.mark.parametrize('scale', [2.0**4, 2.0**10])
def test_gradients_are_clipped_unscaled(scale):
    """A clip that acts gives the same update with any scale (powers of two are exact as long as nothing underflows)."""
    changes = []
    for s in (1.0, scale):
        precision = Precision(CPU, torch.float16, s)
        net, _ = prepared(precision)
        before = {name: value.clone() for name, value in net.state_dict().items()}
        _, _, after = train(precision, steps=1, grad_clip=1e-2)
        change = [(after[name] - before[name]).flatten() for name, _ in net.named_parameters()]
        changes.append(torch.cat(change).norm().item())
    assert changes == pytest.approx([0.1 * 1e-2] * 2, rel=0.02)


def test_a_step_with_infinite_gradients_is_left_out_and_the_scale_lowered():
    precision = Precision(CPU, torch.float16)
    net, optimizer = prepared(precision)
    before = {name: value.clone() for name, value in net.named_parameters()}
    precision.backward(nn.functional.cross_entropy(net(torch.randn(2, 3, 32, 32)), torch.tensor([0, 1])))
    net.classifier.linear.bias.grad.fill_(float('inf'))
    scale = precision.scaler.get_scale()
    precision.step(optimizer, 5.0)
    assert precision.scaler.get_scale() == scale / 2
    assert all(torch.equal(value, before[name]) for name, value in net.named_parameters())


def test_an_overflow_at_the_first_update_leaves_no_momentum(monkeypatch):
    precision, net = choose('--opt_level', 'O1', '--amp_dtype', 'float16'), NetworkEval(small_config())
    state = TrainState(net, net, make_optimizer(net, 0.5, 0.9, 0, spare_norms=False), precision)
    begin_momentum(state.optimizer)
    monkeypatch.setattr(torch, 'empty_like', lambda p, **_: torch.full_like(p, float('nan')))  # memory unset
    weight = state.net.classifier.linear.weight
    before = weight.detach().clone()
    images = torch.randn(2, 3, 32, 32)
    for gradient in (float('inf'), 0.25):
        with precision.autocast():
            loss = state.net(images).float().sum()
        precision.backward(loss)
        scale = precision.scaler.get_scale()
        for p in state.net.parameters():
            p.grad.fill_(gradient * scale)
        precision.step(state.optimizer, 1e9)
    torch.testing.assert_close(weight.detach(), before - 0.5 * 0.25)


def test_a_fixed_scale_stays_after_an_overflow_and_a_resume():
    precision, dynamic = Precision(CPU, torch.float16, 128.0), Precision(CPU, torch.float16)
    net, optimizer = prepared(precision)
    precision.backward(nn.functional.cross_entropy(net(torch.randn(2, 3, 32, 32)), torch.tensor([0, 1])))
    net.classifier.linear.bias.grad.fill_(float('inf'))
    precision.step(optimizer, 5.0)
    assert precision.scaler.get_scale() == 128.0
    precision.load_state_dict(dynamic.state_dict())
    assert precision.scaler.get_scale() == 128.0


def test_scaler_state_is_kept():
    precision = Precision(CPU, torch.float16, 512.0)
    assert precision.state_dict()['scale'] == 512.0
    other = Precision(CPU, torch.float16)
    other.load_state_dict(precision.state_dict())
    assert other.scaler.get_scale() == 512.0
    Precision(CPU).load_state_dict(precision.state_dict())
    other.load_state_dict({})


@pytest.mark.parametrize(
    ('words', 'kind', 'dtype'),
    [
        ((), Precision, None),
        (('--opt_level', 'O1'), Precision, torch.bfloat16),
        (('--opt_level', 'O1', '--loss_scale', 'dynamic'), Precision, torch.bfloat16),
        (('--opt_level', 'O1', '--amp_dtype', 'float16', '--loss_scale', '128'), Precision, torch.float16),
    ],
)
def test_flags_that_work(words, kind, dtype):
    precision = choose(*words)
    assert type(precision) is kind and precision.dtype is dtype


@pytest.mark.parametrize(
    ('words', 'names'),
    [
        (('--opt_level', 'O1', '--loss_scale', '128'), 'amp_dtype float16'),
        (('--loss_scale', '128'), '--opt_level O1'),
        (('--amp_backend', 'apex'), 'use --opt_level O1'),
        (('--amp_dtype', 'bfloat16'), 'opt_level O1'),
        (('--amp_backend', 'apex', '--opt_level', 'O1'), 'native'),
    ],
)
def test_flags_that_contradict_name_what_works(words, names):
    with pytest.raises(BadInput, match=names) as refused:
        choose(*words)
    assert '\n' not in str(refused.value)


@pytest.mark.parametrize('words', [['--loss_scale', 'big'], ['--loss_scale', '0'], ['--opt_level', 'O2']])
def test_words_that_are_no_values_are_refused(words):
    with pytest.raises(SystemExit):
        choose(*words)


def test_apex_absent_or_without_amp_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, 'apex', ModuleType('apex'))
    with pytest.raises(BadInput, match='no apex with apex.amp .* use native'):
        choose('--amp_backend', 'apex', '--opt_level', 'O1', device=GPU)


def test_apex_is_called_as_its_manual_says(monkeypatch):
    """A stand-in for apex.amp records the calls; it scales by 1."""
    calls = []

    class Scaled:
        def __init__(self, loss, optimizer):
            self.loss = loss

        def __enter__(self):
            calls.append('scale_loss')
            return self.loss

        def __exit__(self, *_):
            pass

    amp = ModuleType('apex.amp')
    amp.initialize = lambda net, optimizer, **options: calls.append(options) or (net, optimizer)
    amp.scale_loss = Scaled
    amp.master_params = lambda optimizer: (p for group in optimizer.param_groups for p in group['params'])
    amp.state_dict = lambda: {'loss_scaler0': {'loss_scale': 1.0, 'unskipped': 3}}
    amp.load_state_dict = calls.append
    apex = ModuleType('apex')
    apex.amp = amp
    monkeypatch.setitem(sys.modules, 'apex', apex)
    words = ['--amp_backend', 'apex', '--opt_level', 'O1', '--loss_scale', '128']
    precision = choose(*words, device=GPU)
    assert type(precision) is ApexPrecision
    _, _, state = train(precision, steps=2)
    _, _, plain = train(choose(), steps=2)
    assert all(torch.equal(state[name], plain[name]) for name in state)
    options = {'opt_level': 'O1', 'loss_scale': 128.0, 'verbosity': 0}
    assert calls == [options, 'scale_loss', 'scale_loss']
    precision.load_state_dict(precision.state_dict())
    assert calls[-1] == precision.state_dict()


@pytest.mark.parametrize(('level', 'dtype'), [('O0', None), ('O1', 'bfloat16'), ('O1', 'float16')])
def test_the_script_in_every_format_and_resumed(data, tmp_path, monkeypatch, level, dtype):  # noqa: F811
    words = {'opt_level': level, 'amp_dtype': dtype, 'epochs': 1}
    whole = run_here(monkeypatch, flags(data, tmp_path / 'whole', **words))
    part = run_here(monkeypatch, flags(data, tmp_path / 'part', **words, max_steps=6))
    assert run_here(monkeypatch, flags(data, tmp_path / 'part', **words, snapshot='auto')) == part
    assert_same_end(whole, part)
    checkpoint = load(whole / 'checkpoint.pth.tar')
    assert bool(checkpoint['scaler']) == (dtype == 'float16')
    best = whole / 'model_best.pth.tar'
    put_weights(NetworkEval(small_config()), read_weights(best).state, best)
