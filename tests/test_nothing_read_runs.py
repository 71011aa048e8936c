"""Files are not code: pickles that would run a command do nothing but be refused, at every flag that reads a file."""

import io
import pickle
import struct
import zipfile

import pytest
import torch
from bad_files import good_flags, run_here, words_of, write_searched, write_table
from training_runs import make_data, small_config

from models.model_eval import NetworkEval
from tools.errors import BadInput
from tools.files import load_checkpoint

PROTO2, STOP, MARK, TUPLE1, REDUCE, EMPTY_DICT = b'\x80\x02', b'.', b'(', b'\x85', b'R', b'}'


def text(string):
    """The opcode that pushes a string."""
    raw = string.encode()
    return b'X' + struct.pack('<I', len(raw)) + raw


def assembled(command):
    """Pickles put together by hand, each with another opcode that calls or builds."""
    system = b'cposix\nsystem\n'
    by_name = b'\x80\x04' + text('posix') + text('system') + b'\x93'
    build = PROTO2 + b'ccollections\nOrderedDict\n)R' + EMPTY_DICT + text('__class__') + system + b'sb' + STOP
    arguments = text(command) + TUPLE1
    keyword = text('command') + text(command)
    return {
        'reduce': PROTO2 + system + arguments + REDUCE + STOP,
        'stack_global': by_name + arguments + REDUCE + STOP,
        'inst': MARK + text(command) + b'iposix\nsystem\n' + STOP,
        'obj': MARK + system + text(command) + b'o' + STOP,
        'newobj': PROTO2 + b'csubprocess\nPopen\n' + text(command) + TUPLE1 + b'\x81' + STOP,
        'newobj_ex': b'\x80\x04' + b'csubprocess\nPopen\n' + text(command) + TUPLE1 + EMPTY_DICT + b'\x92' + STOP,
        'build': build,
        'builtins_eval': PROTO2
        + b'cbuiltins\neval\n'
        + text(f'__import__("os").system({command!r})')
        + TUPLE1
        + REDUCE
        + STOP,
        'dotted': b'\x80\x04' + text('os') + text('system') + b'\x93' + b'\x94' + arguments + REDUCE + STOP,
        'memo': PROTO2 + system + b'q\x00' + b'0' + b'h\x00' + arguments + REDUCE + STOP,
        'in_a_key': PROTO2 + EMPTY_DICT + system + arguments + REDUCE + text('x') + b's' + STOP,
        'after_stop': PROTO2 + EMPTY_DICT + STOP + PROTO2 + system + arguments + REDUCE + STOP,
        'persistent': PROTO2 + system + arguments + REDUCE + b'Q' + STOP,
        'persistent_text': b'P' + command.encode().replace(b'\n', b' ') + b'\n' + STOP,
        'extension': PROTO2 + b'\x82\x01' + arguments + REDUCE + STOP,
        'keyword': b'\x80\x04' + b'csubprocess\nPopen\n' + b')' + EMPTY_DICT + keyword + b's' + b'\x92' + STOP,
        'getattr': PROTO2 + b'cbuiltins\ngetattr\n' + b'cos\nsystem\n' + text('__call__') + b'\x86' + REDUCE + STOP,
    }


class Calls:
    """Pickled as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def evil_pickles(marker):
    """(name, pickle) of all kinds, each of which makes the file `marker` where it is loaded by a careless reader."""
    import os

    command = f'echo ran >> {marker}'
    code = f'open({str(marker)!r}, "a").write("ran")'
    nested = [{'state_dict': {'module.x': [Calls(os.system, command)]}}]
    found = assembled(command)
    for protocol in range(6):
        found[f'system, protocol {protocol}'] = pickle.dumps({'base': Calls(os.system, command)}, protocol)
        found[f'exec, protocol {protocol}'] = pickle.dumps({'base': 1.0, 'meta': Calls(exec, code)}, protocol)
        found[f'nested, protocol {protocol}'] = pickle.dumps(nested, protocol)
    return found


def as_zip(data, good):
    """A checkpoint of torch's present format whose data.pkl is replaced."""
    out = io.BytesIO()
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(out, 'w') as target:
        for name in source.namelist():
            target.writestr(name, data if name.endswith('data.pkl') else source.read(name))
    return out.getvalue()


def as_legacy(data):
    """A checkpoint of torch's former format: magic number, protocol, system, then the object."""
    head = [0x1950A86A20F9469CFC6C, 1001, {'protocol_version': 1001, 'little_endian': True, 'type_sizes': {}}]
    return b''.join(pickle.dumps(part, 2) for part in head) + data + pickle.dumps([], 2)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """Good files of every kind."""
    folder = make_data(tmp_path_factory.mktemp('files'))
    torch.save(NetworkEval(small_config()).state_dict(), folder / 'weights.pth.tar')
    write_searched(folder / 'searched.pth.tar')
    write_table(folder / 'table.pkl')
    return folder


@pytest.fixture
def marker(tmp_path):
    return tmp_path / 'marker'


READERS = [
    ('train_search.py', 'lookup_path', {}),
    ('train_search.py', 'snapshot', {}),
    ('train_search.py', 'train_list', {}),
    ('train_search.py', 'val_list', {}),
    ('parsing_model.py', 'model_path', {'config_path': None}),
    ('parsing_model.py', 'config_path', {}),
    ('parsing_model.py', 'lookup_path', {'print_lat': True}),
    ('train_eval.py', 'model_path', {'config_path': None}),
    ('train_eval.py', 'config_path', {}),
    ('train_eval.py', 'snapshot', {}),
    ('train_eval.py', 'val_list', {}),
    ('train_eval_amp.py', 'model_path', {'config_path': None}),
    ('train_eval_amp.py', 'snapshot', {}),
    ('test.py', 'weights', {}),
    ('test.py', 'model_path', {'config_path': None}),
    ('test.py', 'config_path', {}),
    ('test.py', 'val_list', {}),
    ('test.py', 'image', {'val_list': None, 'val_root': None}),
    ('latency_pkl/make_lat_lut.py', 'check', {'metric': None, 'save_path': None}),
    ('dataset/make_lists.py', 'classes', {}),
]


def test_the_pickles_do_run_where_a_careless_reader_loads_them(marker):
    ran = set()
    for name, data in evil_pickles(marker).items():
        marker.unlink(missing_ok=True)
        unpickler = pickle.Unpickler(io.BytesIO(data))  # noqa: S301  (the careless reader)
        unpickler.persistent_load = lambda key: key
        try:
            unpickler.load()
        except Exception:
            pass
        if marker.exists():
            ran.add(name)
    assert {'reduce', 'stack_global', 'inst', 'obj', 'memo', 'builtins_eval', 'in_a_key', 'persistent'} <= ran
    assert sum('protocol' in name for name in ran) == 18


@pytest.mark.parametrize(('script', 'flag', 'changes'), READERS)
def test_no_flag_runs_what_it_reads(script, flag, changes, files, marker, tmp_path, monkeypatch, capsys):
    save = tmp_path / 'save'
    save.mkdir()
    flags = good_flags(script, files, files / 'table.pkl', save) | changes
    some = {name: data for name, data in evil_pickles(marker).items() if 'protocol' not in name or name[-1] in '024'}
    forms = list(some.values())
    if 'list' not in flag and flag not in ('image', 'classes'):  # as torch's files too, where a few stand for all
        few = [some[name] for name in ('reduce', 'stack_global', 'memo', 'nested, protocol 2')]
        forms += [as_zip(data, files / 'weights.pth.tar') for data in few] + [as_legacy(data) for data in few]
    for data in forms:
        evil = tmp_path / 'evil.pth.tar'
        evil.write_bytes(data)
        code = run_here(monkeypatch, script, words_of(flags | {flag: evil}))
        error = capsys.readouterr().err
        assert not marker.exists(), data
        if flag != 'classes':  # any text names classes; there are no such folders
            assert code == 2 and len(error.splitlines()) == 1 and 'Traceback' not in error, (data, error)
        assert not list(save.iterdir())


def test_checkpoints_of_every_form_are_refused(files, marker, tmp_path):
    path = tmp_path / 'evil.pth.tar'
    for name, data in evil_pickles(marker).items():
        for form in (data, as_zip(data, files / 'weights.pth.tar'), as_legacy(data)):
            path.write_bytes(form)
            if name == 'after_stop':  # what follows is never looked at
                continue
            with pytest.raises(BadInput, match='cannot be read as a checkpoint'):
                load_checkpoint(path)
    assert not marker.exists()


def test_good_files_of_torchs_former_format_are_read(files, tmp_path):
    state = NetworkEval(small_config()).state_dict()
    torch.save(state, tmp_path / 'old.pth', _use_new_zipfile_serialization=False)
    assert load_checkpoint(tmp_path / 'old.pth').keys() == state.keys()
