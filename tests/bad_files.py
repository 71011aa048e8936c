"""Scripts run in this process, as the shell would, and files that are wrong in one way each; shared by tests."""

import sys

import pytest
import torch

import parsing_model
import test as test_script
import train_eval
import train_eval_amp
import train_search
from conftest import make_table
from dataset import make_lists
from dataset.demo import unpack
from latency_pkl import make_lat_lut
from models.elasticity import full_weights, start_masks
from models.parsing import MASKS_KEY
from models.search_space import SPACE
from models.tables import save_table
from tools.options import run_script

SCRIPTS = {
    'train_search.py': train_search,
    'parsing_model.py': parsing_model,
    'train_eval.py': train_eval,
    'train_eval_amp.py': train_eval_amp,
    'test.py': test_script,
    'latency_pkl/make_lat_lut.py': make_lat_lut,
    'dataset/make_lists.py': make_lists,
    'dataset/demo/unpack.py': unpack,
}
CLASSES = 3


def run_here(monkeypatch, script, words):
    """Run a script in this process, which is faster; returns its exit code."""
    monkeypatch.setattr(sys, 'argv', [script, *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        run_script(SCRIPTS[script].main, SCRIPTS[script].get_args())
    return ended.value.code or 0


def words_of(flags):
    """Flags as words of a command line; None leaves a flag out, True has no value."""
    words = []
    for name, value in flags.items():
        if isinstance(value, (list, tuple)):
            words += [f'--{name}', *map(str, value)]
        elif value is not None and value is not False:
            words += [f'--{name}'] if value is True else [f'--{name}={value}']
    return words


def write_searched(path, num_classes=CLASSES):
    """A searched model that has seen no image."""
    state = {f'module.{name}': value for name, value in full_weights(num_classes, torch.device('cpu'), SPACE).items()}
    torch.save({'state_dict': state, MASKS_KEY: start_masks(SPACE), 'epoch': 0}, path)


def write_table(path, img_size=32, change=lambda curves: None, base=1.0):
    """A table whose curves `change` may spoil."""
    table = make_table(img_size=img_size)
    change(table.curves)
    save_table(base, table.curves, {}, path)


def good_flags(script, data, table, save):
    """Flags that a script runs with, on the images and config of `training_runs.make_data`."""
    shared = {'device': 'cpu', 'img_size': 32, 'num_classes': CLASSES}
    loading = {'workers': 0, 'batch_size': 4}
    lists = {'train_list': data / 'train.txt', 'val_list': data / 'val.txt'}
    config = {'config_path': data / 'small.config'}
    train = {'train_root': data, 'val_root': data, 'save': save, 'epochs': 1, **lists, **config, **shared, **loading}
    return {
        'train_search.py': {'img_root': data, 'lookup_path': table, 'save': save, 'epochs': 1, 'warmup_epochs': 0}
        | {'target_lat': '40%', **lists, **shared, **loading},
        'train_eval.py': train,
        'train_eval_amp.py': train,
        'test.py': {'val_root': data, 'val_list': data / 'val.txt', 'weights': data / 'weights.pth.tar'}
        | {**config, **shared, **loading},
        'parsing_model.py': {'save_path': save / 'out.config', **config, **shared},
        'latency_pkl/make_lat_lut.py': {'metric': 'flops', 'save_path': save / 'out.pkl', **shared},
        'dataset/make_lists.py': {'img_root': data, 'list': save / 'out.txt'},
        'dataset/demo/unpack.py': {'to': save / 'demo'},
    }[script]
