"""Runs made up for the tests of pictures: metrics.jsonl as the scripts write it, without training anything."""

import math

import torch

from conftest import make_table
from models.config import load_config
from models.describe import describe_architecture, describe_network, describe_space, describe_table
from models.elasticity import Scaler, start_masks, update_masks
from models.parsing import mask_widths, parse_architecture
from models.search_space import SPACE
from tools.run import RunLogger, run_header

CPU = torch.device('cpu')


def write_search(folder, space=SPACE, epochs=6, warmup=2, img_size=64, steps=10, seed=0):
    """A search whose log-probabilities walk at random, scaled to a target after each epoch."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(seed)
    table = make_table(space, img_size, base=1.0)
    table.meta.update(device='made-up device', batch_size=1, threads=1, method='made up')
    target = 0.3 * sum(table.reach(space)[::2])
    flags = {'epochs': epochs, 'warmup_epochs': warmup, 'target_lat': target, 'note': '<made> & "up"'}
    latency = {'table': 'made-up.pkl', 'target': target, **describe_table(table, space)}
    about = {'space': describe_space(img_size, space), 'latency': latency, 'steps_an_epoch': steps}
    metrics = RunLogger(folder, run_header('search', flags, CPU, **about))
    masks = start_masks(space)
    state = {f'{b.stage}.{b.name}.log_alphas': torch.zeros(len(space.ops)) for b in space.blocks()}
    for name, stage in space.named_stages:
        state[f'{name}.betas'] = torch.zeros(len(stage.exit_depths))
    for block, index, op in space.positions():
        shape = op.max_width(block.in_ch), 1, op.kernel, op.kernel
        kernels = torch.randn(shape, generator=draw)
        state[f'{block.stage}.{block.name}.m_ops.{index}.depth_conv.conv.weight'] = kernels
    for epoch in range(epochs):
        later, numbers = epoch >= warmup, {'lr': 0.025, 'temperature': 5.0 * 0.96 ** max(epoch - warmup, 0)}
        for step in range(1, steps + 1):
            done = epoch + step / steps
            line = {'w_loss': 2.3 * math.exp(-0.4 * done / epochs), 'w_top1': 60 * done / epochs}
            if later:
                mixture = target * (1 + 0.3 / (done - warmup + 1))
                line |= {'a_loss': line['w_loss'] + 0.1, 'a_top1': line['w_top1'] - 4, 'mixture_latency': mixture}
            metrics.record('step', epoch, step, steps=steps, **line)
        numbers |= line
        if later:
            for name in [name for name in state if name.endswith(('alphas', 'betas'))]:
                noise = torch.randn(state[name].shape, generator=draw)
                state[name] = (state[name] + 3 / epochs**0.5 * noise).log_softmax(0)
            arch, widths = parse_architecture(state, space), mask_widths(masks)
            scaler = Scaler(arch, table, space, 1)
            scaled = scaler.scale(widths, target)
            least, most = scaler.reach()
            before, after = table.total(arch, widths, space), table.total(arch, scaled, space)
            numbers['latency'] = {'target': target, 'before': before, 'after': after}
            numbers['latency'] |= {'least': least, 'most': most}
            masks = update_masks(masks, scaled, state)
            numbers['val'] = {'top1': 50 * epoch / epochs, 'top5': 80.0}
        probabilities = {name: value.log_softmax(0) if name.endswith(('alphas', 'betas')) else value
                         for name, value in state.items()}  # fmt: skip
        metrics.record('epoch', epoch, **numbers, **describe_architecture(probabilities, masks, table, space, 10))
    metrics.record('end', epochs - 1)
    metrics.close()
    return folder


def write_training(folder, device='made-up device', ms=7.5, top1=70.0, classes=1000, epochs=5, config=None):
    """A training of TF-NAS-A; without a measured latency where `ms` is None."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = {'epochs': epochs, 'num_classes': classes, 'img_size': 224, 'note': 'made up'}
    network = describe_network(config or load_config('models/zoo/tf_nas_a.config'), 224, SPACE)
    metrics = RunLogger(folder, run_header('training', flags, CPU, network=network, steps_an_epoch=4))
    for epoch in range(epochs):
        share = (epoch + 1) / epochs
        for step in range(1, 5):
            numbers = {'lr': 0.1, 'loss': 7 - 5 * (epoch + step / 4) / epochs, 'top1': top1 * share, 'top5': 90.0}
            metrics.record('step', epoch, step, steps=4, **numbers)
        train = {'loss': 6.9 - 4.9 * share, 'top1': top1 * share - 2, 'top5': 90.0, 'images': 64}
        val = {'loss': 6.5 - 4.4 * share, 'top1': top1 * (1 - 0.5 * (1 - share) ** 2), 'top5': 90.0, 'images': 32}
        metrics.record('epoch', epoch, lr=0.1 * (1 - epoch / epochs), train=train, val=val, best_top1=val['top1'])
    metrics.record('end', epochs, best_top1=top1)
    if ms is not None:
        about = {'device': device, 'batch_size': 1, 'threads': 1, 'img_size': 224}
        parts = [0.1 * ms, *[0.8 * ms / len(network['blocks'])] * len(network['blocks']), 0.1 * ms]
        metrics.record('latency', epochs, ms=ms, parts=parts, **about)
    metrics.close()
    return folder
