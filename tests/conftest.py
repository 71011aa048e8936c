"""Generated images, lists and tables that the tests share."""

import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_runs import make_data

from latency_pkl.fit import features
from models.latency import LatencyTable
from models.model_search import ExecutionMode
from models.search import Recipe, SearchState, new_state
from models.search_space import SPACE, Head, Op, SearchSpace, Stage, Stem
from tools.logs import start_console

ROOT = Path(__file__).resolve().parent.parent

SMALL_SPACE = SearchSpace(
    ops=(Op(3, 3, False), Op(5, 3, True), Op(3, 6, False)),
    stages=(
        Stage(depth=1, in_ch=4, out_ch=6, stride=2, act='relu'),
        Stage(depth=2, in_ch=6, out_ch=6, stride=1, act='swish'),
        Stage(depth=2, in_ch=6, out_ch=8, stride=2, act='h-swish'),
    ),
    stem=Stem(conv_ch=6, out_ch=4, kernel=3, stride=2, se_ch=2, act='relu'),
    head=Head(out_ch=16, act='swish'),
)
"""A space of three operators and five blocks; stage 2 keeps its shape, so that its input is an exit too."""

NUM_CLASSES = 3


torch.set_num_threads(1)  # with more, processes beside the tests slow them down many times over


@pytest.fixture(autouse=True)
def fresh_process():
    torch.manual_seed(0)
    start_console()


RECIPE = Recipe(9, 0, 5.0, 0.9, w_lr=0.05, w_mom=0.9, w_wd=1e-5, a_lr=0.01, a_betas=(0.5, 0.999), a_wd=5e-4)


def new_search(space, device=torch.device('cpu'), dtype=None, **recipe) -> SearchState:  # noqa: B008
    """The state of a fresh search in the mode of its device; `recipe`: changes of RECIPE."""
    torch.manual_seed(0)
    mode = ExecutionMode(fused=device.type == 'cuda')
    return new_state(NUM_CLASSES, space, device, mode, replace(RECIPE, **recipe), dtype)


@pytest.fixture
def small_space():
    return SMALL_SPACE


def make_table(space: SearchSpace = SPACE, img_size: int = 224, seed: int = 0, base: float = 1.0) -> LatencyTable:
    """A table of rising random curves."""
    rng = np.random.default_rng(seed)
    curves = {
        key: 0.05 + np.cumsum(rng.uniform(0.0005, 0.0015, high) * rng.uniform(0.5, 2))
        for key, (_, high) in space.table_widths(img_size).items()
    }
    return LatencyTable(base, curves, {}, img_size)


def physical_curves(img_size: int) -> dict[str, np.ndarray]:
    """Curves of a machine whose blocks take times of a physical kind, each shape up to a tenth more or less."""
    coefficients = np.array([3e4, 2e4, 0, 0, 1, 2, 0, 0, 5, 0, 0, 0]) / 1e7
    widths = SPACE.table_widths(img_size)
    curves = {}
    for block, _, op in SPACE.positions(img_size):
        key = block.key(op)
        shape = features(block, op, np.arange(1, widths[key][1] + 1)) @ coefficients
        curves[key] = shape * (1 + 0.1 * np.sin(len(curves)))
    return curves


@pytest.fixture
def settings():
    """Restores torch's settings of kernels."""
    cudnn, matmul, fill = torch.backends.cudnn, torch.backends.cuda.matmul, torch.utils.deterministic
    before = cudnn.benchmark, cudnn.deterministic, fill.fill_uninitialized_memory
    precisions = matmul.fp32_precision, cudnn.conv.fp32_precision
    yield
    cudnn.benchmark, cudnn.deterministic, fill.fill_uninitialized_memory = before
    matmul.fp32_precision, cudnn.conv.fp32_precision = precisions
    torch.use_deterministic_algorithms(False)


def random_arch(space: SearchSpace, rng: random.Random):
    """Depths, operators and widths at random."""
    arch = {
        name: [rng.randrange(len(space.ops)) for _ in range(rng.choice(stage.exit_depths))]
        for name, stage in space.named_stages
    }
    widths = space.start_widths()
    for block, index, op in space.positions():
        low, high = op.min_width(block.in_ch), op.max_width(block.in_ch)
        widths[block.stage][block.name][index] = rng.randint(low, high)
    return arch, widths


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    """Images, lists and the config of a small network; see `make_data`."""
    return make_data(tmp_path_factory.mktemp('training data'))


@pytest.fixture(scope='session')
def images(tmp_path_factory):
    """A folder of class folders with noisy images of one colour a class, and lists of them."""
    folder = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    lines = []
    for label, colour in enumerate([(200, 40, 40), (40, 200, 40), (40, 40, 200)]):
        (folder / f'class {label}').mkdir()
        for i in range(12):
            pixels = np.clip(np.array(colour) + rng.normal(0, 30, (40, 40, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f'class {label}' / f'{i}.png')
            lines.append(f'class {label}/{i}.png {label}')
    random.Random(0).shuffle(lines)
    (folder / 'train.txt').write_text('\n'.join(lines[:20]) + '\n')
    (folder / 'val.txt').write_text('\n'.join(lines[20:]) + '\n')
    return folder


@pytest.fixture(scope='session')
def run_script():
    """Run a script of the project as a user does; returns the completed process. `cwd`: another copy of the project."""

    def run(*words, code=0, cwd=ROOT, env=None):
        command = [sys.executable, *map(str, words)]
        environment = os.environ | {'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''} | (env or {})
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == code, f'{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}'
        return done

    return run


@pytest.fixture
def project_copy(tmp_path):
    """A copy of the project's code, for tests that edit it."""
    copy = tmp_path / 'project'
    ignored = shutil.ignore_patterns('.git', '.venv', '__pycache__', 'checkpoints', 'demo', '*.png', '.*cache')
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy
