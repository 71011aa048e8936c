"""Lines of the loops that no other test would miss: each flag reaches what it is for."""

from argparse import Namespace
from functools import partial

import numpy as np
import pytest
import test_gpu_form
import torch
from PIL import Image

import train_search
from conftest import NUM_CLASSES, SMALL_SPACE, make_table, new_search
from dataset.loaders import ImageList
from dataset.transforms import train_transform
from models.model_search import Network
from models.targeting import Target
from tools.distributed import World
from tools.precision import Precision


def test_the_loss_of_the_latency_by_hand():
    net, table = Network(SMALL_SPACE.start_widths(), NUM_CLASSES, SMALL_SPACE), make_table(SMALL_SPACE, 32)
    one_hot = torch.zeros(5, 3)
    one_hot[:, 1] = 1
    with torch.no_grad():
        for stage in net.stages():
            stage.betas.copy_(torch.tensor([-1e9] * (len(stage.betas) - 1) + [0.0]))  # full depth
    arch = {name: [1] * stage.depth for name, stage in SMALL_SPACE.named_stages}
    expected = table.total(arch, SMALL_SPACE.start_widths(), SMALL_SPACE)
    for target in (0.5 * expected, 2 * expected):
        loss_of = Target(table, SMALL_SPACE, target, 1).loss(SMALL_SPACE.start_widths(), 0.3, torch.device('cpu'))
        loss, latency = loss_of(one_hot, net.depth_weights())
        assert latency.item() == pytest.approx(expected, rel=1e-5)
        assert loss.item() == pytest.approx(0.3 * abs(expected / target - 1), rel=1e-4)


def test_the_events_of_an_epoch_of_a_search(monkeypatch):
    """Draws, averages, updates and projections, in their order, with the values of the flags."""
    events, state = [], test_gpu_form.begin_search(SMALL_SPACE)
    state.begin_epoch()
    weights, architecture = state.net.weight_parameters(), state.net.arch_parameters()
    sample, project = state.net.sample, state.net.project_architecture

    def drawn(how, generator, **more):
        path = sample(how, generator, **more)
        events.append((how, more.get('exclude'), path))
        return path

    def averaged(_, parameters):
        of = 'weights' if len(parameters) == len(weights) else 'architecture'
        others = architecture if of == 'weights' else weights
        assert all(p.grad is None for p in others) and any(p.grad is not None for p in parameters)
        events.append(('average', of))

    def stepped(precision, optimizer, clip, call=Precision.step):
        events.append(('update', 'weights' if optimizer is state.w_optimizer else 'architecture', clip))
        call(precision, optimizer, clip)

    monkeypatch.setattr(state.net, 'sample', drawn)
    monkeypatch.setattr(state.net, 'project_architecture', lambda: events.append('project') or project())
    monkeypatch.setattr(World, 'average_gradients', averaged)
    monkeypatch.setattr(Precision, 'step', stepped)
    images = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    batches = test_gpu_form.Loader([images] * 3)
    checkpointer = Namespace(allows_update=lambda *_: True, is_due=lambda: False, signal=0)
    logger = Namespace(waiting=lambda *_: None, advance=lambda: None, step=lambda *_, **__: None)
    widths = SMALL_SPACE.start_widths()
    loss = Target(make_table(SMALL_SPACE, 32), SMALL_SPACE, 2.0, 1).loss(widths, 0.1, torch.device('cpu'))
    learn = partial(train_search.learn_with_noise, state, loss)
    world = World(torch.device('cpu'))
    numbers = train_search.train_epoch(
        state, (batches, batches), learn, world, test_gpu_form.ARGS, checkpointer, logger
    ).numbers
    step = [('gumbel', None), ('random', 'first'), ('average', 'weights'), ('update', 'weights', 5.0)]
    learnt = [('average', 'architecture'), ('update', 'architecture', 5.0), 'project']
    firsts = iter([event[2] for event in events if event[0] == 'gumbel'])
    seen = []
    for event in events:
        if event[0] == 'random':
            first = next(firsts)
            assert event[1] == first and all(a != b for a, b in zip(first, event[2], strict=True))
            event = ('random', 'first')
        seen.append(event[:2] if event[0] == 'gumbel' else event)
    assert seen == [*step, *learnt, *step, *step, *learnt]
    assert numbers.keys() == {'w_loss', 'w_top1', 'a_loss', 'a_top1', 'mixture_latency'} and state.step == 3
    for p in architecture:
        assert p.exp().sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(('epoch', 'expected'), [(2, 5.0), (3, 4.0), (4, 3.2)])
def test_temperature_and_noise_of_the_mixture(epoch, expected, monkeypatch):
    state = new_search(SMALL_SPACE, T_decay=0.8, warmup_epochs=2)
    state.epoch, given = epoch, []
    noise = torch.randn(5, 3)
    monkeypatch.setattr(train_search, 'backward_on_mixture', lambda *args: given.append(args[3]))
    train_search.learn_with_noise(state, None, None, None, noise)
    weights = ((state.net.log_alphas() + noise) / expected).softmax(1)
    assert torch.allclose(given[0], weights, atol=1e-6)


def test_optimizers_of_a_search_have_the_values_of_its_flags():
    recipe = {'w_lr': 0.11, 'w_mom': 0.6, 'w_wd': 0.03, 'a_lr': 0.07, 'a_betas': (0.4, 0.95), 'a_wd': 0.02}
    state = new_search(SMALL_SPACE, **recipe)
    w_optimizer, a_optimizer = state.recipe.make_optimizers(state.net, 0)
    (weights,), (architecture,) = w_optimizer.param_groups, a_optimizer.param_groups
    assert (weights['lr'], weights['momentum'], weights['weight_decay']) == (0.11, 0.6, 0.03)
    assert (architecture['lr'], architecture['betas'], architecture['weight_decay']) == (0.07, (0.4, 0.95), 0.02)


def test_augmentation_differs_by_epoch_and_flips(tmp_path):
    """A picture that is darker on the left; each epoch crops it anew, and flips it in about half of them."""
    shades = np.tile(np.linspace(0, 255, 40, dtype=np.uint8)[None, :, None], (40, 1, 3))
    Image.fromarray(shades).save(tmp_path / 'a.png')
    images = ImageList(tmp_path, [('a.png', 0)], train_transform(32), seed=3)
    items = [images[epoch, 0][0] for epoch in range(40)]
    assert len({item.numpy().tobytes() for item in items}) == 40 and torch.equal(items[7], images[7, 0][0])
    flipped = sum(bool(item[..., :8].mean() > item[..., -8:].mean()) for item in items)
    assert 8 < flipped < 32


def test_validation_draws_by_epoch_and_step(monkeypatch):
    state, drawn = test_gpu_form.begin_search(SMALL_SPACE), []
    generator_for = train_search.generator_for
    monkeypatch.setattr(train_search, 'generator_for', lambda *parts: drawn.append(parts) or generator_for(*parts))
    batches = test_gpu_form.Loader([(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]))] * 2)
    state.epoch = 6
    result = train_search.validate(state, batches, 0, World(torch.device('cpu')), lambda: False)
    assert drawn == [(0, 'validation', 6, 0), (0, 'validation', 6, 1)] and result.numbers['images'] == 8
