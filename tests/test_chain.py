"""What is stated once travels from step to step, and each script prints the command of the next one."""

import json
import shlex
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from bad_files import run_here, write_searched
from PIL import Image
from training_runs import small_config

import parsing_model
from conftest import ROOT, make_table
from dataset.data import Data
from dataset.lists import parse_list
from dataset.loaders import ImageSet
from latency_pkl import runtimes
from latency_pkl.runtimes import log_network_latency
from latency_pkl.sampling import reference_config
from latency_pkl.timing import Measured
from models.config import dump_config, load_config, parse_config
from models.meta import Meta, checkpoint_meta
from models.parsing import load_architecture
from models.search_space import SPACE
from models.tables import load_table, save_table
from tools.chain import command, settle
from tools.environment import device_name, set_tf32
from tools.errors import BadInput
from tools.training import Tally
from train_eval import config_for

CPU = torch.device('cpu')
NAMES = ["a's red", 'green', 'pale blue']


def photographs(root, names=NAMES, count=12):
    """Class folders of noisy images of one colour each."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.clip(rng.normal(60 + 60 * label, 40, (36, 40, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f'{i}.png')
    return root


@pytest.fixture
def photos(tmp_path):
    return photographs(tmp_path / 'my photos')


def write_table(path, **meta):
    """A table for 32 pixels."""
    table = make_table(img_size=32)
    save_table(table.base, table.curves, {'img_size': 32, 'num_classes': 3, **meta}, path)
    return path


def pasted(printed):
    """The words of the command that a script has printed last, as a shell reads them: script, flags."""
    _, _, after = printed.rpartition('next, ')
    words = shlex.split(after.partition('\n')[2].replace('\\\n', ''))
    return words[1].rpartition('/')[2], words[2:]


# --- the chain


def test_the_printed_commands_lead_from_photographs_to_an_exported_file(photos, tmp_path, monkeypatch, capsys):
    table, save = write_table(tmp_path / 'table.pkl', unit='M MACs'), tmp_path / 'runs'
    monkeypatch.chdir(tmp_path)
    script = 'train_search.py'
    words = ['--img_root', photos, '--lookup_path', table, '--target_lat', '40%', '--save', save, '--device', 'cpu']
    words += ['--epochs', 1, '--warmup_epochs', 0, '--no-report', '--workers', 0]
    printed, more = {}, {'train_eval.py': ['--epochs', '1', '--no-report', '--workers', '0'], 'test.py': []}
    for step in ('search', 'parse', 'train', 'test', 'export'):
        assert run_here(monkeypatch, script, [*words, *more.get(script, [])]) == 0
        printed[step] = capsys.readouterr().out
        script, words = pasted(printed[step]) if step != 'export' else ('', [])
    search, training = (next(save.glob(f'{kind}-*')) for kind in ('search', 'eval'))

    lists = {path.stem: {relative for relative, _ in parse_list(path)} for path in search.glob('*.txt')
             if path.stem not in ('log', 'classes')}  # fmt: skip
    assert {name: len(part) for name, part in lists.items()} == {
        'train': 30, 'val': 6, 'search_train': 24, 'search_val': 6
    }  # fmt: skip
    assert not lists['train'] & lists['val'] and lists['search_train'] | lists['search_val'] == lists['train']
    assert pasted((training / 'log.txt').read_text())[0] == 'test.py'

    meta = load_config(search / 'model.config').meta
    assert (meta.img_size, list(meta.class_names), meta.target_given) == (32, NAMES, '40%')
    assert meta.table == str(table) and meta.predicted == pytest.approx(meta.target, rel=0.02)
    assert f'Lat_LUT: {meta.predicted:.4f} M MACs' in printed['parse'] and '--lr_scale linear' in printed['parse']
    best = torch.load(training / 'model_best.pth.tar', weights_only=True)
    assert best['flags']['img_size'] == 32 and best['meta']['class_names'] == NAMES
    assert f'Val_acc_top1: {best["best_acc_top1"]:.2f}' in printed['test']
    (exported,) = (path for path in training.iterdir() if path.name in ('net.onnx', 'net.pt2'))
    if exported.suffix == '.onnx':
        import onnx

        texts = {entry.key: json.loads(entry.value) for entry in onnx.load(exported).metadata_props}
        assert (texts['img_size'], texts['class_names'], texts['mean'][0]) == (32, NAMES, 0.485)

    # without a list, the images of the training's folder are those that it left for validation
    words = ['--config_path', training / 'model.config', '--weights', training / 'model_best.pth.tar']
    assert run_here(monkeypatch, 'test.py', [*words, '--val_root', photos]) == 0
    assert f'Val_acc_top1: {best["best_acc_top1"]:.2f}' in capsys.readouterr().out


def test_commands_are_quoted_and_broken_into_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = {'a': tmp_path / "it's $HOME", 'b': None, 'c': True, 'd': False, 'e': ['x y', 2], 'f': '50%'}
    text = command('test.py', flags, ' \\\n  ')
    words = shlex.split(text.replace('\\\n', ''))
    assert words[1] == str(ROOT / 'test.py')
    assert words[2:10] == ['--a', "it's $HOME", '--c', '--e', 'x y', '2', '--f', '50%']


# --- stated once


def test_a_given_flag_wins_and_each_other_value_is_logged(caplog):
    assert settle('--x', 1, [(2, 'a'), (None, 'b'), (1, 'c')], 9) == 1
    assert settle('--x', None, [(None, 'b'), (2, 'a'), (3, 'c')], 9) == 2
    assert caplog.messages == ['--x is 1, a has 2', '--x 2: from a', '--x is 2, c has 3']
    assert settle('--x', None, [(None, 'b')], 9) == 9 and len(caplog.messages) == 3


BAD_META = [
    ('text', 'meta'),
    ({'img_size': 10**9}, 'img_size'),
    ({'img_size': True}, 'img_size'),
    ({'mean': [0.5, 0.5]}, 'mean'),
    ({'std': [1, 1, 0]}, 'std'),
    ({'class_names': ['a', 'b']}, 'class_names'),
    ({'class_names': ['a', 'b', {}]}, 'class_names'),
    ({'table': 'x' * 5000}, 'table'),
    ({'target': -1}, 'target'),
]


@pytest.mark.parametrize(('meta', 'name'), BAD_META)
def test_a_bad_meta_is_refused_in_a_line(meta, name):
    data = json.loads(dump_config(small_config())) | {'meta': meta}
    with pytest.raises(BadInput, match='x.config') as error:
        parse_config(json.dumps(data), 'x.config')
    assert name in str(error.value) and len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 200


def test_meta_survives_writing_and_published_configs_have_none():
    published = ROOT / 'models' / 'zoo' / 'tf_nas_a.config'
    assert load_config(published).meta == Meta() and dump_config(load_config(published)) == published.read_text()
    meta = Meta(64, (0.5, 0, 0.5), (1, 1, 1), ('a', 'b', 'é'), target=3.5, target_given='50%', unit='ms', measured=3.1)
    config = replace(small_config(), meta=meta)
    assert parse_config(dump_config(config), 'text') == config
    unknown = json.loads(dump_config(config))
    unknown['meta'] |= {'of a later version': {'x': 1}, 'measured': None}
    assert parse_config(json.dumps(unknown), 'text').meta == replace(meta, measured=None)
    assert config.with_classes(3).meta == meta and config.with_classes(4).meta.class_names is None


def test_checkpoints_of_other_times_and_programs():
    assert checkpoint_meta({'flags': {'img_size': 64}, 'class_names': ['a', 'b']}, 'x') == Meta(
        64, class_names=('a', 'b')
    )
    for foreign in ({'meta': 'text'}, {'meta': {'CLASSES': (1, 2)}}, {'flags': [3]}, {'flags': {'img_size': 'x'}}):
        assert checkpoint_meta(foreign, 'x') == Meta()
    with pytest.raises(BadInput, match='x: meta: img_size is'):
        checkpoint_meta({'meta': {'img_size': 5}}, 'x')


def test_classes_of_a_search_reach_the_config_and_published_ones_have_1000(tmp_path):
    write_searched(tmp_path / 'old.pth.tar')
    assert load_architecture(tmp_path / 'old.pth.tar', SPACE).classifier.out_features == 1000
    checkpoint = torch.load(tmp_path / 'old.pth.tar', weights_only=True)
    checkpoint |= {'flags': {'num_classes': 3}, 'meta': {'img_size': 64, 'class_names': NAMES}}
    torch.save(checkpoint, tmp_path / 'new.pth.tar')
    config = load_architecture(tmp_path / 'new.pth.tar', SPACE)
    assert config.classifier.out_features == 3 and list(config.meta.class_names) == NAMES
    assert config.with_classes(7).meta == Meta(64)


def test_a_training_on_other_data_says_so_and_drops_what_no_longer_holds(caplog):
    samples = [(f'{name}/{i}.png', label) for label, name in enumerate(NAMES) for i in range(2)]
    images = Data(*[ImageSet('r', samples, 'l')] * 2, 3)
    meta = Meta(64, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), tuple(NAMES), target=3.0, measured=2.0)
    config = replace(small_config(), meta=meta)
    assert config_for(images, config, 'c', 64).meta == meta and caplog.messages == []
    assert config_for(images, config, 'c', 32).meta == Meta(32, meta.mean, meta.std, tuple(NAMES))
    swapped = replace(meta, class_names=(NAMES[0], NAMES[2], NAMES[1]))
    assert config_for(images, replace(config, meta=swapped), 'c', 64).meta.class_names == tuple(NAMES)
    assert 'c has other class names' in caplog.messages[-1]
    assert config_for(images, config.with_classes(9), 'c', 64).classifier.out_features == 3
    assert 'c is for 9 classes, the network gets 3' in caplog.text


@pytest.mark.parametrize('size', [32, 48])
def test_a_config_parsed_at_another_size_drops_the_latencies_of_the_old_one(size, tmp_path, monkeypatch, capsys):
    latencies = {'table': 'old.pkl', 'target': 3.0, 'target_given': '50%', 'unit': 'ms', 'predicted': 2.9}
    meta = Meta(32, (0.5, 0.5, 0.5), (1, 1, 1), tuple(NAMES), **latencies, measured=2.8, measured_on='x')
    (tmp_path / 'a.config').write_text(dump_config(replace(small_config(), meta=meta)))
    words = ['--config_path', tmp_path / 'a.config', '--save_path', tmp_path / 'b.config', '--img_size', size]
    assert run_here(monkeypatch, 'parsing_model.py', words) == 0
    assert ('warning: --img_size is 48' in capsys.readouterr().out) == (size == 48)
    expected = meta if size == 32 else Meta(48, meta.mean, meta.std, meta.class_names)
    assert load_config(tmp_path / 'b.config').meta == expected


def test_the_latency_of_a_training_is_measured_beside_the_table_of_its_config(tmp_path, monkeypatch, settings, caplog):
    reference = dump_config(reference_config(3, SPACE))
    about = {'device': device_name(CPU), 'batch_size': 1, 'threads': 1, 'reference': reference, 'reference_ms': 5.0}
    path = write_table(tmp_path / 't.pkl', unit='ms', tf32=False, **about)
    set_tf32(True)  # as in the training
    config = reference_config(3, SPACE)
    config = replace(config, meta=Meta(32, target=3.0, target_given='50%', unit='ms', table=str(path)))
    given = []

    def measure(build, batch_size, img_size, device, standard, launch):
        precision = torch.backends.cudnn.conv.fp32_precision
        given.append((batch_size, img_size, standard.ms if standard else None, precision))
        return Measured(2.5, 0.01, 1.0 if standard else None, parts=(1.0, 1.5))

    monkeypatch.setattr(runtimes, 'measure_latency', measure)
    logger = Namespace(record=lambda *_, **__: None)
    log_network_latency(logger, 1, config, CPU, 32, SPACE)
    predicted = load_table(path, 32, SPACE).of_config(config)
    assert given == [(1, 32, 5.0, 'ieee')]
    assert 'measured latency 2.5000 ms' in caplog.messages[-1] and 'relative to the reference' in caplog.messages[-1]
    assert f'target 3.0000 ms, given as 50%; predicted by the table {predicted:.4f} ms' in caplog.messages[-1]
    path.unlink()
    set_tf32(True)
    log_network_latency(logger, 1, config, CPU, 32, SPACE)
    assert given[1] == (1, 32, None, 'tf32')
    assert 'table of the config, is not there' in caplog.text and 'by the clock alone' in caplog.messages[-1]


@pytest.mark.parametrize(('classes', 'has_five'), [(5, False), (6, True)])
def test_the_best_five_of_five_classes_are_left_out(classes, has_five):
    tally = Tally(CPU)
    tally.add(torch.tensor(1.0), torch.eye(classes), torch.arange(classes))
    assert ('top5' in tally.read()) == has_five and tally.read()['top1'] == 100


def test_configs_of_several_targets_have_plain_names_and_are_checked_first(tmp_path, monkeypatch, capsys):
    paths = parsing_model.config_paths(tmp_path / 'model.config', ['20%', '3.5'])
    assert [path.name for path in paths] == ['model_20pc.config', 'model_3.5.config']
    paths[1].mkdir()
    write_searched(tmp_path / 's.pth.tar')
    words = ['--model_path', tmp_path / 's.pth.tar', '--target_lat', '20%', '3.5', '--lookup_path', tmp_path / 'none']
    assert run_here(monkeypatch, 'parsing_model.py', [*words, '--save_path', tmp_path / 'model.config']) == 2
    assert 'model_3.5.config: cannot be written' in capsys.readouterr().err and not paths[0].exists()
