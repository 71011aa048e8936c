"""What a person sees of a run: the log, called from Python as in a notebook; several runs in one process."""

import logging
import os
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from training_runs import CLASSES, data, flags, small_config

import train_eval
import train_search
from conftest import SMALL_SPACE, make_table
from latency_pkl import make_lat_lut
from latency_pkl.sampling import build_network
from latency_pkl.timing import measure_latency
from models.describe import architecture_line, epoch_line
from models.latency import load_table, save_table, warn_of_errors
from models.search_space import SPACE
from tools.run import METRICS, RunLogger, _lock, read_run
from tools.training import warn_of_chance

__all__ = ['data']


@pytest.fixture
def small_search(data, tmp_path, monkeypatch):  # noqa: F811
    """Function that runs a search of the small space in this process, with more flags, and returns its run folder."""
    monkeypatch.setattr(train_search, 'SPACE', SMALL_SPACE)
    table = make_table(SMALL_SPACE, 32)
    save_table(table.base, table.curves, {'unit': 'ms', 'device': 'made up'}, tmp_path / 'table.pkl')

    def run(*more):
        words = f'--img-size 32 --batch-size 4 --workers 0 --print-freq 5 --device cpu --num-classes {CLASSES}'.split()
        words += ['--img-root', data, '--train-list', data / 'train.txt', '--val-list', data / 'val.txt']
        words += ['--lookup-path', tmp_path / 'table.pkl', '--target-lat', '50%', '--save', tmp_path / 'runs']
        assert train_search.main(train_search.get_args([*map(str, words), '--warmup-epochs', '1', *more])) == 0
        return max((tmp_path / 'runs').iterdir(), key=lambda folder: folder.stat().st_mtime_ns)

    return run


def open_files(folder):
    """Files of a folder that this process has open."""
    links = [f'/proc/self/fd/{number}' for number in os.listdir('/proc/self/fd')]
    return [os.readlink(link) for link in links if os.path.exists(link) and os.readlink(link).startswith(str(folder))]


def test_two_searches_and_a_training_in_one_process(small_search, data, tmp_path, capsys):  # noqa: F811
    first = small_search('--epochs', '2', '--no-report', '--note', 'one')
    out = capsys.readouterr().out
    second = small_search('--epochs', '2', '--no-report', '--note', 'two')
    assert first.name != second.name and read_run(first).of('end') and open_files(tmp_path) == []
    again = capsys.readouterr().out
    assert out.count('\n') == again.count('\n')  # a second log handler would double the lines
    assert [line['w_loss'] for line in read_run(first).of('step')] == [
        line['w_loss'] for line in read_run(second).of('step')
    ]
    words = [str(word) for word in flags(data, tmp_path / 'runs', epochs=1)]
    assert train_eval.main(train_eval.get_args(words)) == 0 and open_files(tmp_path) == []

    log = (first / 'log.txt').read_text()
    rows = re.findall(r'(stage\d\.\d) ops [\d. ]+$', log, re.MULTILINE)
    assert rows == ['stage1.1', 'stage2.1', 'stage2.2', 'stage3.1', 'stage3.2'] and ' ops ' not in out


def test_each_epoch_of_a_search_ends_with_a_line(small_search, capsys):
    folder = small_search('--epochs', '2', '--no-report')
    lines = re.findall(r' epoch (\d): (.*)$', capsys.readouterr().out, re.MULTILINE)
    assert [number for number, _ in lines] == ['0', '1']
    run = read_run(folder)
    for (_, text), line in zip(lines, run.of('epoch'), strict=True):
        about, network = run.header['latency'], line['network']
        assert text.startswith(f'{network["latency"]:.4f} ms, target {about["target"]:.4f} ms (50%), mean entropy ')
        assert f'validation top-1 {line["val"]["top1"]:.2f} % (chance 33.33 %)' in text
        assert text.endswith(architecture_line(network))


def test_a_line_of_an_architecture():
    rows = [
        {'stage': 'stage1', 'kernel': 3, 'expand': 3, 'se': 0, 'mid': 64},
        {'stage': 'stage1', 'kernel': 5, 'expand': 6, 'se': 24, 'mid': 144},
        {'stage': 'stage3', 'kernel': 7, 'expand': None, 'se': 0, 'mid': 9},
    ]
    network = {'blocks': rows, 'latency': 1.25}
    assert architecture_line(network) == '1: k3e3-64 k5e6se-144 | 3: k7-9'
    found = {'network': network, 'ops': [[0.5, 0.5], [1.0, 0.0]]}
    about = {'unit': 'ms', 'target': 2.0, 'given': '2.0'}
    start = '1.2500 ms, target 2.0000 ms, mean entropy 0.500 of 1, training top-1 12.00 % (chance 25.00 %), 1: k3e3-64'
    assert epoch_line(found, {'w_top1': 12.0}, about, 4).startswith(start)


def test_a_search_goes_on_with_more_epochs(small_search):
    folder = small_search('--epochs', '2', '--no-report')
    text = (folder / METRICS).read_text()
    assert small_search('--epochs', '3', '--no-report', '--snapshot', 'auto') == folder
    run, lines = read_run(folder), (folder / METRICS).read_text().splitlines()
    assert run.header['flags']['epochs'] == 3 and [line['epoch'] for line in run.of('epoch')] == [0, 1, 2]
    assert lines[0] == text.splitlines()[0] and sum('"kind":"run"' in line for line in lines) == 2
    small_search('--epochs', '3', '--no-report', '--snapshot', 'auto')  # nothing is left to do, and nothing changes
    assert read_run(folder).header == run.header and len(read_run(folder).lines) == len(run.lines)


def test_a_table_that_is_far_off_is_said_to_be(tmp_path, monkeypatch, capsys):
    assert warn_of_errors({'residual_mean_percent': 10.0}) == warn_of_errors({}) == warn_of_errors({'unit': 'ms'}) == ''
    table = make_table(img_size=32)
    meta = {'unit': 'ms', 'device': 'made up', 'residual_mean_percent': 27.14}
    monkeypatch.setattr(make_lat_lut, 'measured_table', lambda args, device: (table.base, table.curves, meta))
    path = tmp_path / 'table.pkl'
    make_lat_lut.main(make_lat_lut.get_args(['--img_size', '32', '--device', 'cpu', '--save_path', str(path)]))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith('WARNING: its predictions for unseen networks are off by 27.1 % on average')
    said = []
    assert load_table(path, 32, SPACE, said.append).meta['warning'] == last and f'{path}: {last}' in said


def test_a_closed_logger_holds_no_file(tmp_path):
    logger = RunLogger(tmp_path, {'kind': 'run', 'version': 1, 'task': 'training'})
    logger.lock = _lock(tmp_path)
    logging.getLogger('tf-nas').info('a line')
    assert {Path(name).name for name in open_files(tmp_path)} == {'log.txt', '.lock'}
    logger.close()
    assert open_files(tmp_path) == [] and 'a line' in (tmp_path / 'log.txt').read_text()


def test_a_training_that_learned_nothing_is_said_to_have(data, tmp_path):  # noqa: F811
    assert '33.60 % is no better than chance (25.00 %, 100 images)' in warn_of_chance(33.6, 100, 4)
    assert warn_of_chance(33.7, 100, 4) == '' and warn_of_chance(27.0, 10_000, 4) == ''
    for rate, learned in ((1e-9, False), (0.05, True)):
        words = [str(word) for word in flags(data, tmp_path / str(rate), epochs=1 + 3 * learned, lr=rate)]
        train_eval.main(train_eval.get_args(words))
        (folder,) = (tmp_path / str(rate)).iterdir()
        assert ('no better than chance' in (folder / 'log.txt').read_text()) != learned


def test_parts_of_a_measured_latency():
    build = partial(build_network, small_config(), torch.device('cpu'), 0)
    measured = measure_latency(build, 1, 32, torch.device('cpu'), rounds=1)
    assert len(measured.parts) == 2 + len(list(small_config().blocks())[1:]) and min(measured.parts) > 0
    assert sum(measured.parts) == pytest.approx(measured.ms)
