"""Lines of the loops that no other test would miss: each flag reaches what it is for."""

from argparse import Namespace

import pytest
import torch
from training_runs import data, flags, run_here, small_config

from conftest import NUM_CLASSES, SMALL_SPACE, make_table
from models.latency import LatencyLoss
from models.model_eval import NetworkEval
from models.model_search import Network
from tools.run.metrics import read_run
from tools.training import lr_at, make_optimizer

__all__ = ['data']


def first_loss(data, tmp_path, monkeypatch, **changes):  # noqa: F811
    """Loss of the first step of a training."""
    words = flags(data, tmp_path / '-'.join(map(str, changes.values())), epochs=1, max_steps=1, **changes)
    (line,) = read_run(run_here(monkeypatch, words)).of('step')
    return line['loss']


def test_the_loss_is_linear_in_label_smoothing(data, tmp_path, monkeypatch):  # noqa: F811
    none, some, more = (first_loss(data, tmp_path, monkeypatch, label_smooth=share) for share in (0.0, 0.4, 0.8))
    assert abs(more - none) > 1e-3 and some == pytest.approx((none + more) / 2, abs=1e-5)


def test_dropout_changes_the_first_loss(data, tmp_path, monkeypatch):  # noqa: F811
    rates = {'dropout_rate': 0.0, 'drop_connect_rate': 0.0}
    plain = first_loss(data, tmp_path, monkeypatch, **rates)
    assert first_loss(data, tmp_path, monkeypatch, **rates | {'dropout_rate': 0.9}) != plain
    assert first_loss(data, tmp_path, monkeypatch, **rates | {'drop_connect_rate': 0.9}) != plain


def test_the_optimizer_of_a_training_has_the_values_of_its_flags():
    net = NetworkEval(small_config())
    args = Namespace(lr=0.3, momentum=0.7, weight_decay=0.02, no_weight_decay_bn=True)
    with_decay, without = make_optimizer(net, args).param_groups
    assert (with_decay['lr'], with_decay['momentum'], with_decay['weight_decay']) == (0.3, 0.7, 0.02)
    norms = [p for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters()]
    assert without['weight_decay'] == 0 and {id(p) for p in without['params']} == {id(p) for p in norms}


def test_learning_rates_by_hand():
    args = Namespace(lr=0.2, lr_scale='linear', epochs=10, batch_size=128, grad_accum=1)
    assert [lr_at(epoch, args) for epoch in (0, 5)] == pytest.approx([0.05, 0.025])  # 128 of 512 images; half-way
    args.batch_size, args.lr_scale = 512, 'none'
    assert [lr_at(epoch, args) for epoch in (0, 4)] == pytest.approx([0.04, 0.2])  # a warm-up of five epochs


def test_the_loss_of_the_latency_by_hand():
    net, table = Network(SMALL_SPACE.start_widths(), NUM_CLASSES, SMALL_SPACE), make_table(SMALL_SPACE, 32)
    one_hot = torch.zeros(5, 3)
    one_hot[:, 1] = 1
    with torch.no_grad():
        for stage in net.stages():
            stage.betas.copy_(torch.tensor([-1e9] * (len(stage.betas) - 1) + [0.0]))  # full depth
    arch = {name: [1] * stage.depth for name, stage in zip(SMALL_SPACE.stage_names, SMALL_SPACE.stages, strict=True)}
    expected = table.total(arch, SMALL_SPACE.start_widths(), SMALL_SPACE)
    for target in (0.5 * expected, 2 * expected):
        loss_of = LatencyLoss(table, SMALL_SPACE.start_widths(), SMALL_SPACE, target, 0.3, torch.device('cpu'))
        loss, latency = loss_of(one_hot, net.depth_weights())
        assert latency.item() == pytest.approx(expected, rel=1e-5)
        assert loss.item() == pytest.approx(0.3 * abs(expected / target - 1), rel=1e-4)
