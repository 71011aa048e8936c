"""Bad input of every kind ends in one line on stderr that names it, exit code 2, and no folder left behind."""

import copy
import re
import sys

import numpy as np
import pytest
import torch
from bad_files import CLASSES, SCRIPTS, good_flags, run_here, words_of, write_searched, write_table
from PIL import Image
from training_runs import make_data, small_config

from models.model_eval import NetworkEval
from tools.options import Parser


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """Images, lists, a config and weights that are good; and beside them such as are bad in one way each."""
    folder = make_data(tmp_path_factory.mktemp('files'))
    image, lines = folder / 'class 0' / '0.png', (folder / 'train.txt').read_text()
    spoiled = {
        'empty': '',
        'no_label': lines + 'image.png\n',
        'word': lines + 'class 0/1.png zero\n',
        'negative': 'class 0/0.png -1\n' + lines,
        'too_large': 'class 0/0.png 3\n' + lines,
        'huge': f'class 0/0.png {"9" * 5000}\n' + lines,
        'absolute': f'{image} 0\n' + lines,
        'leaving': '../x/0.png 0\n' + lines,
        'absent_image': 'class 0/absent.png 0\n' + lines,
        'damaged': 'class 0/0.png 0\nclass 0/text.png 0\n' * 8 + 'class 0/0.png 0\n',
        'one_image': 'class 0/0.png 0\n',
    }
    for name, text in spoiled.items():
        (folder / f'{name}.txt').write_text(text)
    (folder / 'binary.txt').write_bytes(b'\xff\xfe\x00\x01' * 20)
    (folder / 'class 0' / 'text.png').write_text('not an image')
    torch.save(NetworkEval(small_config()).state_dict(), folder / 'weights.pth.tar')
    torch.save(NetworkEval(small_config(batch_norm=False)).state_dict(), folder / 'other.pth.tar')
    (folder / 'truncated.pth.tar').write_bytes((folder / 'weights.pth.tar').read_bytes()[:-2000])
    (folder / 'text.pth.tar').write_text('hello')
    five = small_config().with_classes(5)
    torch.save(NetworkEval(five).state_dict(), folder / 'five.pth.tar')
    write_searched(folder / 'searched.pth.tar')
    write_table(folder / 'table.pkl')
    write_table(folder / 'other_size.pkl', img_size=64)
    write_table(folder / 'seconds.pkl', base=1e-5, change=lambda curves: [c.__imul__(1e-6) for c in curves.values()])
    write_table(folder / 'nan.pkl', change=lambda curves: next(iter(curves.values())).__setitem__(-1, np.nan))
    (folder / 'cut.pkl').write_bytes((folder / 'table.pkl').read_bytes()[:-500])
    return folder


@pytest.fixture
def refused(files, tmp_path, monkeypatch, capsys):
    """Run a script with some flags changed; returns the one line on stderr."""

    def check(script, code=2, more=(), **changes):
        save = tmp_path / 'save'
        save.mkdir()
        flags = good_flags(script, files, files / 'table.pkl', save) | {
            name: files / value[1:] if str(value).startswith('@') else value for name, value in changes.items()
        }
        assert run_here(monkeypatch, script, [*words_of(flags), *more]) == code
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and 'Traceback' not in error, error
        assert error.startswith(f'{script.split("/")[-1]}: error: ') or error.startswith(f'{script}: error: ')
        assert not list(save.iterdir())
        return error

    return check


LISTS = [
    ('absent.txt', 'absent.txt: cannot be read (No such file'),
    ('binary.txt', 'binary.txt: cannot be read'),
    ('empty.txt', "empty.txt: is empty; expected lines of 'relative/path label'"),
    ('no_label.txt', "no_label.txt:41: 'image.png' has no label"),
    ('word.txt', "label 'zero' should be a whole number from 0 to 2"),
    ('negative.txt', "negative.txt:1: label '-1' should be a whole number from 0 to 2"),
    ('too_large.txt', "too_large.txt:1: label '3'"),
    ('huge.txt', "huge.txt:1: label '99999"),
    ('absolute.txt', 'absolute.txt:1: path'),
    ('leaving.txt', "leaving.txt:1: path '../x/0.png' leaves the image root"),
    ('absent_image.txt', 'no file class 0/absent.png under'),
]


@pytest.mark.parametrize(('name', 'message'), LISTS)
@pytest.mark.parametrize('script', ['train_search.py', 'train_eval.py'])
def test_bad_lists(refused, script, name, message):
    flag = 'train_list' if script == 'train_search.py' else 'val_list'
    assert message in refused(script, **{flag: f'@{name}'})


@pytest.mark.parametrize(('name', 'message'), LISTS[2:6])
def test_bad_lists_to_test_on(refused, name, message):
    assert message in refused('test.py', val_list=f'@{name}')


FLAGS = [
    ('train_search.py', {'lookup_path': '@absent.pkl'}, 'absent.pkl: no latency table there'),
    ('train_search.py', {'lookup_path': '@other_size.pkl'}, 'keys of input size 32 are missing'),
    ('train_search.py', {'lookup_path': '@seconds.pkl'}, 'are these seconds? Tables are in ms'),
    ('train_search.py', {'lookup_path': '@nan.pkl'}, 'is nan, should be a latency in ms'),
    ('train_search.py', {'lookup_path': '@cut.pkl'}, 'cut.pkl: not a latency table'),
    ('train_search.py', {'lookup_path': '@train.txt'}, 'train.txt: refused, the file asks for'),
    ('train_search.py', {'target_lat': '0'}, '--target_lat 0: should be from'),
    ('train_search.py', {'target_lat': '-3'}, '--target_lat -3: should be from'),
    ('train_search.py', {'target_lat': '1e9'}, '--target_lat 1e9: should be from'),
    ('train_search.py', {'target_lat': 'nan'}, '--target_lat nan: should be from'),
    ('train_search.py', {'target_lat': '101%'}, '--target_lat 101%: should be from'),
    ('train_search.py', {'target_lat': 'fast'}, '--target_lat fast: should be from'),
    ('train_search.py', {'warmup_epochs': 2}, '--warmup_epochs 2 should be at most --epochs 1'),
    ('train_search.py', {'largest_epochs': 1}, '--largest_epochs 1 should be below --warmup_epochs 0'),
    ('train_search.py', {'train_list': '@one_image.txt'}, '1 images are fewer than one batch of --batch_size 4'),
    ('train_search.py', {'val_list': None}, '--val_list is missing: give both lists, or neither'),
    ('train_search.py', {'train_list': None}, '--train_list is missing: give both lists, or neither'),
    ('train_search.py', {'width_divisor': 2, 'freedoms': ['operator']}, '--width_divisor 2 is of the freedom width'),
    ('train_search.py', {'batch_size': 1}, "--batch_size: '1' should be an int of at least 2"),
    ('train_search.py', {'width_divisor': 1000}, '--width_divisor 1000'),
    ('train_search.py', {'device': 'cuda'}, '--device cuda: no CUDA GPU is available here'),
    ('train_search.py', {'save': '/proc/none'}, '--save /proc/none: cannot make a run folder'),
    ('train_search.py', {'save': '@train.txt'}, 'train.txt: cannot make a run folder'),
    ('train_search.py', {'note': '../x'}, "--note '../x'"),
    ('train_search.py', {'img_root': '@absent'}, 'no file class'),
    ('train_search.py', {'num_classes': 70000}, "--num_classes: '70000' should be"),
    ('train_search.py', {'snapshot': '@absent.pth.tar'}, '--snapshot'),
    ('train_search.py', {'snapshot': '@text.pth.tar'}, '--snapshot'),
    ('train_search.py', {'train_list': '@damaged.txt'}, 'text.png: cannot be read as an image'),
    ('train_search.py', {'train_list': '@damaged.txt', 'device_aug': True}, 'text.png: cannot be read as an image'),
    ('train_search.py', {'tagret_lat': '3'}, '--tagret_lat=3'),
    ('train_search.py', {'batchsize': '3'}, '--batchsize=3'),
    ('train_eval.py', {'train_list': '@damaged.txt'}, 'text.png: cannot be read as an image'),
    ('train_eval.py', {'batch_size': 1}, '--batch_size 1: batch norm needs two images'),
    ('train_eval.py', {'train_list': '@one_image.txt'}, '1 images are fewer than one batch'),
    ('train_eval.py', {'train_list': None}, '--train_list is missing: give both lists, or neither'),
    ('parsing_model.py', {'rounds': 2}, '--rounds 2 is of measured latencies: give --print_lat'),
    ('train_eval.py', {'config_path': '@train.txt'}, 'train.txt'),
    ('train_eval.py', {'config_path': '@absent.config'}, 'absent.config: cannot be read'),
    ('train_eval.py', {'config_path': None, 'model_path': '@weights.pth.tar'}, 'neither a model.config nor a searched'),
    ('train_eval.py', {'config_path': None, 'model_path': '@text.pth.tar'}, 'cannot be read as a checkpoint'),
    ('train_eval.py', {'config_path': None}, 'one of the arguments --model_path --config_path is required'),
    ('train_eval.py', {'model_path': '@searched.pth.tar'}, 'not allowed with argument'),
    ('train_eval.py', {'device': 'cuda'}, '--device cuda: no CUDA GPU'),
    ('train_eval.py', {'save': '/proc/none'}, '--save /proc/none'),
    ('train_eval.py', {'snapshot': '@weights.pth.tar'}, '--snapshot'),
    ('train_eval.py', {'snapshot': '@truncated.pth.tar'}, '--snapshot'),
    ('train_eval.py', {'device_aug': True, 'auto_augment': 'randaugment'}, '--auto_augment randaugment'),
    ('train_eval_amp.py', {'opt_level': 'O5'}, "--opt_level: invalid choice: 'O5'"),
    ('train_eval_amp.py', {'loss_scale': '0'}, '--loss_scale'),
    ('test.py', {'weights': '@absent.pth.tar'}, 'absent.pth.tar: cannot be read as a checkpoint'),
    ('test.py', {'weights': '@text.pth.tar'}, 'text.pth.tar: cannot be read as a checkpoint'),
    ('test.py', {'weights': '@truncated.pth.tar'}, 'truncated.pth.tar: cannot be read as a checkpoint'),
    ('test.py', {'weights': '@other.pth.tar'}, 'other.pth.tar: weights of another network'),
    ('test.py', {'weights': '@five.pth.tar'}, 'five.pth.tar is for 5 classes, --num_classes is 3'),
    ('test.py', {'num_classes': 5}, 'is for 3 classes, --num_classes is 5'),
    ('test.py', {'val_list': '@damaged.txt'}, 'text.png: cannot be read as an image'),
    ('test.py', {'image': '@class 0/text.png'}, 'text.png: cannot be read as an image (not an image'),
    ('test.py', {'export_predictions': '/none/x.csv'}, '--export_predictions /none/x.csv: its folder does not exist'),
    ('test.py', {'val_list': None, 'val_root': '@class 0'}, 'no class folders in it'),
    ('test.py', {'val_root': None, 'image': '@class 0/0.png'}, '--val_list needs a --val_root'),
    ('test.py', {'val_root': None, 'val_list': None}, 'give --val_root (and --val_list), or --image'),
    ('parsing_model.py', {'save_path': '/none/x.config'}, '--save_path /none/x.config: its folder does not exist'),
    ('parsing_model.py', {'target_lat': ['3'], 'lookup_path': '@table.pkl'}, '--target_lat needs a searched model'),
    ('parsing_model.py', {'config_path': '@text.pth.tar'}, 'text.pth.tar'),
    (
        'parsing_model.py',
        {
            'config_path': None,
            'model_path': '@searched.pth.tar',
            'lookup_path': '@table.pkl',
            'target_lat': ['50%', '999'],
        },
        '--target_lat 999',
    ),
    ('parsing_model.py', {'print_lat': True, 'lookup_path': '@cut.pkl'}, 'not a latency table'),
    ('latency_pkl/make_lat_lut.py', {'save_path': '/none/x.pkl'}, '--save_path /none/x.pkl: its folder does not'),
    (
        'latency_pkl/make_lat_lut.py',
        {'check': '@absent.pkl', 'metric': None, 'save_path': None},
        'absent.pkl: no latency table there',
    ),
    ('dataset/make_lists.py', {'img_root': '@absent'}, 'absent: no such folder'),
    ('dataset/make_lists.py', {'img_root': '@class 0'}, 'no class folders in it'),
    ('dataset/make_lists.py', {'classes': '@empty.txt'}, 'empty.txt: names no classes'),
    ('dataset/make_lists.py', {'list': None}, 'give --to, or --list, or both'),
    ('dataset/make_lists.py', {'list': '@train.txt/list.txt'}, 'list.txt: its folder cannot be made'),
]


@pytest.mark.parametrize(('script', 'changes', 'message'), FLAGS)
def test_bad_flags_and_files(refused, script, changes, message):
    assert message in refused(script, **changes)


class _Captured(Exception):
    pass


def numeric_flags(script, monkeypatch):
    """The flags of a script that take numbers of their own range."""

    def capture(parser, *_):
        raise _Captured(parser)

    monkeypatch.setattr(Parser, 'parse_args', capture)
    with pytest.raises(_Captured) as caught:
        SCRIPTS[script].get_args()
    monkeypatch.undo()
    return [a.option_strings[0] for a in caught.value.args[0]._actions if a.type not in (None, str)]


@pytest.mark.parametrize('script', SCRIPTS)
def test_every_numeric_flag_refuses_what_is_no_number_of_its_range(script, monkeypatch, capsys):
    flags = numeric_flags(script, monkeypatch)
    assert len(flags) >= {'dataset/make_lists.py': 2, 'dataset/demo/unpack.py': 1}.get(script, 4)
    for flag in flags:
        for text in ('nan', 'inf', '-inf', '-1', '1e999', 'x', '', '0x10', '9' * 5000):
            assert run_here(monkeypatch, script, [f'{flag}={text}']) == 2
            error = capsys.readouterr().err
            assert flag in error and len(error.splitlines()) == 1 and 'required' not in error, (flag, text, error)


@pytest.mark.parametrize(
    ('script', 'flags'),
    [
        ('train_search.py', 'epochs batch_size T w_lr a_lr grad_clip T_decay num_classes img_size print_freq'),
        ('train_eval.py', 'epochs batch_size lr grad_clip grad_accum max_steps num_classes img_size print_freq'),
        ('test.py', 'batch_size num_classes img_size'),
        ('latency_pkl/make_lat_lut.py', 'batch_size threads img_size num_classes budget networks rounds'),
        ('parsing_model.py', 'num_classes img_size threads rounds'),
    ],
)
def test_zero_is_refused_where_it_means_nothing(script, flags, monkeypatch, capsys):
    for flag in flags.split():
        assert run_here(monkeypatch, script, [f'--{flag}=0']) == 2
        assert re.fullmatch(rf".*: error: argument --{flag}: '0' should be an? .*\n", capsys.readouterr().err)


@pytest.mark.parametrize('value', ['31', '4097', '32.5'])
def test_input_sizes_have_bounds(value, monkeypatch, capsys):
    assert run_here(monkeypatch, 'train_search.py', [f'--img_size={value}']) == 2
    assert f"'{value}' should be an int of at least 32 and at most 4096" in capsys.readouterr().err


def test_from_the_shell_too(files, tmp_path, run_script):
    flags = good_flags('train_search.py', files, files / 'table.pkl', tmp_path)
    flags |= {'train_list': files / 'damaged.txt', 'workers': 2}
    done = run_script('train_search.py', *words_of(flags), code=2)
    assert 'text.png: cannot be read as an image' in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('script', 'changes'),
    [
        ('train_search.py', {'num_classes': None, 'batch_size': 16, 'no-report': True}),
        ('train_eval.py', {'num_classes': None, 'no-report': True}),
        ('train_eval_amp.py', {'num_classes': None, 'no-report': True, 'opt_level': 'O1'}),
        ('parsing_model.py', {'config_path': None, 'model_path': '@searched.pth.tar', 'target_lat': ['50%', '60%']}),
        ('parsing_model.py', {}),
        ('test.py', {'num_classes': None}),
        ('dataset/make_lists.py', {}),
    ],
)
def test_the_good_files_are_good_and_args_are_only_read(files, tmp_path, monkeypatch, capsys, script, changes):
    """Otherwise the tests above could be refused for another reason."""
    flags = good_flags(script, files, files / 'table.pkl', tmp_path) | {
        name: files / value[1:] if str(value).startswith('@') else value for name, value in changes.items()
    }
    flags |= {'lookup_path': files / 'table.pkl'} if 'target_lat' in changes else {}
    monkeypatch.setattr(sys, 'argv', [script, *words_of(flags)])
    args = SCRIPTS[script].get_args()
    before = copy.deepcopy(vars(args))
    assert not SCRIPTS[script].main(args)
    assert vars(args) == before
    out = capsys.readouterr()
    assert out.err == ''
    if 'num_classes' in changes:
        source = files / ('weights.pth.tar' if script == 'test.py' else 'train.txt')
        assert f'--num_classes {CLASSES}: from {"" if script == "test.py" else "the labels in "}{source}' in out.out


@pytest.mark.parametrize(('size', 'mode'), [((1, 1), 'L'), ((20000, 2), 'RGB')])
def test_an_image_of_odd_size_is_classified(files, tmp_path, monkeypatch, capsys, size, mode):
    Image.new(mode, size, 'white').save(tmp_path / 'odd.png')
    flags = good_flags('test.py', files, files / 'table.pkl', tmp_path) | {'image': tmp_path / 'odd.png'}
    assert run_here(monkeypatch, 'test.py', words_of(flags | {'val_list': None, 'val_root': None})) == 0
    assert capsys.readouterr().out.startswith('1. class ')
