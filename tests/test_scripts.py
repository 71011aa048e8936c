"""Every script from the shell, on generated images, at the smallest sizes."""

import json
import os
import re
import socket
import sys

import pytest
import torch
from bad_files import run_here

from dataset import data
from models.config import load_config
from models.parsing import read_searched
from models.search_space import SPACE
from tools.run import read_run

SIZE = ['--img_size', '32']
SMALL = [*SIZE, '--num_classes', '3', '--workers', '0']


@pytest.fixture(scope='module')
def table(tmp_path_factory, run_script):
    path = tmp_path_factory.mktemp('table') / 'flops.pkl'
    out = run_script(
        'latency_pkl/make_lat_lut.py', '--metric', 'flops', *SIZE, '--num_classes', '3', '--save_path', path
    ).stdout
    assert '66 block shapes' in out
    return path


def search(images, table, save, *more):
    return [
        'train_search.py', '--img_root', images, '--train_list', images / 'train.txt', '--val_list', images / 'val.txt',
        '--lookup_path', table, '--save', save, *SMALL, '--batch_size', '8', '--epochs', '2', '--warmup_epochs', '1',
        '--target_lat', '40%', '--print_freq', '1', '--no-report', *more,
    ]  # fmt: skip


@pytest.fixture(scope='module')
def searched(images, table, tmp_path_factory, run_script):
    """A finished search: its folder and what it printed."""
    save = tmp_path_factory.mktemp('search')
    out = run_script(*search(images, table, save, '--note', 'test run', '--report')).stdout
    (folder,) = save.iterdir()
    return folder, out


def train(script, images, save, *more):
    return [
        script, '--train_root', images, '--val_root', images, '--train_list', images / 'train.txt', '--val_list',
        images / 'val.txt', '--save', save, *SMALL, '--batch_size', '8', '--lr', '0.02', '--epochs', '2',
        '--no-report', *more,
    ]  # fmt: skip


@pytest.fixture(scope='module')
def found(searched, table, tmp_path_factory, run_script):
    """The config of the searched network, and what the parser printed."""
    path = tmp_path_factory.mktemp('found') / 'model.config'
    words = ['--model_path', searched[0] / 'searched_model_02.pth.tar', '--save_path', path, '--lookup_path', table]
    out = run_script('parsing_model.py', *words, '--print_lat', '--rounds', '2', '--num_classes', '3', *SIZE).stdout
    return path, out


@pytest.fixture(scope='module')
def trained(found, images, tmp_path_factory, run_script):
    save = tmp_path_factory.mktemp('trained')
    out = run_script(*train('train_eval.py', images, save, '--config_path', found[0], '--report')).stdout
    (folder,) = save.iterdir()
    return folder, out


def test_search_writes_checkpoints_and_log(searched):
    folder, out = searched
    assert re.fullmatch(r'search-\d{8}-\d{6}-test run', folder.name)
    names = [
        'classes.txt',
        'log.txt',
        'metrics.jsonl',
        'plots',
        'report.html',
        'searched_model_01.pth.tar',
        'searched_model_02.pth.tar',
    ]
    assert sorted(p.name for p in folder.glob('[!.]*')) == names
    log = (folder / 'log.txt').read_text()
    assert 'networks reach from' in log and '--target_lat' in log
    assert log.count(' ops ') == 18 and log.count(' exits ') == 6
    assert re.search(r'epoch 0 Gumbel paths: val_top1 \d+\.\d\d', log)
    patterns = [rf'{name} lat: (\d+\.\d{{4}})' for name in ('Before, the current', 'After, the current', 'the target')]
    before, after, target = (float(re.search(pattern, log).group(1)) for pattern in patterns)
    assert abs(after - target) <= abs(before - target) and after <= target


def test_search_metrics_agree_with_its_checkpoint_and_log(searched):
    folder, out = searched
    run = read_run(folder)
    space, latency = run.header['space'], run.header['latency']
    assert len(space['blocks']) == 18 and len(space['ops']) == 8 and run.header['flags']['target_lat'] > 0
    warm, last = run.of('epoch')
    assert 'latency' not in warm and last['latency']['after'] <= latency['target']
    assert last['latency']['least'] <= last['latency']['after'] <= last['latency']['most'] <= latency['reach'][2]
    searched_model = read_searched(folder / 'searched_model_02.pth.tar', SPACE)
    state = searched_model.state
    assert last['ops'][3] == pytest.approx(state['stage2.block2.log_alphas'].softmax(0).tolist(), abs=1e-6)
    assert last['exits']['stage3'] == pytest.approx(state['stage3.betas'].softmax(0).tolist(), abs=1e-6)
    assert last['widths'][3] == list(searched_model.widths['stage2']['block2'].values())
    network = last['network']
    assert network['latency'] == pytest.approx(last['latency']['after'], rel=1e-6)
    # the table counts multiply-adds, so both kinds of shares are the same
    assert [row['latency'] for row in network['blocks']] == pytest.approx([row['macs'] for row in network['blocks']])
    steps = run.of('step')
    assert [(line['epoch'], line['step']) for line in steps] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert 'a_loss' not in steps[0] and {'w_loss', 'a_loss', 'mixture_latency'} <= steps[-1].keys()
    assert re.search(r'epoch 1 step 2/2 w_loss \d\.\d{4} .* eta 00:00', out)


def test_search_checkpoint_has_the_published_form(searched):
    checkpoint = torch.load(searched[0] / 'searched_model_02.pth.tar', weights_only=True)
    assert {'state_dict', 'mc_mask_dddict', 'epoch'} <= checkpoint.keys()
    state = checkpoint['state_dict']
    assert all(name.startswith('module.') for name in state)
    assert state['module.stage3.block2.m_ops.5.inverted_bottleneck.conv.weight'].shape == (640, 80, 1, 1)
    masks = checkpoint['mc_mask_dddict']
    assert masks['stage3']['block2'][5].shape == (640,) and masks['stage3']['block2'][5].dtype == torch.float32
    assert state['module.stage1.block1.log_alphas'].exp().sum().item() == pytest.approx(1, abs=1e-5)
    warmed_up = read_searched(searched[0] / 'searched_model_01.pth.tar', SPACE).state
    assert warmed_up['stage1.block1.log_alphas'].unique().numel() == 1


def test_parser_agrees_with_the_searchs_last_latency(searched, found):
    path, out = found
    latency = float(re.search(r'Lat_LUT: (\d+\.\d+)', out).group(1))
    last = re.findall(r'After, the current lat: (\d+\.\d{4})', (searched[0] / 'log.txt').read_text())[-1]
    assert latency == pytest.approx(float(last), abs=1e-4)
    # the table counts multiply-adds, so its sum is what the parser counts on the network itself
    assert float(re.search(r'FLOPs: (\d+\.\d+) M', out).group(1)) == pytest.approx(latency, abs=0.006)
    assert re.search(r'Params: \d+\.\d+ M', out) and re.search(r'Lat_CPU bs=1: \d+\.\d+ ms', out)
    assert 'running on the CPU' in out
    assert load_config(path).classifier.out_features == 3


def test_a_config_is_only_looked_at_and_keeps_its_classes(found, tmp_path, monkeypatch, capsys):
    config, _ = found
    before = config.read_bytes()
    monkeypatch.chdir(tmp_path)
    words = ['--config_path', config, *SIZE]
    assert run_here(monkeypatch, 'parsing_model.py', words) == 0
    assert 'FLOPs: ' in (out := capsys.readouterr().out) and 'Config:' not in out
    assert not list(tmp_path.iterdir()) and config.read_bytes() == before
    assert run_here(monkeypatch, 'parsing_model.py', [*words, '--save_path', config]) == 0
    assert config.read_bytes() == before


def test_training_and_testing(trained, found, images, run_script, monkeypatch, capsys):
    folder, out = trained
    assert sorted(p.name for p in folder.glob('[!.]*')) == [
        'checkpoint.previous.pth.tar',
        'checkpoint.pth.tar',
        'classes.txt',
        'log.txt',
        'metrics.jsonl',
        'model.config',
        'model_best.pth.tar',
        'plots',
        'report.html',
    ]
    (latency,) = read_run(folder).of('latency')
    assert f'measured latency {latency["ms"]:.4f} ms'[:22] in out and latency['batch_size'] == 1 and latency['ms'] > 0
    assert {path.name for path in (folder / 'plots').iterdir()} == {
        'network.png', 'network.svg', 'training.png', 'training.svg'
    }  # fmt: skip
    checkpoint = torch.load(folder / 'model_best.pth.tar', weights_only=True)
    assert {'epoch', 'state_dict', 'best_acc_top1', 'best_acc_top5', 'optimizer'} <= checkpoint.keys()
    words = ['--val_root', images, '--val_list', images / 'val.txt', '--weights', folder / 'model_best.pth.tar', *SMALL]
    shell = run_script('test.py', *words, '--config_path', found[0], '--batch_size', '5').stdout
    assert run_here(monkeypatch, 'test.py', [*words, '--model_path', found[0], '--batch_size', '5']) == 0
    for tested in (shell, capsys.readouterr().out):
        top1 = float(re.search(r'Val_acc_top1: (\d+\.\d\d)', tested).group(1))
        assert top1 == pytest.approx(checkpoint['best_acc_top1'], abs=0.01)
        assert 'top5' not in tested  # of three classes


def test_two_processes_train_together(searched, images, tmp_path, run_script):
    model = searched[0] / 'searched_model_02.pth.tar'
    words = train('train_eval_amp.py', images, tmp_path, '--model_path', model, '--opt_level', 'O1', '--epochs', '1')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    launcher = ['-m', 'torch.distributed.run', '--nproc_per_node=2', f'--master_port={port}']
    run_script(*launcher, *words, '--channels_last')
    (folder,) = tmp_path.iterdir()  # one process wrote
    log = (folder / 'log.txt').read_text()
    assert 'step 2/2' in log and log.count('val_top1') == 1


def test_default_lists_are_made_from_class_folders(tmp_path, images, table, monkeypatch, capsys):
    (tmp_path / 'classes.txt').write_text('class_0\nclass_2\n')
    (tmp_path / 'dataset').mkdir()
    root = tmp_path / 'images'
    for name in ('0', '2'):
        (root / f'class_{name}').mkdir(parents=True)
        for image in (images / f'class {name}').iterdir():
            os.link(image, root / f'class_{name}' / image.name)
    words = ['--img_root', root, '--lookup_path', table, *SMALL, '--batch_size', '4', '--target_lat', '40%']
    words += ['--epochs', '1', '--warmup_epochs', '1', '--no-report']
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, 'CLASSES', tmp_path / 'classes.txt')
    assert run_here(monkeypatch, 'train_search.py', words) == 0
    out = capsys.readouterr().out
    lists = sorted((tmp_path / 'dataset').glob('ImageNet-100-effb0_*.txt'))
    assert 'made ./dataset/ImageNet-100-effb0_train_cls_ratio0.8.txt: 20 images' in out
    assert [len(path.read_text().splitlines()) for path in lists] == [20, 4]
    assert lists[1].read_text().splitlines()[-1].startswith('class_2/') and lists[1].read_text().splitlines()[
        -1
    ].endswith(' 1')


IN_ONE_PROCESS = """
import glob, json, runpy, sys
for words in json.loads(sys.argv[1]):
    sys.argv = [glob.glob(word)[0] if '*' in word else word for word in words]
    try:
        runpy.run_path(words[0], run_name='__main__')
    except SystemExit as ended:
        assert not ended.code, words
"""
"""Runs several scripts, which imports torch once. A word with a * is a file that an earlier one has written."""


def test_a_space_without_se_needs_edited_rows_only(project_copy, images, run_script):
    table_of_space = project_copy / 'models' / 'search_space.py'
    text = table_of_space.read_text()
    edited = re.sub(r'        Op\(.*se=True\),\n', '', text).replace('depth=4', 'depth=1').replace('depth=3', 'depth=2')
    edited = edited.replace("act='swish'", "act='h-swish'")
    assert edited.count('        Op(') == 4 and edited != text
    table_of_space.write_text(edited)
    path, save, config = project_copy / 'flops.pkl', project_copy / 'runs', project_copy / 'model.config'
    parsing = ['--model_path', save / 'search-*' / 'searched_model_01.pth.tar', '--save_path', config, *SIZE]
    testing = ['--weights', save / 'eval-*' / 'checkpoint.pth.tar', '--config_path', config, *SMALL]
    commands = [
        ['latency_pkl/make_lat_lut.py', '--metric', 'flops', *SIZE, '--save_path', path],
        search(images, path, save, '--epochs', '1', '--warmup_epochs', '0'),
        ['parsing_model.py', *parsing, '--num_classes', '3', '--lookup_path', path, '--print_lat', '--rounds', '2'],
        train('train_eval.py', images, save, '--config_path', config, '--epochs', '1'),
        ['test.py', '--val_root', images, '--val_list', images / 'val.txt', *testing],
    ]
    words = json.dumps([[str(word) for word in one] for one in commands])
    out = run_script('-c', IN_ONE_PROCESS, words, cwd=project_copy).stdout
    assert '16 block shapes' in out  # 8 shapes, 2 kernels
    assert 'Lat_CPU' in out and 'Val_acc_top1' in out
    assert '"se_channels": 0' in config.read_text() and load_config(config).second_stem.se_channels == 8
    assert {spec.se_channels for blocks in load_config(config).stages.values() for spec in blocks} == {0}


def test_make_lists_of_any_folder(images, tmp_path, run_script, monkeypatch):
    script = 'dataset/make_lists.py'
    assert run_here(monkeypatch, script, ['--img_root', images, '--list', tmp_path / 'all.txt']) == 0
    assert len((tmp_path / 'all.txt').read_text().splitlines()) == 36
    lists = ['--train_list', tmp_path / 't.txt', '--val_list', tmp_path / 'v.txt']
    assert '9 images of 3 classes' in run_script(script, '--img_root', images, *lists, '--ratio', '0.75').stdout


def test_importing_does_nothing(run_script, tmp_path):
    modules = [
        'train_search',
        'parsing_model',
        'train_eval',
        'train_eval_amp',
        'test',
        'models',
        'latency_pkl.make_lat_lut',
    ]
    code = f'import sys; sys.path.insert(0, {str(os.getcwd())!r}); import {", ".join(modules)}'
    done = run_script('-c', code, cwd=tmp_path)
    assert done.stdout == '' and done.stderr == '' and not list(tmp_path.iterdir())
    assert sys.executable and len(SPACE.ops) == 8
