"""The driver of the experiments: all arms from the shell, in a small space at the smallest sizes; its tables."""

import json
import re
import signal
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from test_targeting import random_state

from conftest import ROOT, SMALL_SPACE, make_table
from experiments import choices, path_accuracy, repeated, three_freedoms
from experiments import join as join_freedoms
from experiments.results import Run, difference, holm, interval, p_values, read_numbers, result_of
from models.config import load_config
from models.elasticity import fit_widths, latency_range
from models.latency import save_table
from models.parsing import ARCH_KEY, parse_architecture
from models.search_space import SPACE
from tools.errors import BadInput
from tools.run.metrics import VERSION

SIZE = ['--img_size', '32', '--num_classes', '3']


def test_intervals_by_hand():
    # mean 2, standard deviation 1, t(0.975, 2) = 4.3027: half width 4.3027 / sqrt(3) = 2.4841
    assert interval([1.0, 2.0, 3.0]) == '2.00 ± 2.48'
    assert interval([5.0]) == '5.00 (n = 1)' and interval([]) == ''
    # equal variances and sizes: 4 degrees of freedom, t = 2.7764, standard error sqrt(2 / 3): 2.2669
    assert difference([2.0, 3.0, 4.0], [1.0, 2.0, 3.0]) == '+1.00 (-1.27 to +3.27)'


def test_p_values_by_hand():
    # sorted and multiplied by 4, 3, 2, 1: 0.04, 0.06, 0.06 (0.05 is less than the one before), 0.6
    adjusted = holm({'a': 0.6, 'b': 0.01, 'c': 0.025, 'd': 0.02})
    assert adjusted == pytest.approx({'b': 0.04, 'd': 0.06, 'c': 0.06, 'a': 0.6})
    assert holm({'a': 0.7, 'b': 0.8}) == {'a': 1, 'b': 1}
    # t = 1 / sqrt(2 / 3) with 4 degrees of freedom: p = 0.28786; adjusted for two arms, but not of the random networks
    far, near = [2.0, 3.0, 4.0], [1.0, 2.0, 3.0]
    p = p_values({'full': near, 'random': far, 'paper': far, 'uniform': [1.0, 2.0, 3.0], 'one': [9.0]})
    assert p == pytest.approx({'random': 0.28786, 'paper': 2 * 0.28786, 'uniform': 1}, abs=1e-5)
    assert p_values({'full': [1.0], 'random': far}) == {}


def test_last_number_counts():
    assert read_numbers('top1: 3.5 x\ntop1: 4.25', top1=r'top1: ([\d.]+)', lost=r'top9: ([\d.]+)') == {'top1': 4.25}


@pytest.fixture
def join(tmp_path, monkeypatch, capsys):
    """Return a function that joins files into the folder `both` and returns what is printed."""

    def run(files):
        monkeypatch.setattr(sys, 'argv', ['join.py', *map(str, files), '--save', str(tmp_path / 'both')])
        join_freedoms.main(join_freedoms.get_args())
        return capsys.readouterr().out

    return run


def test_experiments_are_joined(tmp_path, join):
    """Three networks of each arm; random network 0 is in both files and counts once."""
    common = {'unit': 'ms', 'predicted': 3.0, 'counts': True}
    days = (
        [('full', 0, 2.0), ('full', 1, 3.0), ('random', 0, 1.0), ('random', 2, 2.0)],
        [('full', 2, 4.0), ('random', 0, 9.0), ('random', 1, 3.0)],
    )
    files = [tmp_path / f'{number}.jsonl' for number in range(2)]
    for path, day in zip(files, days, strict=True):
        results = [{'arm': arm, 'seed': seed, 'top1': top1} | common for arm, seed, top1 in day]
        path.write_text(''.join(json.dumps(result) + '\n' for result in results))

    table = join(files)
    assert f'left out: random-0 of {files[1]}' in table
    assert '| full | 3 | 3.00 ± 2.48 |' in table
    assert '| random | 3 | 2.00 ± 2.48 | -1.00 (-3.27 to +1.27) | 0.288 |' in table
    assert (tmp_path / 'both' / 'three_freedoms.png').stat().st_size > 10_000
    line = {'arm': 'full', 'seed': 0, 'top1': 2.0} | common
    lengths = json.dumps(line | {'entropy': [1, 1]}) + '\n' + json.dumps(line | {'seed': 4, 'entropy': [1]})
    for text, message in (
        (json.dumps(line | {'unit': 'M'}), "expected one unit, found ['M', 'ms']"),
        (lengths, 'expected one length of searches in epochs, found [1, 2]'),
        ('{"arm": "full"}', 'not a results.jsonl'),
    ):
        files[0].write_text(text)
        with pytest.raises(BadInput, match=re.escape(message)):
            join(files)


def test_the_evidence_gives_the_table_of_the_page(join):
    page = (ROOT / 'experiments' / 'README.md').read_text().partition('\n## ')[0]
    path = ROOT / 'experiments' / 'evidence' / 'preregistered.jsonl'
    printed = join([path])
    found = {arm: cells.split(' | ') for arm, cells in re.findall(r'^\| ([\w-]+) \| (.*) \|$', printed, re.M)}
    shown = {arm: cells.split(' | ') for arm, cells in re.findall(r'^\| ([\w-]+): .*? \| (.*) \|$', page, re.M)}
    assert list(shown) == [arm for arm in found if arm not in ('arm', '---')] and len(shown) == 8
    for arm, cells in shown.items():
        assert cells == [found[arm][i] for i in (0, 1, 2, 3, 9, 13, 14, 15)]
    runs = [json.loads(line) for line in path.read_text().splitlines()]
    full, drawn = ([run['top1'] for run in runs if run['arm'] == arm] for arm in ('full', 'random'))
    assert difference(full, drawn).replace(' (', ' points (') in page


@pytest.fixture
def printed_by(monkeypatch, capsys):
    """Return a function that runs a program of the experiments in this process and returns what it prints."""

    def run(program, *words):
        monkeypatch.setattr(sys, 'argv', [program.__name__, *map(str, words)])
        program.main(program.get_args())
        return capsys.readouterr().out

    return run


def test_the_evidence_gives_the_figures_of_the_follow_up(printed_by):
    evidence = ROOT / 'experiments' / 'evidence'
    page = ' '.join((ROOT / 'experiments' / 'README.md').read_text().partition('\n# Appendix')[0].split())
    printed = printed_by(repeated, evidence / 'follow_up.jsonl', '--first', evidence / 'preregistered.jsonl')
    assert printed.startswith('20 networks, 2 trainings each')
    for pattern in (
        r'F = [\d.]+',
        r'p = [\d.]+\)',
        r'[\d.]+ \([\d.]+ to [\d.]+',
        r'(?<=of trainings )[\d.]+',
        r'(?<=mean )0\.\d+',
        r'(?<=training and mean: )rho = \S+ \(p = [\d.]+',
        r'(?<=supernets and mean: )rho = \S+ \(p = [\d.]+',
        r'(?<=90% against 10%: ).*',
    ):
        (found,) = re.findall(pattern, printed)[:1]
        assert found in page, found


def test_the_evidence_gives_the_figures_of_the_second_follow_up(printed_by):
    evidence = ROOT / 'experiments' / 'evidence'
    page = ' '.join((ROOT / 'experiments' / 'README.md').read_text().partition('\n# Programs')[0].split())
    results = evidence / 'second_follow_up.jsonl'
    printed = printed_by(choices, results, '--random', evidence / 'preregistered.jsonl')
    for arm in ('full', 'settled'):
        text = printed[printed.index(f'{arm}: ') :]
        margin, ends = re.search(r'runner-ups \+([\d.]+) (\(.*?\))', text).groups()
        assert f'The choice is {margin} points better than its runner-ups' in page and ends in page
        for pattern in (r'better than \d+ % of \d+', r'\d+ % of the blocks', r'(?<=entropy )0\.\d+'):
            assert re.search(pattern, text)[0] in page
    of_all = re.search(r'10 seeds: margin \+(.*)', printed)[1]
    alone = re.findall(r'alone, against random: (.*)', printed)[1].replace(' (', ' points (')
    assert f'It is {of_all}'.replace(' (', ' more than `full` (') in page and f'against random ones {alone}' in page
    settled = [r['top1'] for r in map(json.loads, results.read_text().splitlines()) if r['arm'] == 'settled']
    assert f'its networks have {statistics.mean(settled):.2f} %' in page


def test_the_page_is_short_enough_to_be_read():
    page = (ROOT / 'experiments' / 'README.md').read_text().partition('\n# Programs')[0]
    assert len([word for line in page.splitlines() if not line.startswith('|') for word in line.split()]) <= 800


def test_the_evidence_gives_the_figures_of_the_appendix(join):
    appendix = (ROOT / 'experiments' / 'README.md').read_text().partition('\n# Appendix')[2]
    names = 'demo_second', 'demo_first', 'demo_annealed'
    printed = join(ROOT / 'experiments' / 'evidence' / f'{name}.jsonl' for name in names)
    assert printed.count('rho = -0.29 (p = 0.49, n = 8)') == 2 and 'rho = -0.29 (p = 0.49, n = 8)' in appendix
    found = {arm: cells.split(' | ') for arm, cells in re.findall(r'^\| ([\w-]+) \| (.*) \|$', printed, re.M)}
    for arm in ('full', 'no-operator', 'no-depth', 'no-width', 'random'):
        n, top1 = found[arm][:2]
        assert re.search(rf'{re.escape(top1)} (% )?\((n = )?{n}\)', appendix), (arm, n, top1)


def test_the_arm_without_depth_needs_the_patch(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['three_freedoms.py', '--arms', 'depth'])
    with pytest.raises(SystemExit) as ended:
        three_freedoms.get_args()
    message = capsys.readouterr().err
    assert ended.value.code == 2 and message.count('\n') == 1
    assert "'depth' needs a copy of the project with experiments/no_depth.patch applied" in message


def apply(*names, to):
    """Apply patches to a copy of the project."""
    for name in names:
        text = (to / 'experiments' / name).read_text()
        done = subprocess.run(['patch', '-p1'], cwd=to, input=text, text=True, capture_output=True)
        assert done.returncode == 0, f'{name}: {done.stdout}'


@pytest.mark.parametrize('names', [['no_depth.patch'], ['small_space.patch', 'no_depth.patch']], ids=len)
def test_patches_apply(project_copy, names):
    apply(*names, to=project_copy)


def test_a_step_that_fails_stops_those_beside_it(tmp_path, monkeypatch):
    """Three runs, two at a time: one waits for a signal, one fails, one is never begun."""
    waits = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit('told')); time.sleep(60)"
    codes = {'waits': waits, 'fails': 'import time; time.sleep(1); import none', 'later': "print('done')"}

    def follow(run, _, scripts, args):
        scripts.once(Path(args.save) / run, 'step', ['-c', codes[run]], 'done')

    monkeypatch.setattr(three_freedoms, 'follow', follow)
    monkeypatch.setattr(three_freedoms, 'report', lambda *_: None)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    start = time.monotonic()
    try:
        with pytest.raises(BadInput, match="fails: step ended with 1: ModuleNotFoundError: No module named 'none'"):
            args = Namespace(jobs=2, save=tmp_path)
            three_freedoms.follow_all(list(codes), None, three_freedoms.Scripts(2), args)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert time.monotonic() - start < 30
    record = json.loads((tmp_path / 'waits' / 'step.json').read_text())
    assert not record['finished'] and (tmp_path / 'waits' / 'step.err').read_text() == 'told\n'
    assert not (tmp_path / 'later' / 'step.json').exists()


def test_a_step_counts_if_the_same_command_ended_well(tmp_path):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        scripts, marker = three_freedoms.Scripts(1), tmp_path / 'marker'
        code = f"import os, sys; print('done', flush=True); sys.exit(not os.path.exists({str(marker)!r}))"
        with pytest.raises(BadInput, match='step ended with 1'):
            scripts.once(tmp_path, 'step', ['-c', code], 'done')
        marker.touch()
        assert scripts.once(tmp_path, 'step', ['-c', code], 'done')['finished']
        with pytest.raises(BadInput, match='of another command; give its flags, or another --save'):
            scripts.once(tmp_path, 'step', ['-c', code, '--epochs', 9], 'done')
        table = tmp_path / 'table.pkl'
        table.write_bytes(b'1')
        for _ in range(2):
            three_freedoms.check_table(tmp_path / 'table.sha256', table)
        table.write_bytes(b'2')
        with pytest.raises(BadInput, match='begun with another table'):
            three_freedoms.check_table(tmp_path / 'table.sha256', table)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize('printed', ['Lat_CPU bs=1: 4.2 ms', 'Lat_GPU bs=32 onnxruntime: 4.2 ms', 'Lat_LUT: 4.2 ms'])
def test_a_network_is_measured_on_any_device(printed, tmp_path, monkeypatch):
    monkeypatch.setattr(signal, 'signal', lambda *_: None)
    run, scripts = Run('random', 0, '4', None), three_freedoms.Scripts(1)
    monkeypatch.setattr(
        scripts, '_run', lambda words, errors, name: (errors.write_text(''), f'Config: x\n{printed}', 0.0)
    )
    args = Namespace(save=tmp_path, measured_rounds=1, num_classes=3, img_size=32, device='auto', lookup_path='x')
    if 'LUT' in printed:
        with pytest.raises(BadInput, match='did not print'):
            three_freedoms.measure([run], scripts, args)
    else:
        three_freedoms.measure([run], scripts, args)
    assert json.loads((tmp_path / run.name / 'measure-1.json').read_text())['finished'] == ('LUT' not in printed)


def test_results_are_read_from_what_the_steps_printed(tmp_path):
    """A search that was killed before its first model has left a folder; another runtime is named beside the batch. Of
    several batch sizes, the first is the table's."""
    run, table = Run('full', 0, '4'), make_table(img_size=32)
    folder, paths = tmp_path / run.name, 'm: supernet top1 {}\na: supernet top1 2\n'
    outputs = {
        'search': '', 'parse': 'Lat_LUT: 4.1\nFLOPs: 5 M\nParams: 6', 'train': '', 'test': 'top1: 70.5',
        'measure-1': 'Lat_LUT: 4.1 ms\nLat_CPU bs=8 onnxruntime: 4.2 ms\nLat_CPU bs=1 onnxruntime: 0.9 ms',
        'measure-2': 'Lat_CPU bs=8 onnxruntime: 4.4 ms',
        'paths-1': paths.format(7), 'paths-2': paths.format(8) + 'b: supernet top1 3',
    }  # fmt: skip
    folder.mkdir()
    for name, output in outputs.items():
        record = {'output': output, 'finished': True, 'wall_s': 1.0, 'cpu_s': 1.0}
        (folder / f'{name}.json').write_text(json.dumps(record))
    lines = [{'kind': 'run', 'version': VERSION}]
    lines += [{'kind': 'epoch', 'epoch': i, 'ops': [[0.5, 0.5]], 'val': {'top1': 30.0 + i}} for i in range(2)]
    for name in ('a', 'b'):
        (folder / 'search' / name).mkdir(parents=True)
        (folder / 'search' / name / 'metrics.jsonl').write_text('')
    (folder / 'search' / 'b' / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    (folder / 'search' / 'b' / 'searched_model_02.pth.tar').touch()
    (folder / 'train' / 'a').mkdir(parents=True)
    lines[-1]['val']['loss'] = 0.7
    (folder / 'train' / 'a' / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    (folder / 'train' / 'a' / 'checkpoint.pth.tar').touch()
    result = result_of(run, Namespace(save=tmp_path, warmup_epochs=1, num_classes=3), table)
    assert (result['measured'], result['top1'], result['predicted']) == (pytest.approx(4.3), 70.5, 4.1)
    assert result['test_loss'] == 0.7
    assert (result['own_path_top1'], result['path_top1']) == (8, [2, 3])
    assert (result['supernet_top1'], result['supernet_top1_end'], result['entropy']) == (30, 31, [1, 1])


def driver_words(images, folder, table):
    """Return a command of the driver at the smallest sizes; its test images are half of the validation images."""
    lines = (images / 'val.txt').read_text().splitlines()
    (folder / 'val.txt').write_text('\n'.join(lines[:8]) + '\n')
    (folder / 'test.txt').write_text('\n'.join(lines[8:]) + '\n')
    return [
        'experiments/three_freedoms.py', '--img_root', images, '--train_list', images / 'train.txt', '--val_list',
        folder / 'val.txt', '--lookup_path', table, '--save', folder / 'evidence', *SIZE, '--seeds', '0',
        '--random_networks', '3', '--more_targets', '30%', '--batch_size', '4', '--epochs', '2', '--warmup_epochs', '1',
        '--train_epochs', '1', '--train_batch_size', '8', '--workers', '0', '--measured_rounds', '1',
    ]  # fmt: skip


@pytest.mark.slow
def test_all_arms_run_stop_and_go_on(project_copy, images, tmp_path, run_script):
    apply('small_space.patch', to=project_copy)
    table, save = tmp_path / 'flops.pkl', tmp_path / 'evidence'
    run_script('latency_pkl/make_lat_lut.py', '--metric', 'flops', *SIZE, '--save_path', table, cwd=project_copy)
    words = [*driver_words(images, tmp_path, table), '--search_flags=--aligned_start']
    wrong = run_script(*words, '--test_list', images / 'val.txt', code=2, cwd=project_copy).stderr
    assert 'has images of the search' in wrong
    words += ['--test_list', tmp_path / 'test.txt', '--jobs', '2']
    plan = run_script(*words, '--plan', cwd=project_copy).stdout
    assert '4 searches of' in plan and '7 trainings of' in plan and 'hours' in plan
    command = [sys.executable, '-u', *map(str, words)]
    running = subprocess.Popen(command, cwd=project_copy, stdout=subprocess.PIPE, text=True)
    for line in running.stdout:
        if 'no-width-0 search' in line:
            running.terminate()
    assert running.wait() == 0 and not (save / 'no-width-0' / 'model.config').exists()
    steps = {path: path.read_bytes() for path in save.glob('*/*.json')}
    finished = {path: text for path, text in steps.items() if b'"finished": true' in text}
    assert len(finished) > 4
    done = run_script('-u', *words, cwd=project_copy).stdout
    for path, text in finished.items():
        assert path.read_bytes() == text and f'{path.parent.name} {path.stem}' not in done
    results = [json.loads(line) for line in (save / 'results.jsonl').read_text().splitlines()]
    assert [r['arm'] for r in results] == [
        'full', 'no-operator', 'no-width', 'random', 'random', 'random', 'full-at-30pc',
    ]  # fmt: skip
    for r in results:
        assert 0 <= r['top1'] <= 100 and 'top5' not in r  # of three classes
        assert r['macs'] == pytest.approx(r['predicted'], abs=0.006)
        assert r['measured'] > 0 and (abs(r['off_target']) < 1 or r['arm'] == 'no-width')
    assert all(len(r['entropy']) == 2 and r['entropy'][0] == pytest.approx(1) for r in results if 'entropy' in r)
    assert len(results[0]['path_top1']) == 3 and 'own_path_top1' in results[0]
    assert 'path_top1' not in results[1]
    text = (save / 'table.md').read_text()
    assert re.search(r'^\| random \| 3 \|', text, re.M) and text.count('\n|') == 6 and 'rho' in text
    assert (save / 'three_freedoms.png').stat().st_size > 10_000
    again = run_script(*words, cwd=project_copy).stdout
    assert not re.search(r'^\d\d:\d\d:\d\d ', again, re.M)  # nothing left to do


@pytest.mark.slow
def test_searches_without_depth(project_copy, images, tmp_path, run_script):
    """A copy with both patches, a target that leaves little beside skip, and architecture steps that can go far."""
    table, save = tmp_path / 'flops.pkl', tmp_path / 'evidence' / 'no-depth-0'
    apply('small_space.patch', to=project_copy)
    run_script('latency_pkl/make_lat_lut.py', '--metric', 'flops', *SIZE, '--save_path', table, cwd=project_copy)
    apply('no_depth.patch', to=project_copy)
    run_script('-m', 'pytest', '-q', 'experiments/no_depth_checks.py', cwd=project_copy)
    words = [*driver_words(images, tmp_path, table), '--test_list', tmp_path / 'test.txt', '--target_lat', '20%']
    wrong = run_script(*words, '--arms', 'full', code=2, cwd=project_copy).stderr
    assert "'full' should be one of depth in this copy of the project" in wrong
    run_script(*words, '--search_flags=--a_lr 2 --lambda_lat 100', cwd=project_copy)
    (result,) = [json.loads(line) for line in (tmp_path / 'evidence' / 'results.jsonl').read_text().splitlines()]
    assert result['arm'] == 'no-depth' and -1 < result['off_target'] <= 0 and result['measured'] > 0

    (searched,) = save.glob('search/*/searched_model_02.pth.tar')
    log = (searched.parent / 'log.txt').read_text()
    assert len(re.findall(r'stage\d exits 1.0000$', log, re.M)) == 6 == log.count(' exits ')
    found = re.findall(r'(stage\d\.\d) ops ([\d. ]+)$', log, re.M)
    with_residual = [f'stage{i}.2' for i in range(2, 6)]
    assert len(found) == 10
    assert all(len(values.split()) == 4 + (block in with_residual) for block, values in found)
    assert {'network.png', 'operators.png', 'depth.png'} <= {p.name for p in (searched.parent / 'plots').iterdir()}
    assert 'no pictures' not in log and (searched.parent / 'report.html').exists()

    checkpoint = torch.load(searched, weights_only=True)
    del checkpoint[ARCH_KEY]  # parsed by argmax, as published checkpoints are
    torch.save(checkpoint, tmp_path / 'published.pth.tar')
    state = checkpoint['state_dict']
    alphas = {block: state[f'module.{block.replace(".", ".block")}.log_alphas'] for block in with_residual}
    skipped = [block for block in with_residual if alphas[block].argmax() == 4]
    words = ['parsing_model.py', '--model_path', tmp_path / 'published.pth.tar', '--save_path']
    words += [tmp_path / 'argmax.config', *SIZE]
    run_script(*words, cwd=project_copy)
    depths = {name: len(blocks) for name, blocks in load_config(tmp_path / 'argmax.config').stages.items()}
    kept = [name for name, _ in found if name not in skipped]
    assert skipped and depths == {f'stage{i}': sum(name[5] == str(i) for name in kept) for i in range(1, 7)}
    fitted = load_config(save / 'model.config').stages
    assert all(fitted.values()) and sum(map(len, fitted.values())) < 10


def test_the_spread_of_networks_by_hand():
    """Means 1, 3, 8 with two trainings each: between 13, times two; within 2, 2, 8 on average 4."""
    top1 = np.array([[0.0, 2.0], [2.0, 4.0], [6.0, 10.0]])
    found = repeated.spread(top1)
    expected = stats.f_oneway(*top1)
    assert found.statistic == pytest.approx(expected.statistic) == pytest.approx(2 * 13 / 4)
    assert found.p == pytest.approx(expected.pvalue)
    assert found.trainings == 2 and found.networks == pytest.approx(((26 - 4) / 2) ** 0.5)
    assert found.reliability == pytest.approx(11 / 13)
    # quantiles of F with 2 and 3 degrees of freedom: 16.0441 and 0.0255 (1 / 39.1655)
    assert (found.low, found.high) == (0, pytest.approx((4 * (6.5 * 39.1655 - 1) / 2) ** 0.5, rel=1e-4))


def test_the_interval_of_the_networks_deviation_has_its_share():
    """Of 400 drawn experiments with deviations of 1 and 2, 95 % have 1 within the interval."""
    rng = np.random.default_rng(0)
    drawn = (rng.normal(0, 1, (20, 1)) + rng.normal(0, 2, (20, 3)) for _ in range(400))
    inside = [spread.low <= 1 <= spread.high for spread in map(repeated.spread, drawn)]
    assert 0.92 < np.mean(inside) < 0.98


def test_repeated_trainings_are_compared(tmp_path, printed_by):
    common = {'arm': 'random', 'unit': 'ms', 'predicted': 3.0}
    first = [common | {'seed': seed, 'top1': 10.0 * seed} for seed in range(4)]
    first += [common | {'arm': 'full', 'seed': seed, 'top1': 0.0, 'path_top1': [4, 3, 2, 1]} for seed in range(2)]
    again = [common | {'seed': i, 'train_seed': s, 'at': '50%', 'top1': i + s} for i in range(4) for s in (0.0, 0.5)]
    again += [common | {'seed': i, 'train_seed': 0, 'at': at, 'top1': i + add} for i in range(3) for at, add in
              (('90%', 2), ('10%', 1))]  # fmt: skip

    def run(lines):
        for name, results in (('first', first), ('again', lines)):
            (tmp_path / name).write_text(''.join(json.dumps(result) + '\n' for result in results))
        return printed_by(repeated, tmp_path / 'again', '--first', tmp_path / 'first').splitlines()

    printed = run(again)
    assert printed[0].startswith('4 networks, 2 trainings each: F = 26.67 (p = 0.004)')
    assert printed[2:] == [
        'first training and mean: rho = +1.00 (p = 0.00, n = 4)',
        'mean of 2 supernets and mean: rho = -1.00 (p = 0.00, n = 4)',
        '90% against 10%: +1.00 (-1.27 to +3.27)',
    ]
    with pytest.raises(BadInput, match=r'as many trainings of each network, two or more; found \[1, 2\]'):
        run(again[1:])
    with pytest.raises(BadInput, match="'at' is None in a line, should be a target such as 50%"):
        run([*again, first[0]])
    with pytest.raises(BadInput, match=r'has no random networks \[9\], which'):
        run([line | {'seed': 9} if line['seed'] == 3 else line for line in again])


def test_choices_are_compared_with_their_runner_ups(tmp_path, printed_by):
    def line(arm, seed, choice, others, changed):
        found = {'choice_test_top1': choice, 'runner_up_test_top1': others, 'changed': [[9, 9], changed]}
        return {
            'arm': arm,
            'seed': seed,
            'unit': 'ms',
            'predicted': 3.0,
            'top1': 5.0 + seed,
            'entropy': [1, 0.5],
        } | found

    searches = [line('full', seed, 10.0, [8.0, 10.0 + seed], [1, 4]) for seed in (0, 1, 2)]  # margins 1, 0.5, 0
    searches += [line('settled', seed, 12.0, [10.0], [seed, 5]) for seed in (2, 1, 0)]  # 2
    drawn = [{'arm': 'random', 'seed': seed, 'unit': 'ms', 'predicted': 3.0, 'top1': 4.0 + seed} for seed in range(3)]

    def run():
        for name, results in (('searches', searches), ('drawn', drawn)):
            (tmp_path / name).write_text(''.join(json.dumps(result) + '\n' for result in results))
        return printed_by(choices, tmp_path / 'searches', '--random', tmp_path / 'drawn').splitlines()

    # t(0.975, 2) = 4.3027, standard deviation 0.5: half width 1.2421
    assert run() == [
        'full: choice against runner-ups +0.50 (-0.74 to +1.74), n = 3; better than 50 % of 6',
        '  25 % of the blocks changed in the last epoch; entropy 0.50',
        '  trained alone, against random: +1.00 (-1.27 to +3.27)',
        'settled: choice against runner-ups +2.00 (+2.00 to +2.00), n = 3; better than 100 % of 3',
        '  20 % of the blocks changed in the last epoch; entropy 0.50',
        '  trained alone, against random: +1.00 (-1.27 to +3.27)',
        'settled against full, 3 seeds: margin +1.50 (+0.26 to +2.74)',
    ]
    del searches[4]['changed']
    with pytest.raises(BadInput, match='searches: a line has no changed'):
        run()


@pytest.mark.parametrize(('seed', 'share', 'without'), [(5, 0.8, 2), (7, 0.5, 0)])
def test_runner_ups_differ_in_one_block_and_meet_the_same_latency(monkeypatch, seed, share, without):
    """`without`: blocks that have no other operator that can."""
    monkeypatch.setattr(path_accuracy, 'SPACE', SMALL_SPACE)
    table, state = make_table(SMALL_SPACE, 32, base=0.1), random_state(SMALL_SPACE, seed)
    arch = parse_architecture(state, SMALL_SPACE)
    least, most = latency_range(arch, table, SMALL_SPACE)
    widths = fit_widths(arch, SMALL_SPACE.start_widths(), table, SMALL_SPACE, least + share * (most - least))
    found = {'arch': arch, 'widths': widths}
    target, networks = table.total(*found.values(), SMALL_SPACE), path_accuracy.runner_ups(found, state, table)
    places = [(stage, place) for stage, ops in arch.items() for place in range(len(ops))]
    assert len(places) == 4 and len(networks) == len(places) - without
    for label, network in networks.items():
        (changed,) = [(s, i) for s, i in places if network['arch'][s][i] != arch[s][i]]
        stage, place = changed
        block = f'{stage}.block{place + 1}'
        op = network['arch'][stage][place]
        assert label == f'{block} {SMALL_SPACE.ops[op].label}'
        assert table.total(*network.values(), SMALL_SPACE) == pytest.approx(target, rel=0.02)
        for other in set(range(3)) - {op, arch[stage][place]}:
            more_probable = state[f'{block}.log_alphas'][other] > state[f'{block}.log_alphas'][op]
            if more_probable:
                swapped = arch | {stage: [*arch[stage][:place], other, *arch[stage][place + 1 :]]}
                least, most = latency_range(swapped, table, SMALL_SPACE)
                assert not least <= target <= most


def test_a_drawn_network_is_parsed_and_has_its_predicted_latency(tmp_path, monkeypatch):
    """The step counts as finished by what the parser prints."""
    table = make_table(img_size=32)
    save_table(table.base, table.curves, {'unit': 'ms'}, tmp_path / 'table.pkl')
    args = Namespace(num_classes=10, img_size=32, device='cpu', lookup_path=tmp_path / 'table.pkl')
    monkeypatch.setattr(signal, 'signal', lambda *_: None)
    run = Run('random', 3, '50%', None)
    three_freedoms.find_network(run, tmp_path / 'random-3', table, three_freedoms.Scripts(1), args)
    printed = json.loads((tmp_path / 'random-3' / 'parse.json').read_text())['output']
    predicted = read_numbers(printed, ms=r'Lat_LUT: ([\d.]+)')['ms']
    assert predicted == pytest.approx(table.target('50%', SPACE), rel=0.002)
    written, drawn = (load_config(tmp_path / 'random-3' / f'{name}.config') for name in ('model', 'drawn'))
    assert written.stages == drawn.stages
