"""A search without one of the freedoms: one path, fixed widths; the aligned start; spoiled searched models."""

import re

import pytest
import torch
from bad_files import good_flags, run_here, words_of, write_table
from training_runs import only_run

from conftest import NUM_CLASSES, SMALL_SPACE
from models.elasticity import align_operators, full_weights
from models.parsing import read_searched
from models.search_space import SPACE
from tools.rng import derive_seed


def test_aligned_operators_are_parts_of_the_largest():
    torch.manual_seed(3)
    full = full_weights(NUM_CLASSES, torch.device('cpu'), SMALL_SPACE)
    before = {name: value.clone() for name, value in full.items()}
    align_operators(full, SMALL_SPACE)
    stage = 'stage3.block2.m_ops'  # 8 channels; operators k3 e3 (32 wide), k5 e3 se (32), k3 e6 (64); the third leads
    lead = {name: value for name, value in full.items() if name.startswith(f'{stage}.2.')}
    assert all(torch.equal(value, before[name]) for name, value in lead.items())
    small, wider, largest = (full[f'{stage}.{index}.depth_conv.conv.weight'] for index in range(3))
    assert torch.equal(small, largest[:32]) and torch.equal(wider[:, :, 1:4, 1:4], largest[:32])
    assert torch.equal(wider[:, :, 0], before[f'{stage}.1.depth_conv.conv.weight'][:, :, 0])
    linear = full[f'{stage}.2.point_linear.conv.weight'][:, :32]
    assert all(torch.equal(full[f'{stage}.{index}.point_linear.conv.weight'], linear) for index in range(2))
    untouched = [name for name in full if 'm_ops' not in name or 'squeeze' in name]
    assert all(torch.equal(full[name], before[name]) for name in untouched)


def test_epochs_of_the_largest_operators_train_these_alone_and_then_all_start_from_them(images, monkeypatch, tmp_path):
    write_table(tmp_path / 'table.pkl')
    flags = good_flags('train_search.py', images, tmp_path / 'table.pkl', tmp_path / 'runs')
    flags |= {'batch_size': 10, 'epochs': 2, 'warmup_epochs': 2, 'largest_epochs': 1, 'report': None}
    assert run_here(monkeypatch, 'train_search.py', words_of(flags)) == 0
    torch.manual_seed(derive_seed(2, 'weights'))
    start = full_weights(3, torch.device('cpu'), SPACE)
    folder, lead = only_run(tmp_path / 'runs'), 3  # k5 e6 without SE
    first, second = (read_searched(folder / f'searched_model_0{n}.pth.tar', SPACE).state for n in (1, 2))
    for block in SPACE.blocks():
        names = [f'{block.stage}.{block.name}.m_ops.{i}.point_linear.conv.weight' for i in range(8)]
        assert [not torch.equal(start[name], first[name]) for name in names] == [i == lead for i in range(8)]
        same = [torch.equal(second[name], first[names[lead]][:, : second[name].shape[1]]) for name in names]
        assert 8 - 2 <= sum(same) < 8  # two steps moved one or two operators


@pytest.fixture(scope='module')
def search(images, tmp_path_factory):
    """Return a function that searches with the given freedoms and returns its log and searched model."""
    size = ['--img_size', '32', '--num_classes', '3', '--device', 'cpu']
    folder = tmp_path_factory.mktemp('freedoms')
    table = folder / 'flops.pkl'
    with pytest.MonkeyPatch.context() as patch:
        assert run_here(patch, 'latency_pkl/make_lat_lut.py', ['--metric', 'flops', *size, '--save_path', table]) == 0

    def run(*freedoms):
        save = folder / '-'.join(['of', *freedoms])
        lists = ['--img_root', images, '--train_list', images / 'train.txt', '--val_list', images / 'val.txt']
        words = [*lists, '--lookup_path', table, '--save', save, *size, '--workers', '0', '--batch_size', '8']
        words += ['--epochs', '1', '--warmup_epochs', '0', '--target_lat', '40%', '--freedoms', *freedoms]
        if not save.exists():
            with pytest.MonkeyPatch.context() as patch:
                assert run_here(patch, 'train_search.py', words) == 0
        (run_folder,) = save.iterdir()
        return (run_folder / 'log.txt').read_text(), run_folder / 'searched_model_01.pth.tar'

    return run


def test_search_without_width_keeps_the_start(search):
    log, model = search('operator')
    pairs = re.findall(r'current lat: ([\d.]+), the target lat: ([\d.]+)$', log, re.M)
    (before, target), (after, _) = pairs
    assert before == after != target
    assert read_searched(model, SPACE).widths == SPACE.start_widths()


def test_search_without_operator_trains_the_gumbel_path_alone(search):
    """Two steps of SGD move at most two operators of a block by one path a step, and two to four by two paths."""
    torch.manual_seed(derive_seed(2, 'weights'))
    start, moved = full_weights(3, torch.device('cpu'), SPACE), {}
    for freedoms in ((), ('operator',)):
        state = read_searched(search(*freedoms)[1], SPACE).state
        moved[freedoms] = [
            sum(
                not torch.equal(start[name], state[name])
                for name in start
                if name.startswith(f'{b.stage}.{b.name}.') and name.endswith('point_linear.conv.weight')
            )
            for b in SPACE.blocks()
        ]
    alone, both = moved.values()
    assert set(alone) == {1, 2} and set(both) <= {2, 3, 4} and sum(both) > sum(alone)
