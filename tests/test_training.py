"""Training: flags, schedule, accumulation, moving average, number formats, and what a resumed run ends with."""

import math
import sys
from argparse import Namespace
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from bad_files import run_here as run_script
from PIL import Image
from torch import nn
from training_runs import Loader, assert_same_end, flags, load, only_run, run_here, small_config

import train_eval
from dataset.transforms import POLICIES, train_transform
from models.model_eval import NetworkEval
from tools.checkpoint import Checkpointer
from tools.distributed import World
from tools.errors import BadInput
from tools.files import put_weights, read_weights
from tools.options import Parser, add_amp_args
from tools.precision import ApexPrecision, Precision, make_precision
from tools.run import RunLogger, read_run
from tools.training import (
    TrainState,
    begin_momentum,
    last_batch,
    load_moments,
    lr_at,
    make_mix,
    make_optimizer,
    memory_format,
    update_average,
)

CPU, GPU = torch.device('cpu'), torch.device('cuda')
STILL = {'dropout_rate': 0.0, 'drop_connect_rate': 0.0, 'epochs': 1}


def trained(folder):
    return load(folder / 'checkpoint.pth.tar')['state_dict']


def distance(a, b):
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


# --- flags and schedule


@pytest.mark.parametrize(
    'change',
    [
        {'lr': 0.2},
        {'lr_warmup_epochs': 2},
        {'lr_scale': 'linear'},
        {'momentum': 0.5},
        {'weight_decay': 0.0},
        {'no_weight_decay_bn': True},
        {'grad_clip': 0.1},
        {'label_smooth': 0.4},
        {'dropout_rate': 0.9},
        {'drop_connect_rate': 0.9},
        {'mixup': 5.0},
        {'cutmix': 5.0},
        {'auto_augment': 'randaugment'},
        {'device_aug': True},
        {'batch_size': 5},
        {'grad_accum': 2},
        {'img_size': 40},
        {'seed': 3},
        {'opt_level': 'O1'},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_flag_changes_the_weights(data, tmp_path, monkeypatch, change):
    usual = STILL | {'max_steps': 3, 'weight_decay': 0.1, 'grad_clip': 1.0, 'lr': 0.05}
    if not (data / 'usual').exists():
        run_here(monkeypatch, flags(data, data / 'usual', **usual))
    changed = run_here(monkeypatch, flags(data, tmp_path, **usual | change))
    assert distance(trained(only_run(data / 'usual')), trained(changed)) > 0


def test_learning_rates_by_hand():
    assert [lr_at(epoch, 0.05, 0, 10) for epoch in (0, 5)] == pytest.approx([0.05, 0.025])
    assert [lr_at(epoch, 0.2, 5, 10) for epoch in (0, 4)] == pytest.approx([0.04, 0.2])
    assert lr_at(5, 0.2, 2, 10) == pytest.approx(0.1 * (1 + math.cos(0.5 * math.pi)))


@pytest.mark.parametrize(
    ('changes', 'rates'),
    [
        ({}, [0.2, 0.1]),
        ({'lr_scale': 'linear', 'grad_accum': 2}, [0.2 * 8 / 512, 0.1 * 8 / 512]),
        ({'lr_warmup_epochs': 2}, [0.1, 0.2]),
        ({'grad_accum': 65}, [0.2 / 5, 0.2 * 2 / 5]),  # 260 images per update have a warm-up of five epochs
    ],
)
def test_the_learning_rate_of_each_epoch_follows_the_flags(data, tmp_path, monkeypatch, changes, rates):
    run = read_run(run_here(monkeypatch, flags(data, tmp_path, lr=0.2, **changes)))
    assert [line['lr'] for line in run.of('epoch')] == pytest.approx(rates)


@pytest.mark.parametrize(
    ('epoch', 'max_steps', 'accum', 'batches'),
    [(0, None, 1, 10), (0, 4, 1, 4), (1, 14, 1, 4), (1, 10, 1, 0), (0, 3, 3, 9), (0, 4, 3, 10), (1, 5, 3, 3)],
)
def test_max_steps_counts_updates(epoch, max_steps, accum, batches):
    assert last_batch(epoch, 10, max_steps, accum) == batches


def test_the_optimizer_spares_batch_norms_weight_decay_only_where_asked():
    net = NetworkEval(small_config())
    decayed, spared = make_optimizer(net, 0.3, 0.7, 1e-3, spare_norms=True).param_groups
    assert (decayed['lr'], decayed['momentum']) == (0.3, 0.7)
    assert (decayed['weight_decay'], spared['weight_decay']) == (1e-3, 0.0)
    norms = {p for m in net.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    assert set(spared['params']) == norms and set(decayed['params']) == set(net.parameters()) - norms
    (group,) = make_optimizer(net, 0.3, 0.7, 1e-3, spare_norms=False).param_groups
    assert len(group['params']) == len(list(net.parameters()))


def test_layouts():
    assert memory_format(None, CPU, False) is memory_format(None, GPU, True) is torch.channels_last
    assert memory_format(None, GPU, False) is memory_format(False, CPU, True) is torch.contiguous_format


@pytest.mark.parametrize(('mixup', 'cutmix'), [(0.2, 0.0), (0.0, 1.0), (0.2, 1.0)])
def test_mixes_give_soft_labels_that_the_seed_decides(mixup, cutmix):
    mix = make_mix(mixup, cutmix, 3)
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    results = []
    for _ in range(2):
        torch.manual_seed(7)
        results.append(mix(images, labels))
    assert torch.equal(results[0][0], results[1][0]) and not torch.equal(results[0][0], images)
    assert results[0][1].shape == (4, 3) and torch.allclose(results[0][1].sum(1), torch.ones(4))


@pytest.mark.parametrize('policy', [None, *POLICIES])
def test_augmentations_take_images_of_any_size_and_follow_the_seed(policy):
    image = Image.effect_noise((50, 40), 60).convert('RGB')
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        results.append(train_transform(32, policy)(image))
    assert results[0].shape == (3, 32, 32) and torch.equal(*results)


# --- accumulation and moving average


def updated(batches, accum):
    """Parameters after training on these batches, batch norm in evaluation mode; and the step after each update."""
    torch.manual_seed(3)
    net = NetworkEval(small_config())
    net.eval().train = lambda mode=True: net
    state = TrainState(net, net, torch.optim.SGD(net.parameters(), 0.5, 0.9, fused=True), Precision(CPU))
    args = Namespace(
        seed=1, label_smooth=0.1, grad_accum=accum, grad_clip=5.0, print_freq=9, batch_size=4, max_steps=None
    )
    checkpointer, calls = Checkpointer(RunLogger(None, {}), World(CPU), 10, {}, {}), []
    checkpointer.is_due = lambda: calls.append(state.step)
    train_eval.train_epoch(state, Loader(batches), None, args, checkpointer)
    return torch.cat([p.detach().flatten() for p in net.parameters()]), calls


@pytest.mark.parametrize(
    ('small', 'accum', 'large', 'steps'), [((2, 2, 2, 2), 4, (8,), [4]), ((2, 2, 2), 2, (4, 2), [2, 3])]
)
def test_accumulated_gradients_are_those_of_the_large_batch(small, accum, large, steps):
    """The last group of an epoch may be smaller."""
    torch.manual_seed(0)
    x, y = torch.randn(sum(small), 3, 32, 32), torch.arange(sum(small)) % 3
    grouped, calls = updated(list(zip(x.split(small), y.split(small), strict=True)), accum)
    plain, _ = updated(list(zip(x.split(large), y.split(large), strict=True)), 1)
    assert (grouped - plain).abs().max() < 1e-6 and calls == steps


def test_the_moving_average_warms_up_as_by_hand():
    average, counter, expected = [torch.zeros(2)], [torch.tensor(0)], 0.0
    for n in range(1, 6):
        update_average(average, [torch.full((2,), float(n))], torch.tensor(n), 0.9999)
        update_average(counter, [torch.tensor(n)], torch.tensor(n), 0.9999)
        share = (1 + n) / (10 + n)
        expected = share * expected + (1 - share) * n
    assert average[0].tolist() == pytest.approx([expected] * 2) and counter[0].item() == 5
    update_average(average, [torch.zeros(2)], torch.tensor(10**9), 0.5)
    assert average[0].tolist() == pytest.approx([expected / 2] * 2)


def test_the_moving_average_is_saved_and_evaluated(data, tmp_path, monkeypatch):
    folder = run_here(monkeypatch, flags(data, tmp_path, ema_decay=0.5, epochs=1, max_steps=3))
    checkpoint = load(folder / 'checkpoint.pth.tar')
    average = checkpoint['state_dict_ema']
    assert average['n_averaged'] == 3
    assert not torch.equal(average['module.first_stem.conv.weight'], trained(folder)['module.first_stem.conv.weight'])
    (line,) = read_run(folder).of('epoch')
    assert line['val']['loss'] != line['val_without_average']['loss']
    assert line['val']['top1'] == pytest.approx(checkpoint['best_acc_top1'], rel=1e-6)


# --- number formats


def choose(*words, device=CPU):
    """The precision of these flags."""
    parser = Parser('')
    add_amp_args(parser)
    args = parser.parse_args(words)
    return make_precision(device, args.opt_level or 'O0', args.amp_dtype, args.loss_scale, args.amp_backend)


def train(precision, steps=3, grad_clip=5.0, overflow=False):
    """A few steps of the small network; returns its weights before and after. `overflow`: of a gradient, always."""
    torch.manual_seed(1)
    net = NetworkEval(small_config())
    net, optimizer = precision.prepare(net, make_optimizer(net, 0.1, 0.9, 0.0, spare_norms=False))
    begin_momentum(optimizer)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x, y = torch.randn(4, 3, 32, 32), torch.arange(4) % 3
    for _ in range(steps):
        with precision.autocast():
            loss = F.cross_entropy(net(x).float(), y)
        precision.backward(loss)
        if overflow:
            net.classifier.linear.bias.grad.fill_(math.inf)
        precision.step(optimizer, grad_clip)
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    return before, net.state_dict()


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_formats_are_close_to_full_precision(dtype):
    (_, half), (_, exact) = train(choose('--opt_level', 'O1', '--amp_dtype', dtype)), train(choose())
    assert 0 < distance(half, exact) < 0.1


@pytest.mark.parametrize('scale', [1.0, 2.0**4, 2.0**10])
def test_gradients_are_clipped_unscaled(scale):
    before, after = train(Precision(CPU, torch.float16, scale), steps=1, grad_clip=1e-2)
    names = [name for name in before if name.endswith(('weight', 'bias'))]
    change = torch.cat([(after[name] - before[name]).flatten() for name in names])
    assert change.norm().item() == pytest.approx(0.1 * 1e-2, rel=0.02)


@pytest.mark.parametrize('fixed', [None, 128.0])
def test_an_overflow_leaves_the_update_out_and_halves_a_dynamic_scale(fixed):
    precision = Precision(CPU, torch.float16, fixed)
    scale = precision.scaler.get_scale()
    before, after = train(precision, steps=1, overflow=True)
    assert precision.scaler.get_scale() == (fixed or scale / 2)
    assert all(torch.equal(before[name], after[name]) for name in before if name.endswith(('weight', 'bias')))
    precision.load_state_dict(Precision(CPU, torch.float16, 512.0).state_dict())  # as a run that resumes
    assert precision.scaler.get_scale() == (fixed or 512.0)
    Precision(CPU).load_state_dict(precision.state_dict())
    precision.load_state_dict({})


def test_an_overflow_at_the_first_update_leaves_no_momentum(monkeypatch):
    monkeypatch.setattr(torch, 'empty_like', lambda p, **_: torch.full_like(p, math.nan))  # memory unset
    p = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([p], 0.5, 0.9, fused=True)
    begin_momentum(optimizer)
    precision = Precision(CPU, torch.float16)
    for gradient in (math.inf, 0.25):
        precision.backward((p * gradient).sum())
        precision.step(optimizer, 1e9)
    assert p.tolist() == pytest.approx([-0.5 * 0.25] * 2)


@pytest.mark.parametrize(
    ('words', 'dtype'),
    [
        ('', None),
        ('--opt_level O1', torch.bfloat16),
        ('--opt_level O1 --loss_scale dynamic', torch.bfloat16),
        ('--opt_level O1 --amp_dtype float16 --loss_scale 128', torch.float16),
    ],
)
def test_flags_that_work(words, dtype):
    assert choose(*words.split()).dtype is dtype


@pytest.mark.parametrize(
    'words',
    [
        '--opt_level O1 --loss_scale 128',
        '--loss_scale 128',
        '--amp_dtype bfloat16',
        '--amp_backend apex',
        '--opt_level O1 --amp_backend apex',
    ],
)
def test_flags_that_contradict_are_refused(words):
    flag = words.split()[-2]
    with pytest.raises(BadInput, match=f'{flag}|{words.split()[-1]}'):
        choose(*words.split())


def test_apex_absent_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, 'apex', ModuleType('apex'))
    with pytest.raises(BadInput, match='no apex with apex.amp .* use native'):
        choose('--amp_backend', 'apex', '--opt_level', 'O1', device=GPU)


def test_apex_is_called_as_its_manual_says(monkeypatch):
    """A stand-in for apex.amp records the calls; it scales by 1."""
    calls, apex = [], ModuleType('apex')

    @contextmanager
    def scale_loss(loss, optimizer):
        calls.append('scale_loss')
        yield loss

    apex.amp = Namespace(
        initialize=lambda net, optimizer, **options: calls.append(options) or (net, optimizer),
        scale_loss=scale_loss,
        state_dict=lambda: {'loss_scaler0': {'loss_scale': 1.0}},
        load_state_dict=calls.append,
    )
    monkeypatch.setitem(sys.modules, 'apex', apex)
    precision = choose(*'--amp_backend apex --opt_level O1 --loss_scale 128'.split(), device=GPU)
    assert type(precision) is ApexPrecision and precision.is_mixed
    (_, state), (_, plain) = train(precision, steps=2), train(choose(), steps=2)
    assert distance(state, plain) == 0
    assert calls == [{'opt_level': 'O1', 'loss_scale': 128.0, 'verbosity': 0}, 'scale_loss', 'scale_loss']
    precision.load_state_dict(precision.state_dict())
    assert calls[-1] == precision.state_dict()


# --- whole runs


@pytest.mark.parametrize(('level', 'dtype'), [('O0', None), ('O1', 'bfloat16'), ('O1', 'float16')])
def test_the_script_in_every_format_and_resumed(data, tmp_path, monkeypatch, level, dtype):
    words = {'opt_level': level, 'amp_dtype': dtype, 'epochs': 1}
    whole = run_here(monkeypatch, flags(data, tmp_path / 'whole', **words))
    part = run_here(monkeypatch, flags(data, tmp_path / 'part', **words, max_steps=6))
    assert run_here(monkeypatch, flags(data, tmp_path / 'part', **words, snapshot='auto')) == part
    assert_same_end(whole, part)
    assert bool(load(whole / 'checkpoint.pth.tar')['scaler']) == (dtype == 'float16')
    best = whole / 'model_best.pth.tar'
    put_weights(NetworkEval(small_config()), read_weights(best).state, best)
    if level == 'O0':
        assert run_script(monkeypatch, 'train_eval.py', flags(data, tmp_path / 'plain', epochs=1)) == 0
        assert_same_end(whole, only_run(tmp_path / 'plain'))


@pytest.mark.slow
def test_compiled_training_learns_the_same(data, tmp_path, monkeypatch):
    plain = run_here(monkeypatch, flags(data, tmp_path / 'plain', **STILL))
    compiled = run_here(monkeypatch, flags(data, tmp_path / 'compiled', compile=True, **STILL))
    assert trained(plain).keys() == trained(compiled).keys()
    assert distance(trained(plain), trained(compiled)) < 1e-2


def test_moments_of_another_shape_are_refused():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1000))], 0.1, 0.9, fused=True)
    saved = optimizer.state_dict() | {'state': {0: {'momentum_buffer': torch.zeros(3)}}}
    with pytest.raises(ValueError, match=r'\[3\] for a parameter of \[1000\]'):
        load_moments(optimizer, saved)
