"""Files are written whole or not at all, and files are not code: nothing that is read runs anything."""

import errno
import io
import os
import pickle
import random
import zipfile
from pathlib import Path

import pytest
import torch
from bad_files import good_flags, run_here, words_of, write_searched, write_table
from training_runs import make_data, small_config

import tools.files
from models.model_eval import NetworkEval, start_from_weights
from tools.checkpoint import keep_previous, previous_of
from tools.errors import BadInput
from tools.files import load_checkpoint, read_weights, save_checkpoint, write_text

# --- hostile files


class Calls:
    """Pickled as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def evil_pickles(marker):
    """Pickles of all kinds, each of which makes the file `marker` where it is loaded by a careless reader."""
    command, system = f'echo ran >> {marker}', b'cposix\nsystem\n'
    text = b'X' + len(command).to_bytes(4, 'little') + command.encode()
    call = text + b'\x85R'
    found = {
        'inst': b'(' + text + b'iposix\nsystem\n.',
        'obj': b'(' + system + text + b'o.',
        'memo': b'\x80\x02' + system + b'q\x000h\x00' + call + b'.',
        'in a key': b'\x80\x02}' + system + call + b'X\x01\x00\x00\x00xs.',
        'persistent': b'\x80\x02' + system + call + b'Q.',
        'popen': b'\x80\x02csubprocess\nPopen\n((X\x02\x00\x00\x00shX\x02\x00\x00\x00-c' + text + b'ttR.',
    }
    for protocol in (0, 2, 4):
        found[f'system, protocol {protocol}'] = pickle.dumps({'base': Calls(os.system, command)}, protocol)
        code = f'open({str(marker)!r}, "a").write("ran")'
        found[f'exec, protocol {protocol}'] = pickle.dumps({'base': 1.0, 'meta': Calls(exec, code)}, protocol)
        nested = [{'state_dict': {'module.x': [Calls(os.system, command)]}}]
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
    for name, data in evil_pickles(marker).items():
        marker.unlink(missing_ok=True)
        unpickler = pickle.Unpickler(io.BytesIO(data))  # noqa: S301  (the careless reader)
        unpickler.persistent_load = lambda key: key
        value = unpickler.load()
        if name == 'popen':
            value.wait()
        assert marker.exists(), name


@pytest.mark.parametrize(('script', 'flag', 'changes'), READERS)
def test_no_flag_runs_what_it_reads(script, flag, changes, files, marker, tmp_path, monkeypatch, capsys):
    save = tmp_path / 'save'
    save.mkdir()
    flags = good_flags(script, files, files / 'table.pkl', save) | changes
    forms = list(evil_pickles(marker).values())
    if 'list' not in flag and flag not in ('image', 'classes'):  # as torch's files too, where a few stand for all
        forms += [form for data in forms[-3:] for form in (as_zip(data, files / 'weights.pth.tar'), as_legacy(data))]
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
    for data in evil_pickles(marker).values():
        for form in (data, as_zip(data, files / 'weights.pth.tar'), as_legacy(data)):
            path.write_bytes(form)
            with pytest.raises(BadInput, match='cannot be read as a checkpoint') as caught:
                load_checkpoint(path)
            assert 'weights_only' not in str(caught.value)  # torch's advice is to run the file's code
    assert not marker.exists()


# --- good files, and those of others


@pytest.mark.parametrize('prefix', ['', 'module.'])
@pytest.mark.parametrize('key', ['state_dict', 'model', ''])
@pytest.mark.parametrize('former', [False, True])
def test_weights_are_found_in_checkpoints_and_state_dicts(tmp_path, prefix, key, former):
    net, other = NetworkEval(small_config()), NetworkEval(small_config())
    state = {prefix + name: value for name, value in net.state_dict().items() if 'num_batches' not in name}
    data = {key: state, 'epoch': 3} if key else state
    torch.save(data, tmp_path / 'w.pth', _use_new_zipfile_serialization=not former)
    start_from_weights(other, tmp_path / 'w.pth')
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in net.state_dict().items())


def test_a_classifier_of_other_classes_is_left_out_and_another_network_refused(tmp_path):
    net, other = NetworkEval(small_config()), NetworkEval(small_config().with_classes(7))
    torch.save(net.state_dict(), tmp_path / 'w.pth')
    before = other.classifier.linear.weight.clone()
    start_from_weights(other, tmp_path / 'w.pth')
    assert torch.equal(other.classifier.linear.weight, before)
    assert torch.equal(other.first_stem.conv.weight, net.first_stem.conv.weight)
    torch.save({'backbone.weight': torch.ones(1)}, tmp_path / 'w.pth')
    with pytest.raises(BadInput, match='weights of another network'):
        start_from_weights(other, tmp_path / 'w.pth')


def test_a_type_that_is_not_read_is_named(tmp_path):
    torch.save({'state_dict': {}, 'path': Path('a')}, tmp_path / 'w.pth')
    with pytest.raises(BadInput, match=r'holds a pathlib\.PosixPath') as caught:
        read_weights(tmp_path / 'w.pth')
    assert '\x1b' not in str(caught.value) and '\n' not in str(caught.value)


def test_any_flipped_bit_is_found_or_harmless(tmp_path):
    rng, path = random.Random(0), tmp_path / 'file'
    good = {'weights': torch.randn(40), 'step': 3, 'names': ['a', 'b']}
    torch.save(good, path)
    content = path.read_bytes()
    found = 0
    for _ in range(400):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged[: rng.randrange(len(content))] if rng.random() < 0.2 else damaged)
        try:
            loaded = load_checkpoint(path)
        except BadInput:
            found += 1
        else:
            assert torch.equal(loaded.pop('weights'), good['weights']) and loaded == {'step': 3, 'names': ['a', 'b']}
    assert found > 100


# --- writing


def test_the_previous_file_is_kept_also_without_hard_links(tmp_path, monkeypatch):
    path = tmp_path / 'checkpoint.pth.tar'

    def save(value):
        save_checkpoint({'n': value}, path, lambda: keep_previous(path))

    def refuse(*_):
        raise OSError('no hard links here')

    save(1)
    save(2)
    assert (load_checkpoint(path), load_checkpoint(previous_of(path))) == ({'n': 2}, {'n': 1})
    monkeypatch.setattr(os, 'link', refuse)
    save(3)
    with pytest.raises(Exception, match='pickle'):
        save(lambda: 0)
    assert (load_checkpoint(path), load_checkpoint(previous_of(path))) == ({'n': 3}, {'n': 2})
    assert sorted(p.name for p in tmp_path.iterdir()) == ['checkpoint.previous.pth.tar', 'checkpoint.pth.tar']


@pytest.mark.parametrize(('code', 'fails'), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_file_systems_without_fsync_of_folders_take_files(tmp_path, monkeypatch, code, fails):
    def fsync(handle, call=os.fsync):
        if os.path.isdir(f'/proc/self/fd/{handle}'):
            raise OSError(code, os.strerror(code))
        call(handle)

    monkeypatch.setattr(tools.files.os, 'fsync', fsync)
    if fails:
        with pytest.raises(OSError, match='Input/output error'):
            write_text(tmp_path / 'a.txt', 'whole')
    else:
        write_text(tmp_path / 'a.txt', 'whole')
        assert (tmp_path / 'a.txt').read_text() == 'whole'
