"""The folder of a run: metrics.jsonl, its log, the time that is left; several runs in one process."""

import json
import logging
import os
import re
import sys
import time

import pytest
import torch
from training_runs import CLASSES, flags

import train_eval
import train_search
from conftest import SMALL_SPACE, make_table
from models.tables import save_table
from tools.errors import BadInput
from tools.run import METRICS, RunLogger, read_run, run_header
from tools.training import to_device

HEADER = {'kind': 'run', 'version': 1, 'task': 'training'}


def written(folder):
    """A run of two epochs of three steps, killed while it wrote another line."""
    logger = RunLogger(folder, HEADER)
    for epoch in range(2):
        for step in (1, 2, 3):
            logger.record('step', epoch, step, loss=epoch + step / 10)
        logger.record('epoch', epoch, val={'top1': float('nan')}, lr=0.1 + 0.2)
    logger.close()
    with open(folder / METRICS, 'a') as f:
        f.write('{"kind":"step","epo')


def test_a_file_reads_back_without_the_line_that_a_kill_cut(tmp_path):
    written(tmp_path)
    run = read_run(tmp_path)
    assert run.header == HEADER and len(run.lines) == 8
    assert run.of('epoch')[1]['val'] == {'top1': None} and run.of('epoch')[1]['lr'] == 0.3
    assert [line['loss'] for line in run.of('step')] == [0.1, 0.2, 0.3, 1.1, 1.2, 1.3]
    assert all(abs(line['time'] - time.time()) < 100 for line in run.lines)


@pytest.mark.parametrize(
    ('position', 'kept'),
    [
        ((0, 0), []),
        ((0, 2), [('step', 0, 1), ('step', 0, 2)]),
        ((1, 0), [('step', 0, 1), ('step', 0, 2), ('step', 0, 3), ('epoch', 0, None)]),
        ((1, 1), [('step', 0, 1), ('step', 0, 2), ('step', 0, 3), ('epoch', 0, None), ('step', 1, 1)]),
    ],
)
def test_lines_after_the_point_that_a_run_resumes_from_are_dropped(tmp_path, position, kept):
    written(tmp_path)
    logger = RunLogger(tmp_path, HEADER | {'task': 'another'}, position)
    logger.record('epoch', 7)
    logger.close()
    run = read_run(tmp_path)
    assert [(line['kind'], line['epoch'], line.get('step')) for line in run.lines] == [*kept, ('epoch', 7, None)]
    assert run.header['task'] == 'another' and (tmp_path / METRICS).read_bytes().endswith(b'\n')


@pytest.mark.parametrize('content', [b'', b'{"kind":"step","epoch":1}\n', b'\xff\n', {'version': 99}, None])
def test_other_files_are_refused(tmp_path, content):
    if isinstance(content, dict):
        content = json.dumps(HEADER | content).encode() + b'\n'
    if content is not None:
        (tmp_path / METRICS).write_bytes(content)
    with pytest.raises(BadInput, match=METRICS):
        read_run(tmp_path)


def test_tensorboard_gets_every_number_once_also_after_resuming(tmp_path):
    events = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    header = HEADER | {'steps_an_epoch': 10, 'flags': {'tensorboard': True}}
    for position, line in (((0, 0), ('epoch', 0, None)), ((1, 0), ('step', 1, 5))):
        logger = RunLogger(tmp_path, header, position)
        logger.record(*line, val={'top1': 30.0}, ops=[[0.25, 0.75]])
        logger.close()
    board = events.EventAccumulator(str(tmp_path / 'tensorboard'))
    board.Reload()
    tags = [f'{kind}/{name}' for kind in ('epoch', 'step') for name in ('val/top1', 'ops/0/0', 'ops/0/1')]
    assert set(board.Tags()['scalars']) == set(tags)
    assert [(e.step, e.value) for e in board.Scalars('step/val/top1')] == [(15, 30.0)]
    assert [(e.step, e.value) for e in board.Scalars('epoch/ops/0/1')] == [(10, 0.75)]


def test_without_tensorboard_its_flag_is_refused_before_there_is_a_folder(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    with pytest.raises(BadInput, match='pip install tensorboard'):
        run_header('training', {'tensorboard': True}, torch.device('cpu'))


def test_a_step_in_log_and_metrics_with_the_time_left(tmp_path, monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr('tqdm.std.time', lambda: now[0])
    logger = RunLogger(tmp_path, HEADER)
    logging.getLogger('tf-nas').debug('a detail')
    logger.start_progress(total=400, done=40)
    for step in range(10):
        now[0] += 30
        logger.advance()
        logger.step(3, step + 1, 10, lr=0.025, w_loss=1.23456, w_top1=50, **{'images/s': 9.96})
    logger.close()
    log, out = (tmp_path / 'log.txt').read_text(), capsys.readouterr().out
    # 350 steps of 30 s are left
    last = 'epoch 3 step 10/10 lr 0.02500 w_loss 1.2346 w_top1 50.00 images/s 10.0 eta 2:55:00\n'
    assert log.endswith(last) and out.endswith(last) and 'a detail' in log and 'a detail' not in out
    line = read_run(tmp_path).lines[-1]
    assert (line['epoch'], line['step'], line['steps'], line['w_loss']) == (3, 10, 10, 1.23456)


@pytest.mark.parametrize(('waits', 'batches', 'warned'), [(0.3, 150, True), (0.01, 150, False), (0.3, 90, False)])
def test_slow_loading_is_warned_of_once(monkeypatch, caplog, waits, batches, warned):
    now = [0.0]
    monkeypatch.setattr(time, 'monotonic', lambda: now[0])

    images = torch.zeros(1, 3, 8, 8), torch.zeros(1)

    def loaded(count):
        for i in range(count):
            now[0] += 100 if i == 0 else waits  # workers start before the first one
            yield images

    logger, seen = RunLogger(None, {}), 0
    for _ in range(3):  # as the passes of a run
        for _ in to_device(loaded(batches // 3), torch.device('cpu'), waiting=logger.waiting('--workers', 32)):
            now[0] += 0.1
            seen += 1
    assert seen == batches and len(caplog.messages) == warned
    assert not warned or ('80 images/s' in caplog.text and 'need 320' in caplog.text)


def test_the_time_of_a_run_is_told_once_after_ten_steps(tmp_path, monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr(time, 'monotonic', lambda: now[0])
    logger = RunLogger(tmp_path, run_header('search', {'epochs': 90}, torch.device('cpu')))
    logger.start_progress(total=1211, done=0)
    for seconds in (100, *[18] * 20):
        now[0] += seconds
        logger.advance()
    logger.close()
    (line,) = [text for text in caplog.messages if 'to go' in text]
    assert line.startswith('90 epochs: about 6 h 0 min') and '--epochs' in line


@pytest.fixture
def small_search(data, tmp_path, monkeypatch):
    """Function that runs a search of the small space in this process, with more flags, and returns its run folder."""
    monkeypatch.setattr(train_search, 'SPACE', SMALL_SPACE)
    table = make_table(SMALL_SPACE, 32)
    save_table(table.base, table.curves, {'unit': 'ms', 'device': 'made up'}, tmp_path / 'table.pkl')

    def run(*more):
        words = f'--img-size 32 --batch-size 4 --workers 0 --print-freq 5 --device cpu --num-classes {CLASSES}'.split()
        words += ['--img-root', data, '--train-list', data / 'train.txt', '--val-list', data / 'val.txt']
        words += ['--lookup-path', tmp_path / 'table.pkl', '--target-lat', '50%', '--save', tmp_path / 'runs']
        words += ['--warmup-epochs', 1, '--no-report', *more]
        assert train_search.main(train_search.get_args(list(map(str, words)))) == 0
        return max((tmp_path / 'runs').iterdir(), key=lambda folder: folder.stat().st_mtime_ns)

    return run


def open_files(folder):
    """Files of a folder that this process has open."""
    links = [f'/proc/self/fd/{number}' for number in os.listdir('/proc/self/fd')]
    return [os.readlink(link) for link in links if os.path.exists(link) and os.readlink(link).startswith(str(folder))]


def test_two_searches_and_a_training_in_one_process(small_search, data, tmp_path, capsys):
    first = small_search('--epochs', 2, '--note', 'one')
    out = capsys.readouterr().out
    second = small_search('--epochs', 2, '--note', 'two')
    assert first.name != second.name and read_run(first).of('end') and open_files(tmp_path) == []
    again = capsys.readouterr().out
    assert out.count('\n') == again.count('\n')  # a second log handler would double the lines
    losses = [[line['w_loss'] for line in read_run(folder).of('step')] for folder in (first, second)]
    assert losses[0] == losses[1]
    words = [str(word) for word in flags(data, tmp_path / 'runs', epochs=1)]
    assert train_eval.main(train_eval.get_args(words)) == 0 and open_files(tmp_path) == []
    log = (first / 'log.txt').read_text()
    assert 'networks reach from' in log  # logged before there was a folder
    rows = re.findall(r'(stage\d\.\d) ops [\d. ]+$', log, re.MULTILINE)
    assert rows == ['stage1.1', 'stage2.1', 'stage2.2', 'stage3.1', 'stage3.2'] and ' ops ' not in out


def test_a_search_goes_on_with_more_epochs(small_search):
    folder = small_search('--epochs', 2)
    first = (folder / METRICS).read_text().splitlines()[0]
    assert small_search('--epochs', 3, '--snapshot', 'auto') == folder
    run, lines = read_run(folder), (folder / METRICS).read_text().splitlines()
    assert run.header['flags']['epochs'] == 3 and [line['epoch'] for line in run.of('epoch')] == [0, 1, 2]
    assert lines[0] == first and sum('"kind":"run"' in line for line in lines) == 2
    small_search('--epochs', 3, '--snapshot', 'auto')  # nothing is left to do, and nothing changes
    assert read_run(folder).header == run.header and len(read_run(folder).lines) == len(run.lines)
