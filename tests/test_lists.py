"""Lists of users' folders: labels that agree between lists, splits, leftovers, links, files of classes, class names."""

import errno
import os
import sys

import pytest

from dataset import make_lists
from dataset.folders import find_pair
from dataset.lists import check_labels, class_names, list_folder, read_classes, read_numbering
from dataset.splits import read_train_val
from tools.errors import BadInput
from tools.options import run_script

TEN = [f'c{i}' for i in range(10)]


@pytest.fixture
def lister(monkeypatch, capsys):
    """Run make_lists.py in this process; returns its output, or the one line of an error."""

    def run(*words, code=0):
        monkeypatch.setattr(sys, 'argv', ['make_lists.py', *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            run_script(make_lists.main, make_lists.get_args())
        said = capsys.readouterr()
        assert (ended.value.code or 0) == code, said
        if not code:
            assert not said.err
            return said.out
        assert len(said.err.splitlines()) == 1 and said.err.startswith('make_lists.py: error: ')
        return said.err

    return run


def touch(root, *paths):
    """Make empty files."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b'')


def fill(root, names, count=2):
    """Make class folders of empty images."""
    touch(root, *(f'{name}/{i}.jpg' for name in names for i in range(count)))
    return root


def labels_of(path):
    """The label of each outer folder in a list."""
    lines = [line.rsplit(' ', 1) for line in path.read_text().splitlines()]
    return {(relative.split('/')[0], int(label)) for relative, label in lines}


# --- labels that agree between lists


@pytest.mark.parametrize('names', [TEN[:3] + TEN[4:], [*TEN[:3], 'c35', *TEN[4:]], TEN[::2]])
def test_a_list_like_another_keeps_its_labels(tmp_path, lister, names):
    fill(tmp_path / 'train', TEN)
    fill(tmp_path / 'val', names)
    lister('--img_root', tmp_path / 'train', '--list', tmp_path / 'train.txt')
    flags = '--img_root', tmp_path / 'val', '--list', tmp_path / 'val.txt'
    out = lister(*flags, '--like', tmp_path / 'train.txt')
    assert labels_of(tmp_path / 'train.txt') == {(name, i) for i, name in enumerate(TEN)}
    assert labels_of(tmp_path / 'val.txt') == {(name, TEN.index(name)) for name in names if name in TEN}
    absent = [name for name in TEN if name not in names]
    assert f'lacks {len(absent)} of 10 classes: {", ".join(absent)}' in out
    assert ('left out 1 folders without a label in the list: c35' in out) == ('c35' in names)
    paths, roots = (tmp_path / 'train.txt', tmp_path / 'val.txt'), (tmp_path / 'train', tmp_path / 'val')
    warnings = []
    assert read_train_val(paths, roots, None, warnings.append).num_classes == 10
    assert any(f'no images of {len(absent)} of 10 classes' in line for line in warnings)


@pytest.mark.parametrize('names', [TEN[:3] + TEN[4:], [*TEN[:3], 'c25', *TEN[3:9]], [*TEN[:3], *TEN[4:], 'd']])
def test_lists_numbered_apart_are_refused(tmp_path, lister, names):
    roots, paths = (tmp_path / 'train', tmp_path / 'val'), (tmp_path / 'train.txt', tmp_path / 'val.txt')
    for root, path, classes in zip(roots, paths, (TEN, names), strict=True):
        lister('--img_root', fill(root, classes), '--list', path)
    with pytest.raises(BadInput) as error:
        read_train_val(paths, roots, None, print)
    first = next(name for name in sorted(names) if name in TEN and TEN.index(name) != sorted(names).index(name))
    labels = f'label {TEN.index(first)} in {paths[0]}, {sorted(names).index(first)} in {paths[1]}'
    assert f'class folder {first} has {labels}' in str(error.value) and '--like' in str(error.value)


def test_class_folders_are_found_below_splits_and_above_others(tmp_path):
    def refused(train, val, folder):
        with pytest.raises(BadInput, match=f'class folder {folder} has label'):
            check_labels((train, val), ('t', 'v'))
        return True

    train, val = [('n01', 0), ('n02', 1), ('n03', 2)], [('n01', 0), ('n03', 1)]

    def lines(folders, before='', after=''):
        return [(f'{before}{name}{after}/{i}.jpg', label) for name, label in folders for i in range(3)]

    assert refused(lines(train), lines(val), 'n03')
    assert refused(lines(train, before='train/'), lines(val, before='val/'), 'n03')
    assert refused(lines(train), lines(val, before='images/val/'), 'n03')
    assert refused(lines(train, after='/images'), lines(val, after='/others'), 'n03')
    assert refused(lines(train, before='train/', after='/images'), lines(val, after='/images'), 'n03')
    two_parts = lines(train, before='train/') + lines(train, before='extra/')
    assert refused(two_parts, lines(val, before='val/'), 'n03')
    for good in (train, train[:2]):
        for before in ('', 'train/', 'val/'):
            check_labels((two_parts, lines(good, before)), ('t', 'v'), pytest.fail)
            check_labels((lines(train), lines(good, before)), ('t', 'v'), pytest.fail)
    same_inside = [('animals/other/x', 0), ('animals/cat/x', 1), ('vehicles/other/x', 2), ('vehicles/car/x', 3)]
    check_labels((same_inside, same_inside), ('t', 'v'), pytest.fail)


def test_one_folder_of_two_labels_within_a_list_is_refused():
    train = [(f'{name}/{i}.jpg', label) for label, name in enumerate(TEN) for i in range(3)]
    with pytest.raises(BadInput, match='class folder c4 has label 4 and 7 in t, 4 in v'):
        check_labels(([*train, ('c4/9.jpg', 7)], train), ('t', 'v'))


def test_folders_that_are_no_classes_are_not_compared():
    train = [(f'n{label:03}/{i}.jpg', label) for label in range(50) for i in range(2)]
    flat = [(f'{i}.jpg', i % 50) for i in range(100)]
    one_folder = [(f'val/{path}', label) for path, label in flat]
    superclasses = [(path, label // 10) for path, label in train]
    for val in (flat, one_folder, train):
        check_labels((train, val), ('t', 'v'), pytest.fail)
    check_labels((flat, one_folder), ('t', 'v'), pytest.fail)
    check_labels((one_folder, one_folder), ('t', 'v'), pytest.fail)
    check_labels((superclasses, superclasses[::2]), ('t', 'v'), pytest.fail)
    binary = [('cat/0.jpg', 0), ('dog/0.jpg', 1)]
    check_labels((binary, [('val/0.jpg', 0), ('val/1.jpg', 1)]), ('t', 'v'), pytest.fail)
    other_numbers = [(path, 4 - label) for path, label in superclasses]
    with pytest.raises(BadInput, match='class folder n000 has label 0 in t, 4 in v'):
        check_labels((superclasses, other_numbers), ('t', 'v'))
    with pytest.raises(BadInput, match=r'class folder n001 has label 0 in t, 1 in v \(49 of 50 class folders'):
        check_labels((superclasses, train), ('t', 'v'))


def test_folders_of_mixed_labels_are_a_line_of_warning():
    patients, lines = [(f'p{i // 4}/{i}.jpg', i % 2) for i in range(100)], []
    check_labels((patients[:80], patients[80:]), ('t', 'v'), lines.append)
    (line,) = lines
    assert line.startswith('warning: 25 of 25 folders have several labels in t and v, such as p0 (0 and 1); right only')
    mostly_pure, lines = [(f'p{i // 4}/{i}.jpg', int(i > 40 or i in (2, 7, 14))) for i in range(100)], []
    check_labels((mostly_pure[::2], mostly_pure[1::2]), ('t', 'v'), lines.append)
    assert len(lines) == 1 and 'warning: 4 of 25 folders have several labels' in lines[0]


def test_few_patients_whose_label_changed_are_a_line_of_warning():
    """60 patients, one label each in a list; that of three is another in the second list."""
    train, lines = [(f'p{i}/0.jpg', i % 2) for i in range(60)], []
    val = [(f'p{i}/1.jpg', i % 2 if i > 2 else 1 - i % 2) for i in range(60)]
    check_labels((train, val), ('t', 'v'), lines.append)
    assert (
        len(lines) == 1 and 'warning: 3 of 60 folders have several labels in t and v, such as p0 (0 and 1)' in lines[0]
    )


def test_another_class_in_the_same_place_is_a_line_of_warning():
    train, lines = [(f'{name}/0.jpg', label) for label, name in enumerate(TEN)], []
    val = [(path.replace('c5', 'c5b'), label) for path, label in train]
    check_labels((train, val), ('t', 'v'), lines.append)
    (line,) = lines
    assert line.startswith('warning: 1 labels have different') and line.endswith('label 5 is c5 in t, c5b in v')
    check_labels(
        (train, [(f'x{path}', label) for path, label in train]), ('t', 'v'), pytest.fail
    )  # other names for all


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('x.jpg 0\ny.jpg 1\n', 'its images are in no class folders'),
        ('all/x.jpg 0\nall/y.jpg 1\n', 'folder all has labels 0 and 1'),
        ('other/x.jpg 0\nanother/y.jpg 1\n', 'has none of the 2 class folders of the list, such as another, other'),
        ('x.jpg\n', 'has no label'),
    ],
)
def test_a_list_that_cannot_be_followed_is_refused(tmp_path, lister, text, message):
    (tmp_path / 'like.txt').write_text(text)
    flags = '--img_root', fill(tmp_path / 'val', 'ab'), '--list', tmp_path / 'val.txt'
    assert message in lister(*flags, '--like', tmp_path / 'like.txt', code=2)
    assert not (tmp_path / 'val.txt').exists()


def test_like_does_not_go_with_flags_that_contradict_it(tmp_path, lister):
    root, like = fill(tmp_path / 'val', 'ab'), tmp_path / 'like.txt'
    like.write_text('a/0.jpg 1\nb/0.jpg 0\n')
    assert 'would be overwritten' in lister('--img_root', root, '--list', like, '--like', like, code=2)
    assert '--like goes with --list' in lister('--img_root', root, '--to', tmp_path, '--like', like, code=2)
    assert 'not allowed' in lister('--img_root', root, '--list', 'x', '--like', like, '--classes', like, code=2)
    parts = tmp_path / 't.txt', tmp_path / 'v.txt'
    lister('--img_root', root, '--train_list', parts[0], '--val_list', parts[1], '--like', like)
    assert labels_of(parts[0]) == labels_of(parts[1]) == {('a', 1), ('b', 0)}


def test_a_list_of_superclasses_can_be_followed(tmp_path):
    (tmp_path / 'like.txt').write_text('cat/x 0\ndog/x 0\ncar/x 1\n')
    assert read_numbering(tmp_path / 'like.txt') == {'cat': 0, 'dog': 0, 'car': 1}
    listed = list_folder(fill(tmp_path / 'val', ['dog', 'car']), read_numbering(tmp_path / 'like.txt'), lambda _: None)
    assert [samples[0] for samples in listed] == [('car/0.jpg', 1), ('dog/0.jpg', 0)]


# --- splits


@pytest.mark.parametrize(
    ('train', 'val'),
    [
        ('Training', 'Testing'),
        ('TRAIN', 'TEST'),
        ('training_set', 'test_set'),
        ('seg_train/seg_train', 'seg_test/seg_test'),
        ('photos/train', 'photos/val'),
        ('a/b/Train', 'a/b/Valid'),
        ('TrainingSet', 'validation'),
        ('cars_train', 'cars_test'),
        ('train2017', 'val2017'),
        ('train images', 'dev images'),
    ],
)
def test_splits_of_any_name_are_listed_apart(tmp_path, lister, train, val):
    root, lists = tmp_path / 'data', tmp_path / 'lists'
    fill(root / train, ['cat', 'dog'], count=10)
    fill(root / val, ['cat', 'dog'], count=3)
    assert 'val.txt: 6 images of 2 classes' in (out := lister('--img_root', root, '--to', lists))
    assert labels_of(lists / 'train.txt') == labels_of(lists / 'val.txt') == {('cat', 0), ('dog', 1)}
    assert f'--train_root {root / train} ' in out.replace("'", '') and f'--val_root {root / val} ' in out.replace(
        "'", ''
    )
    whole = '--img_root', root, '--list', tmp_path / 'all.txt'
    assert 'like splits' in (error := lister(*whole, code=2)) or 'is the only class folder' in error
    assert not (tmp_path / 'all.txt').exists()


def test_validation_images_come_before_test_images_and_names_must_match():
    assert find_pair(['test', 'train', 'val']) == ('train', 'val')
    assert find_pair(['Test', 'Train', 'unlabeled']) == ('Train', 'Test')
    assert find_pair(['seg_pred', 'seg_test', 'seg_train']) == ('seg_train', 'seg_test')
    for classes in (['train_station', 'test_tube'], ['train', 'bus'], ['trainer', 'testes'], ['train_test', 'val'], []):
        assert find_pair(classes) is None


@pytest.mark.parametrize(
    ('folders', 'message'),
    [
        (['x/cat', 'x/dog', 'y/cat', 'y/dog'], 'x and y look like splits, not classes: both hold folders cat and dog'),
        (['x/cat', 'x/dog', 'x/fox', 'y/cat', 'y/dog', 'z'], 'x and y look like splits'),
        (['cat/train', 'cat/test', 'dog/train', 'dog/test'], 'both hold folders test and train'),
        (['train/cat', 'train/dog', 'extra'], 'train looks like a split, not a class; give --img_root'),
        (['train', 'test'], 'train and test look like splits, not classes; to make all lists'),
        (['train/cat', 'train/dog', 'test'], 'test: no class folders in it; to split the training images: --img_root'),
        (['cat'], 'cat is the only class folder; expected two or more\n'),
        (['data/cat', 'data/dog'], 'data is the only class folder; expected two or more; if its folders are'),
    ],
)
def test_folders_that_are_no_classes_are_refused(tmp_path, lister, folders, message):
    root = fill(tmp_path / 'data', folders)
    error = (
        lister('--img_root', root, '--list', tmp_path / 'all.txt', code=2) if 'training images' not in message else ''
    )
    if 'only class' not in message or len(folders) == 1:
        error += lister('--img_root', root, '--to', tmp_path / 'lists', code=2)
    assert message in error
    assert os.listdir(tmp_path) == ['data']


@pytest.mark.parametrize(
    'folders',
    [
        ['cat/images', 'dog/images'],
        ['cat/1', 'cat/2', 'dog/2', 'dog/3'],
        ['train', 'bus'],
        ['train_station', 'test_tube'],
    ],
)
def test_classes_that_resemble_splits_are_listed(tmp_path, lister, folders):
    root = fill(tmp_path / 'data', folders)
    assert 'of 2 classes' in lister('--img_root', root, '--list', tmp_path / 'all.txt')


def test_named_classes_are_taken_whatever_they_look_like(tmp_path, lister):
    root = fill(tmp_path / 'data', ['train/a', 'train/b', 'test/a', 'test/b'])
    (tmp_path / 'classes.txt').write_text('test\ntrain\n')
    flags = '--img_root', root, '--list', tmp_path / 'all.txt', '--classes', tmp_path / 'classes.txt'
    assert '8 images of 2 classes' in lister(*flags)
    (tmp_path / 'classes.txt').write_text('test\n')
    assert 'test is the only class folder' in lister(*flags, code=2)


def test_folders_beside_a_pair_are_left_out_with_a_line(tmp_path, lister):
    root = fill(tmp_path / 'data', [f'{split}/{name}' for split in ('train', 'val', 'test') for name in 'ab'], count=3)
    out = lister('--img_root', root, '--to', tmp_path / 'lists')
    assert f'{root}: left out test; the lists are of train and val' in out


# --- leftovers


def test_leftovers_are_left_out_at_every_level_and_counted(tmp_path, lister):
    root = fill(tmp_path / 'data', ['cat', 'dog/brown'])
    left_out = [
        *('.DS_Store', '__MACOSX/cat/._0.jpg', '.ipynb_checkpoints/0.jpg', '@eaDir/0.jpg', 'lost+found/0.jpg'),
        *('Thumbs.db', 'cat/._0.jpg', 'cat/.hidden.png', 'cat/@eaDir/0.jpg/thumb.jpg', 'dog/brown/desktop.ini'),
        *(
            'dog/.ipynb_checkpoints/0-checkpoint.jpg',
            'dog/brown/__macosx/0.jpg',
            '$RECYCLE.BIN/x.jpg',
            'dog/#recycle/x.jpg',
        ),
    ]
    touch(root, *left_out)
    out = lister('--img_root', root, '--list', tmp_path / 'all.txt')
    lines = (tmp_path / 'all.txt').read_text().splitlines()
    assert lines == ['cat/0.jpg 0', 'cat/1.jpg 0', 'dog/brown/0.jpg 1', 'dog/brown/1.jpg 1']
    assert f'left out {len(left_out)} hidden files, or files of other programs, such as $RECYCLE.BIN' in out
    assert out.count('left out') == 1


def test_leftovers_are_neither_splits_nor_wrappers(tmp_path, lister):
    root = fill(tmp_path / 'data', ['photos/train/a', 'photos/train/b', 'photos/val/a', 'photos/val/b'])
    touch(root, '__MACOSX/photos/train/a/._0.jpg', 'photos/.DS_Store', 'photos/@eaDir/x.jpg')
    out = lister('--img_root', root, '--to', tmp_path / 'lists')
    assert 'val.txt: 4 images of 2 classes' in out and (tmp_path / 'lists' / 'classes.txt').read_text() == 'a\nb\n'


def test_ordinary_folders_are_listed_without_a_word(tmp_path, capsys):
    by_class = list_folder(fill(tmp_path, ['b', 'a/z', 'a', 'a/x y', 'a/x'], count=12))
    assert capsys.readouterr().out == ''
    paths = [path for path, _ in by_class[0]]
    assert paths == sorted(paths, key=lambda path: path.split('/')) and len(paths) == 48 and paths[1] == 'a/1.jpg'


# --- links


def test_linked_folders_are_followed_once(tmp_path, lister):
    root = fill(tmp_path / 'data', ['cat', 'dog'])
    fill(tmp_path / 'store', ['more', 'more/deep', 'fox'])
    (root / 'cat' / 'linked').symlink_to(tmp_path / 'store' / 'more')
    (root / 'cat' / 'same').symlink_to(tmp_path / 'store' / 'more' / 'deep')
    (root / 'fox').symlink_to(tmp_path / 'store' / 'fox')
    (root / 'dog' / 'loop').symlink_to(root / 'dog')
    (root / 'dog' / 'up').symlink_to(root)
    (tmp_path / 'store' / 'more' / 'back').symlink_to(tmp_path / 'store' / 'more')
    (root / 'dog' / 'link.jpg').symlink_to(tmp_path / 'store' / 'fox' / '0.jpg')
    assert '11 images of 3 classes' in lister('--img_root', root, '--list', tmp_path / 'all.txt')
    lines = (tmp_path / 'all.txt').read_text().splitlines()
    assert [line for line in lines if not line.startswith('cat')] == [
        *('dog/0.jpg 1', 'dog/1.jpg 1', 'dog/link.jpg 1', 'fox/0.jpg 2', 'fox/1.jpg 2')
    ]
    real = {os.path.realpath(root / line.rsplit(' ', 1)[0]) for line in lines if line.startswith('cat')}
    assert len(real) == 6 and str(tmp_path / 'store' / 'more' / 'deep' / '1.jpg') in real


@pytest.mark.parametrize(('link', 'target'), [('kitten', 'cat'), ('dog/more', 'cat')])
def test_a_folder_in_two_classes_is_refused(tmp_path, lister, link, target):
    root = fill(tmp_path / 'data', ['cat', 'dog'])
    (root / link).symlink_to(root / target)
    error = lister('--img_root', root, '--list', tmp_path / 'all.txt', code=2)
    assert f'class folders cat and {link.split("/")[0]} both lead to {root / target}' in error


def test_dangling_links_are_counted(tmp_path, lister):
    root = fill(tmp_path / 'data', ['cat', 'dog'])
    for name, target in (('gone.jpg', 'absent.jpg'), ('self', 'self'), ('text.txt', 'absent.txt')):
        (root / 'cat' / name).symlink_to(target)
    out = lister('--img_root', root, '--list', tmp_path / 'all.txt')
    assert 'left out 2 links to files that do not exist, such as cat/gone.jpg' in out and '4 images of 2 classes' in out


def test_a_folder_that_cannot_be_read_is_refused(tmp_path, lister, monkeypatch):
    root, scandir = fill(tmp_path / 'data', ['cat', 'dog']), os.scandir

    def denied(path):
        if path == root / 'dog':
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', denied)
    error = lister('--img_root', root, '--list', tmp_path / 'all.txt', code=2)
    assert 'folder dog cannot be read (Permission denied)' in error


# --- files of classes


@pytest.mark.parametrize(
    'text',
    [
        '\ufeffgolden retriever\nn01\n',
        'n01/\r\ngolden retriever/\r\n',
        'n01 tench, Tinca tinca\ngolden retriever\n',
        '\n  golden retriever  \n\n\tn01',
    ],
)
def test_files_of_classes_name_folders(tmp_path, lister, text):
    root = fill(tmp_path / 'data', ['golden retriever', 'n01', 'other'])
    (tmp_path / 'classes.txt').write_bytes(text.encode())
    flags = '--img_root', root, '--list', tmp_path / 'all.txt', '--classes', tmp_path / 'classes.txt'
    if 'tench' in text:  # one line with a space is a folder: a line that is none is a mistake
        assert '1 of 2 class folders absent: n01 tench, Tinca tinca' in lister(*flags, code=2)
    else:
        assert '4 images of 2 classes' in lister(*flags)
        assert labels_of(tmp_path / 'all.txt') == {('golden retriever', 0), ('n01', 1)}


def test_the_first_words_of_a_synset_mapping_are_the_folders(tmp_path, lister):
    fill(tmp_path / 'data/train', ['n01440764', 'n01443537', 'n9'])
    fill(tmp_path / 'data/val', ['n01440764', 'n01443537', 'n9'])
    (tmp_path / 'map.txt').write_text('n01443537 goldfish, Carassius auratus\nn01440764 tench, Tinca tinca\n')
    more = '--classes', tmp_path / 'map.txt'
    for flags in (
        ('--img_root', tmp_path / 'data/train', '--list', tmp_path / 'train.txt'),
        ('--img_root', tmp_path / 'data', '--to', tmp_path),
    ):
        out = lister(*flags, *more)
        assert out.count('map.txt: took the first words of 2 lines as class folders, such as n01440764') == 1
        assert labels_of(tmp_path / 'train.txt') == {('n01440764', 0), ('n01443537', 1)}


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('cat\ndog\ncat\n', 'names class cat 2 times; its images would get several labels'),
        ('cat\ndog\ncat/\n', 'names class cat 2 times'),
        ('n01 tench\nn01 goldfish\ndog\n', 'names class n01 2 times'),
        ('cat\n..\n', "'..' is no name of a class folder"),
        ('cat\ndog/brown\n', "'dog/brown' is no name of a class folder"),
        ('/\ncat\n', "'' is no name"),
        ('cat\nfox\n', '1 of 2 class folders absent: fox'),
        (b'\xff\xfec\x00a\x00t\x00', 'cannot be read as a list of classes'),
    ],
)
def test_bad_files_of_classes_are_refused(tmp_path, lister, text, message):
    root = fill(tmp_path / 'data', ['cat', 'dog/brown', 'n01'])
    (tmp_path / 'classes.txt').write_bytes(text if isinstance(text, bytes) else text.encode())
    flags = '--img_root', root, '--list', tmp_path / 'all.txt', '--classes', tmp_path / 'classes.txt'
    assert message in lister(*flags, code=2)


def test_accents_of_classes_may_be_spelled_either_way(tmp_path):
    composed, decomposed = 'caf\u00e9', 'cafe\u0301'
    fill(tmp_path, [composed, 'tea'])
    (tmp_path / 'classes.txt').write_text(f'{decomposed}\ntea\n')
    assert read_classes(tmp_path / 'classes.txt', tmp_path) == [composed, 'tea']


# --- names of classes


def lines(*folders, start=0):
    return [(f'{folder}/{i}.jpg', label) for label, folder in enumerate(folders, start) for i in range(2)]


@pytest.mark.parametrize(
    ('samples', 'names'),
    [
        (lines('cat', 'hot dog'), ['cat', 'hot dog']),
        (lines('train/cat', 'train/dog'), ['cat', 'dog']),
        (lines('cat/brown', 'dog/brown'), ['cat', 'dog']),
        (lines('train/cat', 'train/dog') + lines('extra/cat', 'extra/dog'), ['cat', 'dog']),
        (lines('x/other', 'x/cat', 'y/other', 'y/car'), ['x/other', 'x/cat', 'y/other', 'y/car']),
        (lines('dog', start=2), ['0', '1', 'dog']),
        (lines('crane', 'ox') + lines('bird'), ['bird, crane', 'ox']),
        ([(f'{i}/x.jpg', i % 2) for i in range(8)], None),
        ([('x.jpg', 0), ('y.jpg', 1)], None),
        ([('./x.jpg', 0), ('cat/y.jpg', 1)], None),
        ([('all/x.jpg', 0), ('all/y.jpg', 1)], None),
        ([*lines('cat', 'dog'), ('cat/z.jpg', 1)], None),
    ],
)
def test_labels_are_named_by_their_folders(samples, names):
    assert class_names(samples) == names
    assert class_names(samples[::-1]) == names


def test_names_of_ordinary_lists_are_those_of_the_listed_folders(tmp_path):
    by_class = list_folder(fill(tmp_path, TEN))
    assert class_names([sample for samples in by_class for sample in samples]) == TEN
