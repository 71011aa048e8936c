"""The evidence driver from the shell, with all arms, in a small space at the smallest sizes; and what it computes."""

import json
import re
import subprocess
import sys

import pytest

from benchmarks.freedoms_results import difference, interval, read_numbers


def test_intervals_by_hand():
    # mean 2, standard deviation 1, t(0.975, 2) = 4.3027: half width 4.3027 / sqrt(3) = 2.4841
    assert interval([1.0, 2.0, 3.0]) == '2.00 ± 2.48'
    assert interval([5.0]) == '5.00 (n = 1)' and interval([]) == ''
    # equal variances and sizes: 4 degrees of freedom, t = 2.7764, standard error sqrt(2 / 3): 2.2669
    assert difference([2.0, 3.0, 4.0], [1.0, 2.0, 3.0]) == '+1.00 (-1.27 to +3.27)'


def test_last_number_counts():
    assert read_numbers('top1: 3.5 x\ntop1: 4.25', top1=r'top1: ([\d.]+)', lost=r'top9: ([\d.]+)') == {'top1': 4.25}


def test_experiments_are_put_together(tmp_path, run_script):
    common = {'unit': 'ms', 'predicted': 3.0, 'counts': True}
    days = (
        [('full', 0, 2.0), ('full', 1, 3.0), ('random', 0, 1.0)],
        [('full', 2, 4.0), ('random', 0, 2.0), ('random', 1, 3.0)],
    )
    files = []
    for number, day in enumerate(days):
        files.append(tmp_path / f'{number}.jsonl')
        results = [{'arm': arm, 'seed': seed, 'top1': top1} | common for arm, seed, top1 in day]
        files[-1].write_text(''.join(json.dumps(result) + '\n' for result in results))
    words = ['benchmarks/freedoms_results.py', *files, '--save', tmp_path / 'both']
    table = run_script(*words).stdout
    assert '| full | 3 | 3.00 ± 2.48 |' in table and '| random | 3 | 2.00 ± 2.48 | -1.00 (-3.27 to +1.27) |' in table
    assert (tmp_path / 'both' / 'three_freedoms.png').stat().st_size > 10_000
    files[0].write_text(json.dumps({'arm': 'full', 'seed': 0, 'top1': 2.0} | common | {'unit': 'M multiply-adds'}))
    assert "found ['M multiply-adds', 'ms']" in run_script(*words, code=2).stderr
    files[0].write_text('{"arm": "full"}')
    assert 'not a results.jsonl' in run_script(*words, code=2).stderr


@pytest.mark.slow
def test_all_arms_run_stop_and_go_on(project_copy, images, tmp_path, run_script):
    patch = (project_copy / 'benchmarks' / 'small_space.patch').read_text()
    subprocess.run(['patch', '-p1'], cwd=project_copy, input=patch, text=True, check=True, capture_output=True)
    size = ['--img_size', '32', '--num_classes', '3']
    table, save = tmp_path / 'flops.pkl', tmp_path / 'evidence'
    run_script('latency_pkl/make_lat_lut.py', '--metric', 'flops', *size, '--save_path', table, cwd=project_copy)
    lines = (images / 'val.txt').read_text().splitlines()
    (tmp_path / 'val.txt').write_text('\n'.join(lines[:8]) + '\n')
    (tmp_path / 'test.txt').write_text('\n'.join(lines[8:]) + '\n')
    words = [
        'benchmarks/three_freedoms.py', '--img_root', images, '--train_list', images / 'train.txt', '--val_list',
        tmp_path / 'val.txt', '--lookup_path', table, '--save', save, *size, '--seeds', '0', '--random_networks', '3',
        '--more_targets', '30%', '--batch_size', '4', '--epochs', '2', '--warmup_epochs', '1', '--train_epochs', '1',
        '--train_batch_size', '8', '--workers', '0', '--measured_rounds', '1', '--search_flags=--aligned_start',
    ]  # fmt: skip
    wrong = run_script(*words, '--test_list', images / 'val.txt', code=2, cwd=project_copy).stderr
    assert 'has images of the search' in wrong
    words += ['--test_list', tmp_path / 'test.txt', '--jobs', '2']
    plan = run_script(*words, '--plan', cwd=project_copy).stdout
    assert '5 searches of' in plan and '8 trainings of' in plan and 'hours' in plan
    command = [sys.executable, '-u', *map(str, words)]
    running = subprocess.Popen(command, cwd=project_copy, stdout=subprocess.PIPE, text=True)
    for line in running.stdout:
        if 'no-depth-0 search' in line:
            running.terminate()
    assert running.wait() == 0 and not (save / 'no-depth-0' / 'model.config').exists()
    steps = {path: path.read_bytes() for path in save.glob('*/*.json')}
    finished = {path: text for path, text in steps.items() if b'"finished": true' in text}
    assert len(finished) > 4
    done = subprocess.run(command, cwd=project_copy, capture_output=True, text=True, check=True).stdout
    for path, text in finished.items():
        assert path.read_bytes() == text and f'{path.parent.name} {path.stem}' not in done
    results = [json.loads(line) for line in (save / 'results.jsonl').read_text().splitlines()]
    assert [r['arm'] for r in results] == [
        'full', 'no-operator', 'no-depth', 'no-width', 'random', 'random', 'random', 'full-at-30pc',
    ]  # fmt: skip
    for r in results:
        assert 0 <= r['top1'] <= r['top5'] == 100 and r['macs'] == pytest.approx(r['predicted'], abs=0.006)
        assert r['measured'] > 0 and (abs(r['off_target']) < 1 or r['arm'] == 'no-width')
    assert all(len(r['entropy']) == 2 and r['entropy'][0] == pytest.approx(1) for r in results if 'entropy' in r)
    assert len(results[0]['path_top1']) == 3 and 'path_top1' not in results[1]
    text = (save / 'table.md').read_text()
    assert re.search(r'^\| random \| 3 \|', text, re.M) and text.count('\n|') == 7 and 'rho' in text
    assert (save / 'three_freedoms.png').stat().st_size > 10_000
    again = run_script(*words, cwd=project_copy).stdout
    assert not re.search(r'^\d\d:\d\d:\d\d ', again, re.M)  # nothing left to do
