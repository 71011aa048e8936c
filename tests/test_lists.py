"""Lists and folders: the three rules, splits, links, leftovers, make_lists.py, class names."""

import os

import pytest
from bad_files import run_here

from dataset.demo.unpack import unpack
from dataset.lists import (
    check_labels,
    class_names,
    find_roots,
    list_folder,
    list_like,
    parse_list,
    read_classes,
    read_list,
    read_numbering,
    split_by_class,
    split_folder,
    training_flags,
    write_list,
)
from tools.errors import BadInput

TEN = [f'c{i}' for i in range(10)]


def fill(root, names, count=2):
    """Make class folders of empty images."""
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (root / name / f'{i}.jpg').touch()
    return root


def lines(*folders, start=0):
    return [(f'{folder}/{i}.jpg', label) for label, folder in enumerate(folders, start) for i in range(2)]


def labels_of(path):
    """The label of each outer folder in a list."""
    return {(relative.split('/')[0], label) for relative, label in parse_list(path)}


@pytest.fixture
def lister(monkeypatch, capsys):
    """Run make_lists.py in this process; returns its output, or the one line of an error."""

    def run(*words, code=0):
        assert run_here(monkeypatch, 'dataset/make_lists.py', words) == code
        said = capsys.readouterr()
        assert len(said.err.splitlines()) == bool(code)
        return said.err or said.out

    return run


# --- list files


def test_lists_hold_paths_with_spaces_crlf_and_bom(tmp_path, caplog):
    fill(tmp_path, ['a b'])
    (tmp_path / 'list.txt').write_bytes('\ufeffa b/0.jpg 4\r\n\r\na b/0.jpg\t0\r\n'.encode())
    assert read_list(tmp_path / 'list.txt', tmp_path, 5) == [('a b/0.jpg', 4), ('a b/0.jpg', 0)]
    assert 'no images of 3 of 5 classes' in caplog.text
    for bad in ('a/\udcff.png', 'a/b\n.png'):
        with pytest.raises(BadInput, match='line break or not in UTF-8'):
            write_list([(bad, 0)], tmp_path / 'bad.txt')
    assert not (tmp_path / 'bad.txt').exists()


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('\n \n', 'is empty'),
        ('x.png 0\nx.png\n', r"list.txt:2: 'x.png'"),
        ('x.png 0\nx.png -1\n', "list.txt:2: label '-1'.*from 0 to 2"),
        ('x.png 3\n', "list.txt:1: label '3'.*from 0 to 2"),
        ('/x.png 0\n', "'/x.png' leaves the image root"),
        ('a/../../x.png 0\n', 'leaves the image root'),
        ('y.png 0\n', 'no file y.png under'),
    ],
)
def test_bad_lists_are_refused_by_line(tmp_path, text, message):
    (tmp_path / 'x.png').touch()
    (tmp_path / 'list.txt').write_text(text)
    with pytest.raises(BadInput, match=message):
        read_list(tmp_path / 'list.txt', tmp_path, 3)


# --- labels and their folders


def test_a_folder_with_two_labels_is_refused():
    train = lines(*TEN)
    for before in ('', 'x/'):
        shifted = [(before + path, label) for path, label in lines('c0', 'c2', 'c3')]
        check_labels({'t': train, 'v': [(before + path, label) for path, label in train[::2]]})
        if not before:
            with pytest.raises(BadInput, match='folder c2 has label 2 in t and 1 in v; .* --like'):
                check_labels({'t': train, 'v': shifted})
    with pytest.raises(BadInput, match='folder c4 has label . in t and . in t'):
        check_labels({'t': [*train, ('c4/9.jpg', 7)], 'v': train})
    flat, patients = [(f'{i}.jpg', i) for i in range(9)], [(f'p{i // 2}/{i}.jpg', i % 2) for i in range(9)]
    check_labels({'t': train, 'v': flat})
    with pytest.raises(BadInput, match='folder p0 has label .* give the folder above'):
        check_labels({'t': patients})
    check_labels({'t': [(f'images/{path}', label) for path, label in patients]})  # as the message says


@pytest.mark.parametrize(
    ('samples', 'names'),
    [
        (lines('cat', 'hot dog'), ['cat', 'hot dog']),
        (lines('train/cat', 'train/dog'), ['cat', 'dog']),
        (lines('cat/brown', 'dog/brown'), ['cat', 'dog']),
        (lines('dog', start=2), ['0', '1', 'dog']),
        (lines('crane', 'ox') + lines('bird'), None),
        ([('./x.jpg', 0), ('cat/y.jpg', 1)], None),
        ([('all/x.jpg', 0), ('all/y.jpg', 1)], None),
    ],
)
def test_labels_are_named_by_their_folders(samples, names):
    assert class_names(samples) == class_names(samples[::-1]) == names


def test_a_list_like_another_keeps_its_labels(tmp_path, lister):
    fill(tmp_path / 'train', TEN)
    fill(tmp_path / 'val', [*TEN[:3], 'c35', *TEN[4:]])
    train, val = tmp_path / 'train.txt', tmp_path / 'val.txt'
    lister('--img_root', tmp_path / 'train', '--list', train)
    out = lister('--img_root', tmp_path / 'val', '--list', val, '--like', train)
    assert labels_of(train) == {(name, i) for i, name in enumerate(TEN)}
    assert labels_of(val) == labels_of(train) - {('c3', 3)}
    assert 'lacks 1 of 10 classes: c3' in out and 'left out 1 folders without a label: c35' in out


@pytest.mark.parametrize(
    'text', ['x.jpg 0\ny.jpg 1\n', 'all/x.jpg 0\nall/y.jpg 1\n', 'x.jpg\n', 'no/x.jpg 0\nit/y.jpg 1']
)
def test_a_list_that_cannot_be_followed_is_refused(tmp_path, text):
    (tmp_path / 'like.txt').write_text(text)
    with pytest.raises(BadInput):
        list_like(fill(tmp_path / 'val', 'ab'), read_numbering(tmp_path / 'like.txt'))


# --- folders


@pytest.mark.parametrize(
    ('folders', 'train', 'val'),
    [
        (['train/a', 'train/b', 'val/a', 'val/b', 'test/a', 'test/b'], 'train', 'val'),
        (['x/TRAIN/a', 'x/TRAIN/b', 'x/Valid/a', 'x/Valid/b'], 'x/TRAIN', 'x/Valid'),
        (['Train/a', 'Train/b', 'validation/a', 'validation/b', '__MACOSX/a'], 'Train', 'validation'),
        (['train/a', 'train/b', 'test/a', 'test/b'], 'train', 'test'),
        (['a', 'b/x', 'b/y'], '.', '.'),
        (['photos/a', 'photos/b'], 'photos', 'photos'),
        (['train', 'bus'], '.', '.'),
    ],
)
def test_training_and_validation_folders_are_found_by_name(tmp_path, lister, folders, train, val):
    root, to = fill(tmp_path / 'data', folders, count=5), tmp_path / 'lists'
    assert find_roots(root) == (root / train, root / val)
    out = ' '.join(lister('--img_root', root, '--to', to).replace('\\\n', '').split())
    assert len(labels_of(to / 'train.txt')) == 2 and labels_of(to / 'train.txt') == labels_of(to / 'val.txt')
    lists = {path.stem: path.read_text().splitlines() for path in to.iterdir()}
    assert sorted(lists['search_train'] + lists['search_val']) == sorted(lists['train'])
    assert len(lists['classes']) == 2 and f'--img_root {root / train} --train_list {to}/search_train.txt' in out
    assert ('left out test' in out) == (len(folders) == 6)


@pytest.mark.parametrize(
    ('folders', 'message'),
    [
        (['x/cat', 'x/dog', 'y/cat', 'y/dog'], r'x looks like a split, not a class; give \S+/data/x'),
        (['train/cat', 'train/dog', 'extra'], 'train looks like a split'),
        (['train', 'test'], 'train looks like a split.* --classes'),
        (['cat'], 'cat is the only class folder'),
        ([], 'no class folders'),
        (['cat', 'dog', 'empty/'], 'class folder empty holds no images'),
    ],
)
def test_folders_that_are_no_classes_are_refused(tmp_path, folders, message):
    root = fill(tmp_path / 'data', [name for name in folders if name[-1] != '/'])
    (root / 'empty').mkdir(parents=True) if 'empty/' in folders else root.mkdir(exist_ok=True)
    with pytest.raises(BadInput, match=message):
        list_folder(root)


def test_leftovers_are_left_out_at_every_level_and_counted(tmp_path, caplog):
    root = fill(tmp_path, ['cat', 'dog/brown'])
    fill(root, ['__MACOSX/cat', 'cat/@eaDir', 'dog/.ipynb_checkpoints', 'dog/brown/__macosx'])
    for name in ('.DS_Store', 'cat/._0.jpg', 'dog/Thumbs.db', 'dog/notes.txt'):
        (root / name).touch()
    (root / 'cat' / 'gone.jpg').symlink_to('absent.jpg')
    (root / 'cat' / 'self').symlink_to('self')
    assert [path for part in list_folder(root) for path, _ in part] == [
        *('cat/0.jpg', 'cat/1.jpg', 'dog/brown/0.jpg', 'dog/brown/1.jpg')
    ]
    assert 'left out 9 hidden files' in caplog.text


def test_images_are_sorted_part_by_part(tmp_path, caplog):
    (first, _) = list_folder(fill(tmp_path, ['b', 'a/z', 'a', 'a/x y', 'a/x'], count=12))
    paths = [path for path, _ in first]
    assert paths == sorted(paths, key=lambda path: path.split('/')) and len(paths) == 48 and not caplog.messages


def test_linked_folders_are_followed_once(tmp_path):
    root, store = fill(tmp_path / 'data', ['cat', 'dog']), fill(tmp_path / 'store', ['more', 'more/deep', 'fox'])
    (root / 'cat' / 'linked').symlink_to(store / 'more')
    (root / 'cat' / 'same').symlink_to(store / 'more' / 'deep')
    (root / 'fox').symlink_to(store / 'fox')
    (root / 'dog' / 'loop').symlink_to(root / 'dog')
    (root / 'dog' / 'link.jpg').symlink_to(store / 'fox' / '0.jpg')
    (store / 'more' / 'back').symlink_to(store / 'more')
    cat, dog, fox = list_folder(root)
    assert dog + fox == [(f'dog/{i}.jpg', 1) for i in (0, 1, 'link')] + [(f'fox/{i}.jpg', 2) for i in (0, 1)]
    assert len(cat) == len({os.path.realpath(root / path) for path, _ in cat}) == 6
    for link in ('kitten', 'dog/up'):
        (root / link).symlink_to(root / 'cat')
        with pytest.raises(BadInput, match=f'class folders cat and {link.split("/")[0]} both lead to {root}/cat'):
            list_folder(root)
        (root / link).unlink()


def test_classes_are_named_by_a_file(tmp_path, lister):
    root = fill(tmp_path / 'data', ['golden retriever', 'n01', 'other', 'train/a', 'train/b'])
    (tmp_path / 'classes.txt').write_bytes('\ufeff golden retriever \r\n\r\ntrain/\n'.encode())
    flags = '--img_root', root, '--list', tmp_path / 'all.txt', '--classes', tmp_path / 'classes.txt'
    assert '6 images of 2 classes' in lister(*flags)
    assert labels_of(tmp_path / 'all.txt') == {('golden retriever', 0), ('train', 1)}


@pytest.mark.parametrize(
    'text', ['cat\ndog\ncat/\n', 'cat\n..\n', 'cat\ndog/brown\n', '/\ncat\n', '\n', b'\xff\xfec\x00']
)
def test_bad_files_of_classes_are_refused(tmp_path, text):
    (tmp_path / 'classes.txt').write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BadInput, match='classes.txt'):
        read_classes(tmp_path / 'classes.txt')


# --- splits


def test_splits_are_by_class_and_by_seed_and_never_change(tmp_path):
    by_class = list_folder(fill(tmp_path, ['a', 'b c'], count=12))
    train, val = split_by_class(by_class, 0.8, seed=2)
    assert val == [(f'{name}/{i}.jpg', label) for label, name in enumerate(['a', 'b c']) for i in (7, 9)]
    assert sorted(train + val) == sorted(by_class[0] + by_class[1])
    assert split_by_class(by_class, 0.8, seed=3) != (train, val)
    lists = split_folder((tmp_path, tmp_path))
    assert (lists['train'], lists['val']) == (train, val)
    assert [path for path, _ in lists['search_val']] == [f'{name}/{i}.jpg' for name in ('a', 'b c') for i in (3, 8)]
    assert sorted(lists['search_train'] + lists['search_val']) == sorted(train)
    with pytest.raises(BadInput, match='is the only image of its class'):
        split_by_class([by_class[0][:1]], 0.8, seed=2)


def test_validation_folders_have_the_labels_of_the_training_folders(tmp_path, caplog):
    fill(tmp_path / 'train', ['cat', 'dog', 'fox'], count=3)
    fill(tmp_path / 'val', ['dog', 'fox', 'gnu'])
    lists = split_folder(find_roots(tmp_path), for_search=False)
    assert {label for _, label in lists['val']} == {1, 2}
    assert 'lacks 1 of 3 classes: cat' in caplog.text and 'left out 1 folders without a label: gnu' in caplog.text


def test_the_images_of_the_next_training(tmp_path):
    run, photos = fill(tmp_path / 'run', []), fill(tmp_path / 'photos', ['a', 'b'])
    run.mkdir()
    lists = {'train_list': str(tmp_path / 's.txt'), 'val_list': str(tmp_path / 'v.txt')}
    assert training_flags({'img_root': str(tmp_path / 'gone')}, run) == training_flags({}, run) == {}
    assert training_flags({'img_root': str(photos), **lists}, run)['val_list'] == tmp_path / 'v.txt'
    pair = fill(tmp_path / 'pair', ['train/a', 'valid/a'])
    beside = training_flags({'img_root': str(pair / 'train'), **lists}, run)
    assert beside == {'train_root': pair / 'train', 'val_root': pair / 'valid'}
    for name in ('train', 'val'):
        (run / f'{name}.txt').touch()
    made = training_flags({'img_root': str(photos), 'train_list': None}, run)
    assert (made['train_root'], made['val_root'], made['val_list']) == (photos, photos, run / 'val.txt')


def test_demo_images_unpack_into_class_folders(tmp_path):
    unpack(tmp_path, seed=2)
    train, test, *parts = (parse_list(tmp_path / f'{n}.txt') for n in ('train', 'test', 'search_train', 'search_val'))
    assert [len(train), len(test), *map(len, parts)] == [6000, 1200, 4800, 1200]
    assert sorted(parts[0] + parts[1]) == sorted(train) == sorted(sum(list_folder(tmp_path / 'train'), []))
