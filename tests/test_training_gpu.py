"""Training on CUDA GPUs: number formats, one and two GPUs, resuming."""

import signal
from contextlib import nullcontext

import pytest
import torch
from training_runs import (
    command,
    finish,
    flags,
    kill_all,
    load,
    only_run,
    run,
    small_config,
    start,
    wait_for_steps,
)

from models.model_eval import NetworkEval
from tools.errors import BadInput
from tools.files import put_weights, read_weights
from tools.precision import check_format

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU'),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two CUDA GPUs')
STILL = {'dropout_rate': 0, 'drop_connect_rate': 0}


def weights(save):
    return load(only_run(save) / 'checkpoint.pth.tar')['state_dict']


def distance(a, b):
    return max((a[name].double().cpu() - b[name].double().cpu()).abs().max().item() for name in a)


@pytest.mark.parametrize(('level', 'dtype'), [('O0', None), ('O1', 'float16'), ('O1', 'bfloat16')])
def test_every_format_trains_and_is_read_in_float32(data, tmp_path, level, dtype):
    changes = STILL | {'epochs': 1, 'device': 'cuda', 'opt_level': level}
    run('train_eval_amp.py', flags(data, tmp_path / 'gpu', amp_dtype=dtype, **changes))
    run('train_eval_amp.py', flags(data, tmp_path / 'cpu', **(changes | {'device': 'cpu', 'opt_level': 'O0'})))
    checkpoint = load(only_run(tmp_path / 'gpu') / 'checkpoint.pth.tar')
    assert bool(checkpoint['scaler']) == (dtype == 'float16')
    assert all(value.dtype in (torch.float32, torch.int64) for value in checkpoint['state_dict'].values())
    assert distance(weights(tmp_path / 'gpu'), weights(tmp_path / 'cpu')) < (0.5 if level != 'O0' else 0.05)
    best = only_run(tmp_path / 'gpu') / 'model_best.pth.tar'
    put_weights(NetworkEval(small_config()), read_weights(best).state, best)


@pytest.mark.parametrize('level', ['O0', 'O1'])
def test_a_killed_run_goes_on_close_to_the_undisturbed_one(data, tmp_path, level):
    """Close and not equal: kernels of a GPU may add in any order."""
    changes = {'device': 'cuda', 'opt_level': level, 'workers': 2}
    run('train_eval_amp.py', flags(data, tmp_path / 'whole', **changes))
    words = command('train_eval_amp.py', flags(data, tmp_path / 'part', save_freq=0, snapshot='auto', **changes))
    process = start(words)
    wait_for_steps(process, 7)
    kill_all(process)
    process = start(words)
    assert 'goes on from' in wait_for_steps(process, 2)
    process.send_signal(signal.SIGTERM)
    finish(process)
    finish(start(words))
    assert distance(weights(tmp_path / 'part'), weights(tmp_path / 'whole')) < 0.2


@pytest.mark.parametrize('layout', ['channels_last', 'no-channels_last'])
def test_a_run_of_a_cpu_goes_on_on_a_gpu_in_either_layout(data, tmp_path, layout):
    """Momentum in the layout of the CPU's weights would be permuted, or refused."""
    run('train_eval_amp.py', flags(data, tmp_path / 'whole', **STILL))
    run('train_eval_amp.py', flags(data, tmp_path / 'part', max_steps=15, **STILL))
    before = weights(tmp_path / 'part')
    changes = STILL | {'device': 'cuda', 'snapshot': 'auto', layout: True}
    assert 'goes on from' in run('train_eval_amp.py', flags(data, tmp_path / 'part', **changes))
    moved = distance(weights(tmp_path / 'part'), before)
    assert distance(weights(tmp_path / 'part'), weights(tmp_path / 'whole')) < min(0.05, moved)


def test_bfloat16_of_this_card_is_emulated_or_taken():
    emulated = not torch.cuda.is_bf16_supported(including_emulation=False)
    major, _ = torch.cuda.get_device_capability()
    assert emulated == (major < 8)
    with pytest.raises(BadInput, match='only emulates') if emulated else nullcontext():
        check_format('bfloat16', '--amp', torch.device('cuda'))


def test_compiled(data, tmp_path):
    run('train_eval_amp.py', flags(data, tmp_path, epochs=1, device='cuda', opt_level='O1', compile=True))
    assert not any('_orig_mod' in name for name in weights(tmp_path))


@two_gpus
def test_plain_python_uses_both_gpus(data, tmp_path):
    run('train_eval.py', flags(data, tmp_path, epochs=1, device='cuda', **STILL))
    best = only_run(tmp_path) / 'model_best.pth.tar'
    put_weights(NetworkEval(small_config()), read_weights(best).state, best)


@two_gpus
@pytest.mark.parametrize('launcher', ['torch.distributed.run', 'torch.distributed.launch'])
def test_two_processes_with_synchronised_batch_norm_give_the_parameters_of_one(data, tmp_path, launcher, monkeypatch):
    monkeypatch.setenv('NVIDIA_TF32_OVERRIDE', '0')
    changes = STILL | {'device': 'cuda', 'max_steps': 1, 'lr': 0.5}
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '0')
    run('train_eval_amp.py', flags(data, tmp_path / 'one', **changes))
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '0,1')
    run('train_eval_amp.py', flags(data, tmp_path / 'two', sync_bn=True, **changes), processes=2, launcher=launcher)
    one, two = weights(tmp_path / 'one'), weights(tmp_path / 'two')
    trained = {name: value for name, value in one.items() if 'running_' not in name}
    assert distance(trained, two) <= 1e-5


@two_gpus
def test_mixed_precision_over_nccl(data, tmp_path):
    output = run(
        'train_eval_amp.py', flags(data, tmp_path, epochs=1, device='cuda', opt_level='O1', sync_bn=True), processes=2
    )
    assert output.count('val_top1') == 1
