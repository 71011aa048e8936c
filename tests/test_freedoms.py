"""A search without one of the freedoms: one path, fixed widths; the aligned start; spoiled searched models."""

import re

import pytest
import torch
from bad_files import run_here

from conftest import NUM_CLASSES, SMALL_SPACE
from models.elasticity import align_operators, full_weights, start_masks
from models.parsing import MASKS_KEY, load_search_checkpoint, mask_widths
from models.search_space import SPACE
from tools.errors import BadInput
from tools.rng import derive_seed


@pytest.mark.parametrize(
    ('spoil', 'message'),
    [
        (lambda data: data.pop('state_dict'), 'neither a model.config nor a searched model'),
        (lambda data: data['state_dict'].update(epoch=3), 'neither a model.config nor a searched model'),
        (lambda data: data['state_dict'].pop('stage3.betas'), 'stage3.betas should be 2 values'),
        (
            lambda data: data['state_dict'].pop('stage1.block1.log_alphas'),
            'block1.log_alphas should be 3 values',
        ),
        (lambda data: data[MASKS_KEY]['stage1']['block1'][0].fill_(0.5), 'mask of stage1.block1 op 0'),
        (lambda data: data[MASKS_KEY].pop('stage2'), 'mask of stage2.block1 op 0'),
    ],
)
def test_spoiled_searched_models_are_refused_by_what_is_wrong(tmp_path, spoil, message):
    path = tmp_path / 'searched.pth.tar'
    masks = start_masks(SMALL_SPACE)
    data = {'state_dict': full_weights(NUM_CLASSES, torch.device('cpu'), SMALL_SPACE), MASKS_KEY: masks}
    spoil(data)
    torch.save(data, path)
    with pytest.raises(BadInput, match=message):
        load_search_checkpoint(path, SMALL_SPACE)


def test_aligned_operators_are_parts_of_the_largest():
    torch.manual_seed(3)
    full = full_weights(NUM_CLASSES, torch.device('cpu'), SMALL_SPACE)
    before = {name: value.clone() for name, value in full.items()}
    align_operators(full, SMALL_SPACE)
    stage = 'stage3.block2.m_ops'  # 8 channels; operators k3 e3 (32 wide), k5 e3 se (32), k3 e6 (64); the second leads
    lead = {name: value for name, value in full.items() if name.startswith(f'{stage}.1.')}
    assert all(torch.equal(value, before[name]) for name, value in lead.items())
    depthwise = full[f'{stage}.1.depth_conv.conv.weight']
    assert torch.equal(full[f'{stage}.0.depth_conv.conv.weight'], depthwise[:, :, 1:4, 1:4])
    wide = full[f'{stage}.2.point_linear.conv.weight']
    assert torch.equal(wide[:, :32], full[f'{stage}.1.point_linear.conv.weight'])
    assert torch.equal(wide[:, 32:], before[f'{stage}.2.point_linear.conv.weight'][:, 32:])
    untouched = [name for name in full if 'm_ops' not in name or 'squeeze' in name]
    assert all(torch.equal(full[name], before[name]) for name in untouched)


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
    assert mask_widths(load_search_checkpoint(model, SPACE)[1]) == SPACE.start_widths()


def test_search_without_operator_trains_the_gumbel_path_alone(search):
    """Two steps of SGD move at most two operators of a block by one path a step, and two to four by two paths."""
    torch.manual_seed(derive_seed(2, 'weights'))
    start, moved = full_weights(3, torch.device('cpu'), SPACE), {}
    for freedoms in ((), ('operator',)):
        state, _ = load_search_checkpoint(search(*freedoms)[1], SPACE)
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
