"""A random network to compare a searched one with, and the figures of both side by side."""

from collections import Counter

import pytest
import torch
from bad_files import run_here, write_table

from conftest import SMALL_SPACE, make_table
from experiments import random_model
from experiments.random_model import random_probabilities
from models.config import load_config
from models.parsing import parse_architecture
from models.search_space import SPACE
from models.targeting import most_probable
from tools.report import summary

PRINTED = """Target: 5.0000 ms
Round 1: predicted 5.0, measured 5.1, target 5.0000 ms
Params: 3.618251 M
FLOPs: 6.76 M
Lat_LUT: 4.9990 ms
{latency}
Val_acc_top1: {top1}
Val_acc_top5: 99.10
"""


def test_random_probabilities_draw_architectures_uniformly():
    depths, operators = Counter(), Counter()
    for seed in range(400):
        arch = parse_architecture(random_probabilities(seed, SMALL_SPACE), SMALL_SPACE)
        depths[len(arch['stage3'])] += 1
        operators[arch['stage1'][0]] += 1
    for counts, kinds in ((depths, SMALL_SPACE.stages[2].exit_depths), (operators, SMALL_SPACE.ops)):
        assert len(counts) == len(kinds)
        assert all(abs(n / 400 - 1 / len(kinds)) < 0.09 for n in counts.values())
    one, same = random_probabilities(7, SPACE), random_probabilities(7, SPACE)
    assert all(torch.equal(one[name], same[name]) for name in one)


def test_parsing_a_random_network_meets_the_target(monkeypatch, tmp_path, capsys):
    write_table(tmp_path / 'table.pkl')
    words = ['--lookup_path', tmp_path / 'table.pkl', '--img_size', 32, '--num_classes', 3, '--target_lat', '45%']
    table, found = make_table(img_size=32), []
    for seed in (1, 2):
        path = tmp_path / f'{seed}.config'
        model = tmp_path / f'{seed}.pth.tar'
        random_model.main(random_model.get_args(['--seed', str(seed), '--num_classes', '3', '--save_path', str(model)]))
        assert run_here(monkeypatch, 'parsing_model.py', ['--model_path', model, '--save_path', path, *words]) == 0
        found.append(load_config(path))
        numbers = dict(line.split(': ', 1) for line in capsys.readouterr().out.splitlines() if ' ms' in line)
        target, predicted = (float(numbers[name].split()[0]) for name in ('Target', 'Lat_LUT'))
        assert predicted == pytest.approx(target, rel=2e-3)
        arch = most_probable(random_probabilities(seed, SPACE), table, SPACE, table.target('45%', SPACE))
        kernels = [SPACE.ops[index].kernel for stage in arch.values() for index in stage]
        assert [spec.kernel_size for _, spec in found[-1].blocks()][-len(kernels) :] == kernels
    assert found[0] != found[1]


def test_figures_are_side_by_side(tmp_path, capsys):
    (tmp_path / 'a.txt').write_text(PRINTED.format(latency='Lat_CPU bs=1: 5.0500 ms', top1='81.25'))
    gpu = 'Lat_GPU bs=32: 4.9000 ms\nLat_GPU bs=1: 1.2000 ms\nLat_CPU bs=1: 9.0000 ms'
    (tmp_path / 'b.txt').write_text(PRINTED.format(latency=gpu, top1='79.00'))
    summary.main(summary.get_args([f'searched={tmp_path / "a.txt"}', f'random={tmp_path / "b.txt"}']))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ['searched', 'random'],
        ['target', '5.000', 'ms', '5.000', 'ms'],
        ['predicted', '4.999', 'ms', '4.999', 'ms'],
        ['measured', '5.050', 'ms', '4.900', 'ms'],
        ['off', 'the', 'target', '+1.0', '%', '-2.0', '%'],
        ['MACs', '6.76', 'M', '6.76', 'M'],
        ['parameters', '3.62', 'M', '3.62', 'M'],
        ['top-1', '81.2', '%', '79.0', '%'],
    ]


def test_a_figure_that_is_missing_is_named(tmp_path):
    (tmp_path / 'a.txt').write_text('Target: 5.0000 ms\nFLOPs: 6.76 M\nParams: 3.6 M\nVal_acc_top1: 3.0\n')
    with pytest.raises(summary.BadInput, match='a.txt: has no predicted, measured'):
        summary.main(summary.get_args([f'x={tmp_path / "a.txt"}']))
    with pytest.raises(summary.BadInput, match='x=absent: should be NAME=FILE'):
        summary.main(summary.get_args(['x=absent']))
