"""Lists of users' folders: labels that agree between lists, splits, leftovers, links, files of classes, class names."""

import sys

import pytest

from dataset import make_lists
from dataset.lists import check_labels, list_folder, read_numbering
from dataset.loaders import read_train_val
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
    assert read_train_val(paths, roots, None, warnings.append)[2] == 10
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
