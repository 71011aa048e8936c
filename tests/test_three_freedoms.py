"""The evidence driver from the shell, with all arms, in a small space at the smallest sizes; and what it computes."""

import json
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

from experiments import join as join_freedoms
from experiments import three_freedoms
from experiments.results import difference, interval, read_numbers
from tools.errors import BadInput


def test_intervals_by_hand():
    # mean 2, standard deviation 1, t(0.975, 2) = 4.3027: half width 4.3027 / sqrt(3) = 2.4841
    assert interval([1.0, 2.0, 3.0]) == '2.00 ± 2.48'
    assert interval([5.0]) == '5.00 (n = 1)' and interval([]) == ''
    # equal variances and sizes: 4 degrees of freedom, t = 2.7764, standard error sqrt(2 / 3): 2.2669
    assert difference([2.0, 3.0, 4.0], [1.0, 2.0, 3.0]) == '+1.00 (-1.27 to +3.27)'


def test_last_number_counts():
    assert read_numbers('top1: 3.5 x\ntop1: 4.25', top1=r'top1: ([\d.]+)', lost=r'top9: ([\d.]+)') == {'top1': 4.25}


def test_experiments_are_put_together(tmp_path, monkeypatch, capsys):
    """Of three networks of each arm; random network 0 is the same one in both and counts once."""
    common = {'unit': 'ms', 'predicted': 3.0, 'counts': True}
    days = (
        [('full', 0, 2.0), ('full', 1, 3.0), ('random', 0, 1.0), ('random', 2, 2.0)],
        [('full', 2, 4.0), ('random', 0, 9.0), ('random', 1, 3.0)],
    )
    files = [tmp_path / f'{number}.jsonl' for number in range(2)]
    for path, day in zip(files, days, strict=True):
        results = [{'arm': arm, 'seed': seed, 'top1': top1} | common for arm, seed, top1 in day]
        path.write_text(''.join(json.dumps(result) + '\n' for result in results))

    def join():
        monkeypatch.setattr(sys, 'argv', ['join_freedoms.py', *map(str, files), '--save', str(tmp_path / 'both')])
        join_freedoms.main(join_freedoms.get_args())
        return capsys.readouterr().out

    table = join()
    assert f'left out: random-0 of {files[1]}' in table
    assert '| full | 3 | 3.00 ± 2.48 |' in table and '| random | 3 | 2.00 ± 2.48 | -1.00 (-3.27 to +1.27) |' in table
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
            join()


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


@pytest.mark.slow
def test_all_arms_run_stop_and_go_on(project_copy, images, tmp_path, run_script):
    patch = (project_copy / 'experiments' / 'small_space.patch').read_text()
    subprocess.run(['patch', '-p1'], cwd=project_copy, input=patch, text=True, check=True, capture_output=True)
    size = ['--img_size', '32', '--num_classes', '3']
    table, save = tmp_path / 'flops.pkl', tmp_path / 'evidence'
    run_script('latency_pkl/make_lat_lut.py', '--metric', 'flops', *size, '--save_path', table, cwd=project_copy)
    lines = (images / 'val.txt').read_text().splitlines()
    (tmp_path / 'val.txt').write_text('\n'.join(lines[:8]) + '\n')
    (tmp_path / 'test.txt').write_text('\n'.join(lines[8:]) + '\n')
    words = [
        'experiments/three_freedoms.py', '--img_root', images, '--train_list', images / 'train.txt', '--val_list',
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
