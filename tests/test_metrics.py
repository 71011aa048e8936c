"""metrics.jsonl: written, cut at the point a run goes on from, read back; the time that is left."""

import json
import sys
import time

import pytest
import torch

from models.config import build_config, load_config
from models.describe import describe_network, describe_space
from models.search_space import SPACE
from tools.errors import BadInput
from tools.run import METRICS, RunLogger, read_run, run_header

HEADER = {'kind': 'run', 'version': 1, 'task': 'training'}


def written(folder):
    """A run of two epochs of three steps, killed while it wrote another line."""
    metrics = RunLogger(folder, HEADER)
    for epoch in range(2):
        for step in (1, 2, 3):
            metrics.record('step', epoch, step, loss=epoch + step / 10)
        metrics.record('epoch', epoch, val={'top1': float('nan')}, lr=0.1 + 0.2)
    with open(folder / METRICS, 'a') as f:
        f.write('{"kind":"step","epo')
    return metrics


def positions(folder):
    return [(line['kind'], line['epoch'], line.get('step')) for line in read_run(folder).lines]


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
def test_lines_after_the_point_that_a_run_goes_on_from_are_dropped(tmp_path, position, kept):
    written(tmp_path)
    metrics = RunLogger(tmp_path, HEADER | {'task': 'another'}, position)
    assert positions(tmp_path) == kept and read_run(tmp_path).header['task'] == 'another'
    metrics.record('epoch', 7)
    assert positions(tmp_path) == [*kept, ('epoch', 7, None)]
    assert (tmp_path / METRICS).read_bytes().endswith(b'\n')


@pytest.mark.parametrize(
    ('content', 'message'),
    [(b'', 'does not begin'), (b'{"kind":"step","epoch":1}\n', 'does not begin'), (b'\xff\n', 'does not begin')],
)
def test_other_files_are_refused(tmp_path, content, message):
    (tmp_path / METRICS).write_bytes(content)
    with pytest.raises(BadInput, match=message):
        read_run(tmp_path)
    with pytest.raises(BadInput, match='no such file'):
        read_run(tmp_path / 'absent')
    (tmp_path / METRICS).write_text(json.dumps(HEADER | {'version': 99}) + '\n')
    with pytest.raises(BadInput, match='version 99, this program reads 1'):
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
    assert run_header('training', {'tensorboard': False}, torch.device('cpu'))['version'] == 1


def test_the_time_left_counts_the_steps_behind_the_logged_one(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr('tqdm.std.time', lambda: now[0])
    logger = RunLogger(tmp_path, HEADER)
    assert logger.time_left() == '?'
    logger.start_progress(total=400, done=40)
    logged = []
    for step in range(10):
        now[0] += 30
        logger.advance()
        logger.step(0, step + 1, 10, loss=1.0)
        logged.append((tmp_path / 'log.txt').read_text().rstrip().rpartition(' eta ')[2])
    assert logged[9] == '2:55:00'  # 350 steps of 30 s


def test_a_line_of_the_log_and_of_the_metrics(tmp_path, capsys):
    logger = RunLogger(tmp_path, HEADER)
    logger.step(3, 4, 9, lr=0.025, w_loss=1.23456, w_top1=50, **{'images/s': 9.96})
    expected = 'epoch 3 step 4/9 lr 0.02500 w_loss 1.2346 w_top1 50.00 images/s 10.0 eta ?'
    assert capsys.readouterr().out.endswith(expected + '\n') and expected in (tmp_path / 'log.txt').read_text()
    (line,) = read_run(tmp_path).lines
    assert (line['epoch'], line['step'], line['steps'], line['w_loss']) == (3, 4, 9, 1.23456)


def test_a_network_is_described_by_its_own_numbers(small_space):
    config = load_config('models/zoo/tf_nas_a.config')
    about = describe_network(config, 224, SPACE)
    assert about['macs'] == pytest.approx(456.68, abs=0.01) and about['params'] == pytest.approx(8.757527)
    rows = about['blocks']
    assert len(rows) == 18 and [row['size'] for row in rows if row['stride'] == 2] == [112, 56, 28, 14]
    assert all(row['low'] <= row['mid'] <= row['high'] for row in rows) and rows[0]['latency'] is None
    # 1x1, 3x3 depthwise, pooled SE, 1x1 of the first block
    row = rows[0]
    mid, se = row['mid'], row['se']
    counted = 112**2 * 16 * mid + 56**2 * (row['kernel'] ** 2 * mid + mid * 24) + 2 * mid * se
    assert row['macs'] == pytest.approx(counted / 1e6)
    arch = {'stage1': [0], 'stage2': [], 'stage3': [1, 2]}
    described = describe_network(build_config(arch, small_space.start_widths(), 3, small_space), 32, small_space)
    assert [(row['kernel'], row['expand'], row['mid']) for row in described['blocks']] == [
        (3, 3, 12), (5, 3, 18), (3, 6, 48)
    ]  # fmt: skip
    assert describe_space(32, small_space)['exits']['stage2'] == [0, 1, 2]
    assert torch.get_default_device() == torch.device('cpu')
