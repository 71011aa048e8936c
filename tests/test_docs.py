"""Every command block of the pages runs, at tiny size; the links and file names in them are real.

The blocks run as they stand, page by page, in a copy of the project with tiny images. `python` and `torchrun` there are
programs that add a script's tiny flags to its own: the last of two equal flags counts. Variables that a page sets only
where they are unset (`${IMAGES:-...}`) come from here.
"""

import importlib
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import make_table
from models.config import dump_config, load_config
from models.tables import save_table

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*(ROOT / name for name in ('README.md', 'CONTRIBUTING.md', 'experiments/README.md'))]
PAGES += sorted((ROOT / 'docs').glob('*.md'))
SMALL = '--img_size 32 --workers 0 --device cpu'
TRAINING = f'{SMALL} --batch_size 4 --epochs 1 --lr 0.02 --print_freq 1'
TINY_STEPS = '--img_size 32 --device cpu --rounds 3 --batch_size 2'
TINY = {
    'train_search.py': f'{SMALL} --batch_size 4 --epochs 2 --warmup_epochs 1 --print_freq 1',
    'train_eval.py': TRAINING,
    'train_eval_amp.py': TRAINING,
    'parsing_model.py': '--img_size 32 --device cpu',
    'test.py': f'{SMALL} --batch_size 4',
    'latency_pkl/make_lat_lut.py': '--img_size 32 --budget 30 --networks 60',
    'benchmarks/search_step.py': TINY_STEPS,
}
FEW = '--img_size 32 --train_list demo/images/search_val.txt'
TINY_DEMO = TINY | {
    'train_search.py': f'{FEW} --epochs 2 --warmup_epochs 1 --largest_epochs 0',
    'train_eval.py': f'{FEW} --epochs 1',
    'test.py': '--img_size 32',
}
TINY_CHECK = '--img_size 32 --device cpu --networks 2 --tolerance 1e9'
WRAPPER = """#!{python}
import os, sys
words, tiny = sys.argv[1:], {tiny}
if {torchrun}:
    words = ['-m', 'torch.distributed.run', '--nproc_per_node=2', '--master_port={port}',
             *(word for word in words if not word.startswith('--nproc_per_node'))]
script = next((word for word in words if word in tiny), '')
words += tiny[script].split() if script and '--check' not in words else {check!r}.split() if script else []
os.execv({python!r}, [{python!r}, *words])
"""


def blocks(page, language='bash'):
    return re.findall(rf'^```{language}\n(.*?)^```$', page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def tiny(project_copy, images, tmp_path):
    """A copy of the project, an environment whose commands are tiny, a table and a trained-on set of images."""
    shutil.copytree(ROOT / 'dataset' / 'demo', project_copy / 'dataset' / 'demo')
    (project_copy / 'dataset' / 'imagenet100_classes.txt').write_text('a\nb\nc\n')
    for part in ('train', 'val'):
        for name in 'abc':
            shutil.copytree(images / f'class {"abc".index(name)}', tmp_path / 'images' / part / name)
    table = make_table(img_size=32, seed=1)
    save_table(table.base, table.curves, {'unit': 'ms', 'device': 'made up'}, tmp_path / 'table.pkl')
    (tmp_path / 'three.config').write_text(
        dump_config(load_config(ROOT / 'models' / 'zoo' / 'tf_nas_a.config').with_classes(3))
    )
    programs = tmp_path / 'bin'
    programs.mkdir()
    for name in ('python', 'torchrun', 'demo'):
        text = WRAPPER.format(
            python=sys.executable,
            tiny=TINY_DEMO if name == 'demo' else TINY,
            check=TINY_CHECK,
            torchrun=name == 'torchrun',
            port=29500 + os.getpid() % 999,
        )
        (programs / name).write_text(text)
        (programs / name).chmod(0o755 | stat.S_IXUSR)
    variables = {
        'PATH': f'{programs}:{os.environ["PATH"]}',
        'IMAGES': tmp_path / 'images',
        'TABLE': tmp_path / 'table.pkl',
        'CONFIG': tmp_path / 'three.config',
        'CLASSES': 3,
        'TARGET': '40%',
        'PYTHON': programs / 'demo',
        'OMP_NUM_THREADS': 1,
        'CUDA_VISIBLE_DEVICES': '',
    }
    return project_copy, os.environ | {name: str(value) for name, value in variables.items()}


@pytest.mark.slow
@pytest.mark.parametrize('page', [page for page in PAGES if blocks(page)], ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_run(page, tiny):
    copy, environment = tiny
    script = 'set -euo pipefail\n' + '\n'.join(blocks(page))
    command = ['bash', '-x', '-c', script]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, f'{done.stdout[-3000:]}\n{done.stderr[-5000:]}'
    if page == ROOT / 'README.md':  # the demo's summary of the found network and a random one
        assert re.search(r'\n  off the target +[+-]\d+\.\d % +[+-]\d+\.\d %\nMACs ', done.stdout)


@pytest.mark.slow
def test_the_imagenet_part_of_example_runs_and_goes_on(tiny):
    copy, environment = tiny
    example = copy / 'example.sh'
    text = example.read_text()
    for name, value in {'imagenet': environment['IMAGES'], 'table': environment['TABLE'], 'target': '40%'}.items():
        text, count = re.subn(rf'^{name}=\S+', f'{name}={value}', text, flags=re.MULTILINE)
        assert count == 1
    example.write_text(text)
    environment |= {'PYTHON': str(Path(environment['PATH'].split(':')[0]) / 'python')}
    for _ in range(2):
        done = subprocess.run(['bash', example], env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f'{done.stdout[-3000:]}\n{done.stderr[-5000:]}'
        assert any(line.startswith('Val_acc_top1: ') for line in done.stdout.splitlines())
        runs = sorted(path.name for path in (copy / 'checkpoints').iterdir())
        assert len(runs) == 2 and all(name.endswith('-example-table-40%') for name in runs), runs


def test_the_python_of_the_recipes_prints_what_it_says(run_script):
    (code,) = blocks(ROOT / 'docs' / 'recipes.md', 'python')
    printed = run_script('-c', code).stdout
    assert '(2, 16), (4, 24), (8, 40), (16, 112), (32, 320)' in printed and '(1, 320, 7, 7)' in printed


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_files_named_in_a_page_are_there(page):
    text = page.read_text()
    for link in re.findall(r'\]\(([^)#:]+)(?:#[^)]*)?\)', text):
        assert (page.parent / link).exists(), link
    folders = 'models|tools|dataset|latency_pkl|tests|benchmarks|experiments|docs'
    for name in re.findall(rf'`((?:{folders})/[\w/.]+\.\w+)', text):
        place, _, member = name.rpartition('.')
        assert (ROOT / name).exists() or (ROOT / f'{place}.py').exists(), name
    for fragment, target in re.findall(r'\]\(([^)#:]*)#([^)]+)\)', text):
        headings = re.findall(r'^#+ (.*)$', (page.parent / fragment if fragment else page).read_text(), re.MULTILINE)
        assert target in [re.sub(r'[^\w -]', '', h.lower()).replace(' ', '-') for h in headings], target


MORE_SCRIPTS = [
    'dataset/make_lists.py',
    'latency_pkl/time_networks.py',
    'benchmarks/runtimes.py',
    'tools/plots.py',
]
NOT_OURS = {'latency.md': {'--graph', '--num_threads'}}
"""Flags that a page names, of other programs."""


def help_of(script, monkeypatch, capsys):
    """What a script prints with `--help`, in this process."""
    monkeypatch.setattr(sys, 'argv', [script, '--help'])
    with pytest.raises(SystemExit):
        importlib.import_module(script.removesuffix('.py').replace('/', '.')).get_args()
    return capsys.readouterr().out


def test_flags_named_in_the_pages_exist(monkeypatch, capsys):
    known = set()
    for script in [*TINY, *MORE_SCRIPTS]:
        known |= set(re.findall(r'--[\w-]+', help_of(script, monkeypatch, capsys)))
    known |= {'--help', '--nproc_per_node', '--max-restarts', '--loss_scale'}
    for page in PAGES:
        named = set(re.findall(r'(?<![\w-])--[a-z]\w+(?:-\w+)*', page.read_text()))
        unknown = named - known
        assert unknown == NOT_OURS.get(page.name, set()), f'{page.name}: {sorted(unknown)}'


@pytest.mark.parametrize(
    'script', ['train_search.py', 'parsing_model.py', 'train_eval.py', 'train_eval_amp.py', 'test.py']
)
def test_help_shows_the_commands_of_each_script(script, monkeypatch, capsys):
    shown = help_of(script, monkeypatch, capsys)
    assert f'python {script}' in shown.replace('torchrun --nproc_per_node=2', 'python')


def test_help_shows_defaults_also_where_they_are_zero(monkeypatch, capsys):
    shown = ' '.join(help_of('train_eval.py', monkeypatch, capsys).split())
    for says in (
        'average of the weights (default: 0.0)',
        '--lr LR learning rate at the start (default: 0.2)',
        'network with torch.compile --tf32',
    ):
        assert says in shown
    assert shown.count('many as the list or the weights have') == 1 and 'have (default' not in shown


def test_the_readme_is_at_most_five_screens():
    assert len((ROOT / 'README.md').read_text().splitlines()) <= 5 * 50
