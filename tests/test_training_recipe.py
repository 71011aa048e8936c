"""What leaves the paper's recipe: each flag does what it says, and all of them are off by default."""

import math
import re
from argparse import Namespace

import pytest
import torch
from PIL import Image
from torch import nn
from training_runs import (
    Loader,
    data,  # noqa: F401  (a fixture)
    flags,
    load,
    run_here,
    small_config,
)

import train_eval
from dataset.transforms import POLICIES, train_transform
from models.model_eval import NetworkEval
from tools.checkpoint import Checkpointer
from tools.distributed import World
from tools.precision import Precision
from tools.run import RunLogger
from tools.training import (
    TrainState,
    last_batch,
    load_moments,
    lr_at,
    make_mix,
    make_optimizer,
    memory_format,
    set_lr,
    update_average,
)

CPU = torch.device('cpu')


@pytest.mark.parametrize(
    ('epoch', 'max_steps', 'accum', 'batches'),
    [(0, None, 1, 10), (0, 4, 1, 4), (1, 14, 1, 4), (1, 10, 1, 0), (0, 3, 3, 9), (0, 4, 3, 10), (1, 5, 3, 3)],
)
def test_max_steps_counts_updates(epoch, max_steps, accum, batches):
    assert last_batch(epoch, 10, max_steps, accum) == batches


def test_learning_rates_by_hand():
    assert [lr_at(epoch, 0.05, 0, 10) for epoch in (0, 5)] == pytest.approx([0.05, 0.025])
    assert [lr_at(epoch, 0.2, 5, 10) for epoch in (0, 4)] == pytest.approx([0.04, 0.2])
    assert lr_at(5, 0.2, 2, 10) == pytest.approx(0.1 * (1 + math.cos(0.5 * math.pi)))


@pytest.mark.parametrize(
    ('changes', 'rates'),
    [
        ({'lr_scale': 'linear'}, [0.2 * 4 / 512, 0.1 * 4 / 512]),
        ({'lr_scale': 'linear', 'grad_accum': 2}, [0.2 * 8 / 512, 0.1 * 8 / 512]),
        ({'lr_warmup_epochs': 2}, [0.1, 0.2]),
        ({'grad_accum': 65}, [0.2 / 5, 0.2 * 2 / 5]),  # 260 images per update have a warm-up of five epochs
    ],
)
def test_the_learning_rate_follows_the_flags(data, tmp_path, monkeypatch, changes, rates):  # noqa: F811
    seen = []
    monkeypatch.setattr(train_eval, 'set_lr', lambda optimizer, lr: seen.append(lr) or set_lr(optimizer, lr))
    run_here(monkeypatch, flags(data, tmp_path, lr=0.2, epochs=2, **changes))
    assert seen == pytest.approx(rates)


def test_batch_norm_is_spared_weight_decay_only_where_asked():
    net = NetworkEval(small_config())
    decayed, spared = make_optimizer(net, 0.3, 0.7, 1e-3, spare_norms=True).param_groups
    assert (decayed['lr'], decayed['momentum']) == (0.3, 0.7)
    assert (decayed['weight_decay'], spared['weight_decay']) == (1e-3, 0.0)
    norms = {p for m in net.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    assert set(spared['params']) == norms and set(decayed['params']) == set(net.parameters()) - norms
    (group,) = make_optimizer(net, 0.3, 0.7, 1e-3, spare_norms=False).param_groups
    assert len(group['params']) == len(list(net.parameters()))


def test_layouts():
    gpu = torch.device('cuda')
    assert memory_format(None, CPU, False) is memory_format(None, gpu, True) is torch.channels_last
    assert memory_format(None, gpu, False) is memory_format(False, CPU, True) is torch.contiguous_format


def updated(batches, accum, grad_clip=5.0):
    """Parameters after training on these batches, batch norm in evaluation mode; and the step after each update."""
    torch.manual_seed(3)
    net = NetworkEval(small_config())
    net.eval().train = lambda mode=True: net
    state = TrainState(net, net, torch.optim.SGD(net.parameters(), 0.5, 0.9, fused=True), Precision(CPU))
    args = Namespace(
        seed=1, label_smooth=0.1, grad_accum=accum, grad_clip=grad_clip, print_freq=9, batch_size=4, max_steps=None
    )
    logger, calls = RunLogger(None, {}), []
    checkpointer = Checkpointer(logger, World(CPU), 10, {}, {})
    checkpointer.is_due = lambda: calls.append(state.step)
    train_eval.train_epoch(state, Loader(batches), None, args, checkpointer)
    return torch.cat([p.detach().flatten() for p in net.parameters()]), calls


def test_accumulated_gradients_are_those_of_the_large_batch():
    torch.manual_seed(0)
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8) % 3
    large, _ = updated([(x, y)], 1)
    small, calls = updated([(x[i : i + 2], y[i : i + 2]) for i in range(0, 8, 2)], 4)
    assert (large - small).abs().max() < 1e-6 and calls == [4]


def test_the_last_group_of_an_epoch_may_be_smaller():
    torch.manual_seed(0)
    x, y = torch.randn(6, 3, 32, 32), torch.arange(6) % 3
    grouped, calls = updated([(x[i : i + 2], y[i : i + 2]) for i in (0, 2, 4)], 2)
    plain, _ = updated([(x[:4], y[:4]), (x[4:], y[4:])], 1)
    assert (grouped - plain).abs().max() < 1e-6 and calls == [2, 3]


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


def test_no_mix_by_default():
    assert make_mix(0.0, 0.0, 3) is None


@pytest.mark.parametrize('policy', [None, *POLICIES])
def test_augmentations_take_images_of_any_size_and_follow_the_seed(policy):
    image = Image.effect_noise((50, 40), 60).convert('RGB')
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        results.append(train_transform(32, policy)(image))
    assert results[0].shape == (3, 32, 32) and torch.equal(*results)


def test_the_moving_average_is_kept_evaluated_and_read(data, tmp_path, monkeypatch, capsys):  # noqa: F811
    folder = run_here(monkeypatch, flags(data, tmp_path, ema_decay=0.5, epochs=1, max_steps=3, save_freq=0))
    checkpoint = load(folder / 'checkpoint.pth.tar')
    average = checkpoint['state_dict_ema']
    assert average['n_averaged'] == 3
    name = 'module.classifier.linear.weight'
    before = load(folder / 'checkpoint.previous.pth.tar')['state_dict_ema'][name]
    assert not torch.equal(average[name], checkpoint['state_dict'][name])
    assert before.shape == average[name].shape
    log = (folder / 'log.txt').read_text()
    assert 'without moving average: ' in log and re.search(
        r'step 3/3 .* eta 00:00\n', log
    )  # nothing left, of three updates


def test_everything_at_once(data, tmp_path, monkeypatch):  # noqa: F811
    changes = {
        'ema_decay': 0.9,
        'mixup': 0.2,
        'cutmix': 1.0,
        'auto_augment': 'autoaugment',
        'grad_accum': 2,
        'no_weight_decay_bn': True,
        'lr_scale': 'linear',
        'opt_level': 'O1',
        'epochs': 1,
    }
    folder = run_here(monkeypatch, flags(data, tmp_path, **changes))
    assert load(folder / 'checkpoint.pth.tar')['epoch'] == 1


@pytest.mark.slow
def test_compiled_training_learns_the_same(data, tmp_path, monkeypatch):  # noqa: F811
    still = {'dropout_rate': 0, 'drop_connect_rate': 0, 'epochs': 1}
    plain = run_here(monkeypatch, flags(data, tmp_path / 'plain', **still))
    compiled = run_here(monkeypatch, flags(data, tmp_path / 'compiled', compile=True, **still))
    a, b = (load(folder / 'checkpoint.pth.tar')['state_dict'] for folder in (plain, compiled))
    assert a.keys() == b.keys()
    assert max((a[name].double() - b[name].double()).abs().max() for name in a) < 1e-2


def test_the_moving_average_warms_up_as_by_hand():
    average, counter, decay = [torch.zeros(2)], [torch.tensor(0)], 0.9999
    expected = 0.0
    for n in range(1, 6):
        value = torch.full((2,), float(n))
        update_average(average, [value], torch.tensor(n), decay)
        update_average(counter, [torch.tensor(n)], torch.tensor(n), decay)
        share = (1 + n) / (10 + n)
        expected = share * expected + (1 - share) * n
    assert average[0].tolist() == pytest.approx([expected] * 2) and counter[0].item() == 5
    update_average(average, [torch.zeros(2)], torch.tensor(10**9), 0.5)
    assert average[0].tolist() == pytest.approx([expected / 2] * 2)


def test_moments_of_another_shape_are_refused():
    p = torch.nn.Parameter(torch.zeros(1000))
    optimizer = torch.optim.SGD([p], 0.1, 0.9, fused=True)
    saved = optimizer.state_dict() | {'state': {0: {'momentum_buffer': torch.zeros(3)}}}
    with pytest.raises(ValueError, match=r'\[3\] for a parameter of \[1000\]'):
        load_moments(optimizer, saved)
