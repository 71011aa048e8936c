"""A copy of the project with a small search space, and ways to start, kill and compare its searches."""

import re
import shutil
import time
from pathlib import Path

from training_runs import command, differences, finish, kill_all, load, make_data, start

from conftest import ROOT, SMALL_SPACE

EPOCHS = 4


def small_project(folder):
    """A copy of the project with the small search space of the tests, images, lists and a latency table."""
    ignored = shutil.ignore_patterns('.git', '.venv', '__pycache__', 'checkpoints', 'demo', '*.png', '.*cache', 'tests')
    shutil.copytree(ROOT, folder, ignore=ignored, dirs_exist_ok=True)
    with open(folder / 'models' / 'search_space.py', 'a') as f:
        f.write(f'\n\nSPACE = {SMALL_SPACE!r}\n')
    (folder / 'images').mkdir()
    make_data(folder / 'images')
    words = ['--metric', 'flops', '--img_size', 32, '--num_classes', 3, '--save_path', folder / 'flops.pkl']
    finish(start(command(folder / 'latency_pkl' / 'make_lat_lut.py', words), cwd=folder))
    return folder


def flags(project, save, **changes):
    """Flags of a search, as words: 10 steps an epoch; one epoch of the largest operators, one of all, two of search."""
    chosen = {
        'img_root': project / 'images',
        'train_list': project / 'images' / 'train.txt',
        'val_list': project / 'images' / 'val.txt',
        'lookup_path': project / 'flops.pkl',
        'save': save,
        'num_classes': 3,
        'img_size': 32,
        'batch_size': 4,
        'workers': 0,
        'epochs': EPOCHS,
        'warmup_epochs': 2,
        'largest_epochs': 1,
        'target_lat': '40%',
        'print_freq': 1,
        'device': 'cpu',
    } | changes
    words = ['--no-report']
    for name, value in chosen.items():
        words += [f'--{name}'] if value is True else [] if value is None else [f'--{name}', str(value)]
    return words


def begin(project, save, processes=1, options=(), **changes):
    """Start a search in the project's copy."""
    words = command('train_search.py', flags(project, save, **changes), processes, options=options)
    return start(words, cwd=project)


def search(project, save, code=0, processes=1, **changes):
    """Run a search to its end; returns its output."""
    return finish(begin(project, save, processes, **changes), code)


def kill_at(process, pattern, skip=0, writing=None, delay=0.0):
    """SIGKILL a search some seconds after a line of its output that matches, of which some are let pass.

    Args:
        writing: after that line, first wait until a checkpoint is being written in a run folder of this folder.

    Returns:
        What it had printed by then, or None where it ended first.
    """
    text = wait_for(process, pattern, skip)
    while writing and process.poll() is None and not list(Path(writing).glob('*/.*.pth.tar.*')):
        time.sleep(0.0002)
    time.sleep(delay)
    if process.poll() is not None:
        process.communicate()
        return None
    kill_all(process)
    return text


def wait_for(process, pattern, skip=0):
    """Read the output of a search up to a line that matches, of which some are let pass; returns what was read."""
    lines = []
    while line := process.stdout.readline():
        lines.append(line)
        if re.search(pattern, line):
            skip -= 1
            if skip < 0:
                break
    return ''.join(lines)


def assert_same_search(folder_a, folder_b, epochs=EPOCHS):
    """Both searches ended with bit-identical weights and masks."""
    name = f'searched_model_{epochs:02d}.pth.tar'
    assert differences(load(folder_a / name), load(folder_b / name)) == []
