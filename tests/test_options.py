"""Flags: groups and help, dashes, files of flags, and scripts called from Python."""

import importlib
import re
import sys

import pytest

from conftest import ROOT
from tools.needed import NEEDED
from tools.options import Parser, count, run_script

SCRIPTS = ['train_search', 'parsing_model', 'train_eval', 'train_eval_amp', 'test', 'latency_pkl.make_lat_lut']
SCRIPTS += ['dataset.make_lists', 'tools.plots', 'benchmarks.search_step', 'dataset.demo.unpack']
USERS = SCRIPTS[:8]
"""The scripts of the steps, whose flags all have a group and a sentence."""


@pytest.fixture
def shown(monkeypatch, capsys):
    """Function of a script: its help on a terminal of 80 columns."""

    def help_of(script):
        monkeypatch.setenv('COLUMNS', '80')
        monkeypatch.setattr(sys, 'argv', [f'{script}.py', '--help'])
        with pytest.raises(SystemExit):
            importlib.import_module(script).get_args()
        return capsys.readouterr().out

    return help_of


def small_parser():
    parser = Parser('A parser.')
    parser.groups['data'].add_argument('--img_size', type=count(32), default=224)
    parser.groups['output'].add_argument('--note', default='try')
    parser.add_argument('--no-tf32', action='store_true')
    parser.add_argument('--sizes', nargs='+', default=[1])
    return parser


@pytest.mark.parametrize('script', SCRIPTS)
def test_a_help_fits_80_columns(script, shown):
    text = shown(script)
    assert [line for line in text.splitlines() if len(line) > 80] == []
    for command in re.findall(r'^    (?:python|torchrun) .*\n', text, re.MULTILINE):
        assert ' --' not in command or command.count('python ') <= 1  # one command a line


@pytest.mark.parametrize('script', USERS)
def test_every_flag_has_a_group_and_a_sentence(script, shown):
    text = shown(script)
    ungrouped = text.split('\noptions:\n')[1].split('\n\n')[0]
    assert re.findall(r'^  (-.*?)(?: {2,}|$)', ungrouped, re.MULTILINE) == ['-h, --help']
    flags = re.split(r'\n  (?=--)', text.split('\noptions:\n')[1])[1:]
    for flag in flags:
        words = re.sub(r'\(default:.*?\)', '', ' '.join(re.split(r' {2,}|\n', flag, maxsplit=1)[1].split()))
        assert len(words.split()) >= 2, flag


def test_examples_keep_their_line_ends(shown):
    assert ' \\\n        --' in shown('train_search')


@pytest.mark.parametrize('flag', ['--img_size', '--img-size'])
@pytest.mark.parametrize('form', ['{} 64', '{}=64'])
def test_dashes_and_underscores_are_one(flag, form):
    assert small_parser().parse_args(form.format(flag).split()).img_size == 64
    assert small_parser().parse_args(['--no_tf32', '--note', 'a-b_c']).note == 'a-b_c'


def test_a_file_of_flags(tmp_path):
    path = tmp_path / 'flags.txt'
    path.write_text('# for trials\n--img_size 64   # small\n--note "two words"\n\n--sizes 1 2\n')
    args = small_parser().parse_args([f'@{path}', '--note', 'later'])
    assert (args.img_size, args.note, args.sizes) == (64, 'later', ['1', '2'])
    assert small_parser().parse_args([f'@{path}']).note == 'two words'


@pytest.mark.parametrize('content', [None, b'--note "open', b'--note \xff', b'--img_size 64 extra'])
def test_a_bad_file_of_flags_is_one_line(content, tmp_path, capsys):
    path = tmp_path / 'flags.txt'
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        small_parser().parse_args([f'@{path}'])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and ('extra' in line or 'flags.txt' in line)


def test_a_flag_that_is_on_by_default_can_be_off():
    words = ['--img_root', 'x', '--no-report', '--no_tf32', '--target-lat', '50%', '--keep_checkpoints', 'all']
    args = importlib.import_module('train_search').get_args(words)
    assert (args.report, args.tf32, args.target_lat, args.keep_checkpoints) == (False, False, '50%', None)


@pytest.mark.parametrize('script', [*SCRIPTS[:8], 'dataset.demo.unpack'])
def test_without_packages_a_script_is_one_line(script, run_script):
    words = ['-m', script] if script == 'tools.plots' else [script.replace('.', '/') + '.py']
    (line,) = run_script('-S', *words, code=2).stderr.splitlines()  # -S: without installed packages
    assert 'has no torch, torchvision, ' in line and 'pip install -r ' in line


def test_the_packages_that_scripts_look_for_are_those_required():
    required = re.findall(r'^[\w-]+', (ROOT / 'requirements.txt').read_text(), re.MULTILINE)
    required = {{'pillow': 'PIL'}.get(name, name) for name in required}
    assert set(NEEDED) == required - {'matplotlib'}  # which pictures alone need


def test_an_interrupt_is_one_line(capsys):
    def main(args):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        run_script(main, None)
    assert end.value.code == 130 and capsys.readouterr().err.endswith(': interrupted\n')


def test_help_names_no_empty_default(capsys):
    parser = Parser('A script.')
    parser.add_argument('--many', default=[], nargs='+', help='some')
    parser.add_argument('--zero', default=0, help='none')
    with pytest.raises(SystemExit):
        parser.parse_args(['--help'])
    shown = capsys.readouterr().out
    assert '(default: )' not in shown and 'none (default: 0)' in shown
