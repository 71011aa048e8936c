"""test.py: weights files of any kind, what it says about those that do not fit, predictions, a single image."""

import csv
import sys

import pytest
import torch
from training_runs import (
    small_config,
)

import test as test_script
from models.model_eval import NetworkEval
from tools.errors import BadInput


@pytest.fixture
def weights():
    torch.manual_seed(11)
    return NetworkEval(small_config()).state_dict()


@pytest.fixture
def run_test(data, tmp_path, monkeypatch, capsys):
    """Run test.py on weights (or a file) in this process; returns what it prints."""

    def call(content, *words, val=True, **changes):
        path = tmp_path / 'weights.pth.tar'
        torch.save(content, path)
        chosen = {'config_path': data / 'small.config', 'weights': path, 'num_classes': 3, 'img_size': 32, 'workers': 0}
        chosen |= {'val_root': data, 'val_list': data / 'val.txt'} if val else {}
        chosen |= {'device': 'cpu', 'batch_size': 8} | changes
        given = {name: value for name, value in chosen.items() if value is not None}
        flags = [word for name, value in given.items() for word in (f'--{name}', str(value))]
        monkeypatch.setattr(sys, 'argv', ['test.py', *flags, *map(str, words)])
        test_script.main(test_script.get_args())
        return capsys.readouterr().out

    return call


def prefixed(state):
    return {f'module.{name}': value for name, value in state.items()}


@pytest.mark.parametrize(
    'wrap',
    [
        lambda s: s,
        prefixed,
        lambda s: {'state_dict': s, 'epoch': 3},
        lambda s: {'state_dict': prefixed(s), 'best_acc_top1': 1.0},
        lambda s: {'model': s},
        lambda s: {name: value.half() if value.is_floating_point() else value for name, value in s.items()},
    ],
)
def test_any_form_of_a_weights_file_gives_the_same(run_test, weights, wrap):
    printed = run_test(wrap(weights))
    assert printed.splitlines()[1].startswith('Val_acc_top1: ')
    assert printed == run_test(weights)


def test_the_moving_average_goes_first_and_says_so(run_test, weights):
    other = NetworkEval(small_config()).state_dict()
    other['classifier.linear.bias'] = torch.tensor([99.0, 0.0, 0.0])
    both = {'state_dict': prefixed(weights), 'state_dict_ema': prefixed(other) | {'n_averaged': torch.tensor(3)}}
    printed = run_test(both)
    assert 'moving average' in printed.splitlines()[0]
    assert printed.splitlines()[1:] == run_test(other).splitlines()
    plain, of_weights = run_test(both, '--no_average'), run_test(weights)
    assert plain.partition('next, ')[0] == of_weights.partition('next, ')[0]
    assert '--no_average' in plain and '--no_average' not in of_weights


def test_what_does_not_fit_is_named_in_one_message(run_test, weights):
    weights['extra.weight'] = torch.zeros(1)
    del weights['first_stem.conv.weight']
    weights['stage1.0.depth_conv.conv.weight'] = torch.zeros(2, 1, 3, 3)
    with pytest.raises(BadInput) as error:
        run_test(weights)
    message = str(error.value)
    assert '1 missing (first_stem.conv.weight)' in message and '1 unexpected (extra.weight)' in message
    assert '1 wrong shape (stage1.0.depth_conv.conv.weight [2, 1, 3, 3] for [16, 1, 3, 3])' in message


def test_a_class_count_that_disagrees_is_said_plainly(run_test, weights):
    weights['classifier.linear.weight'] = torch.zeros(5, 24)
    weights['classifier.linear.bias'] = torch.zeros(5)
    with pytest.raises(BadInput, match='is for 5 classes, --num_classes is 3'):
        run_test(weights)


def test_the_weights_decide_the_classes_whatever_the_config_has(run_test, weights):
    weights['classifier.linear.weight'] = torch.zeros(5, 24)
    weights['classifier.linear.bias'] = torch.tensor([0.0, 0, 0, 0, 9])
    printed = run_test(weights, num_classes=None)  # class 4, of which there are no images
    assert '--num_classes 5: from' in printed and 'Val_acc_top1: 0.00' in printed


@pytest.mark.parametrize('content', [{}, [1], {'state_dict': {'a': 1}}, {1: torch.zeros(1)}, 3])
def test_files_without_weights_are_refused(run_test, content):
    with pytest.raises(BadInput, match='holds no state dict'):
        run_test(content)


def test_exported_predictions_agree_with_the_accuracies(run_test, weights, tmp_path):
    path = tmp_path / 'out.csv'
    printed = run_test(weights, export_predictions=path)
    rows = list(csv.DictReader(path.open(newline='')))
    assert len(rows) == 19
    hits = sum(row['label'] == row['predicted'] for row in rows)
    assert f'Val_acc_top1: {100 * hits / 19:.2f}' in printed
    assert all(row['top5'].split()[0] == row['predicted'] and 1 / 3 <= float(row['probability']) <= 1 for row in rows)
    assert {row['path'].split('/')[0] for row in rows} == {'class 0', 'class 1', 'class 2'}


def test_no_predictions_into_a_folder_that_is_not_there(run_test, weights, tmp_path):
    with pytest.raises(BadInput, match='folder does not exist'):
        run_test(weights, export_predictions=tmp_path / 'none' / 'out.csv')


def test_one_image(run_test, weights, data):
    lines = run_test(weights, val=False, image=data / 'class 1' / '3.png').splitlines()
    assert [line.split()[0] for line in lines] == ['1.', '2.', '3.']
    assert sum(float(line.split()[-1]) for line in lines) == pytest.approx(1, abs=1e-3)
    assert {line.split()[2] for line in lines} == {'0', '1', '2'}


@pytest.mark.parametrize('words', [[], ['--val_list', 'x'], ['--image', 'x', '--export_predictions', 'y']])
def test_what_to_test_on_must_be_said(monkeypatch, capsys, words):
    monkeypatch.setattr(sys, 'argv', ['test.py', '--config_path', 'c', '--weights', 'w', *words])
    with pytest.raises(SystemExit):
        test_script.get_args()
    assert '--val_list' in capsys.readouterr().err
