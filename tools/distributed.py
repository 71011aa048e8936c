"""The device of this process, and its place among the processes of a run."""

import logging
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tools.errors import BadInput

log = logging.getLogger('tf-nas')

USE_TORCHRUN = 'start the processes with: torchrun --nproc_per_node=N SCRIPT ...'

FIRST_PORT, PORTS = 20000, 20000  # range of the port at which the processes of srun on one node meet

Value = TypeVar('Value')


@dataclass(frozen=True)
class World:
    """This process among all of a run."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def gpus(self) -> int:
        """Number of GPUs that this process trains on: all visible ones if it is alone and was not given one."""
        return torch.cuda.device_count() if self.device == torch.device('cuda') else int(self.device.type == 'cuda')

    @property
    def is_first(self) -> bool:
        """Whether this process logs and writes files."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_max(self, *values: int) -> list[int]:
        """Return the largest of each value over all processes, so that they decide alike. Does not wait for a GPU."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average the gradients over all processes, in place and in one transfer.

        Args:
            parameters: those without a gradient are left out; they must be the same in all processes.
        """
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        parts = (flat / self.size).split([gradient.numel() for gradient in gradients])
        averages = [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]
        torch._foreach_copy_(gradients, averages)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Give all processes the first one's values."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def from_rank0(self, decide: Callable[[], Value]) -> Value:
        """Return what `decide()` returns in the first process; the others do not call it."""
        values = [decide() if self.is_first else None]
        if self.size > 1:
            dist.broadcast_object_list(values, 0)
        return values[0]

    def broadcast_buffers(self, *modules: nn.Module) -> None:
        """Give all processes the first one's buffers (the running statistics of batch norm)."""
        self.broadcast(buffer for module in modules for buffer in module.buffers())

    def split_evenly(self, count: int, what: str) -> int:
        """Return this process's part of a total such as the batch size.

        Raises:
            BadInput: the processes cannot share it evenly.
        """
        if count % self.size:
            raise BadInput(f'{what} {count} is a total for all processes and should be a multiple of {self.size}')
        return count // self.size


@dataclass(frozen=True)
class Launch:
    """Place of this process among those that a launcher started. `command`: what starts them, without the script."""

    rank: int
    size: int
    local_rank: int
    command: tuple[str, ...]


def find_launch(local_rank: int | None = None) -> Launch | None:
    """Return how this process was launched, by the environment: torchrun or srun. None if it was started alone.

    Args:
        local_rank: of the command line, for launchers that pass it; the environment's LOCAL_RANK goes first.

    Raises:
        BadInput: the environment is inconsistent, or does not say how the processes find each other.
    """
    if 'WORLD_SIZE' in os.environ or 'LOCAL_RANK' in os.environ:
        launch = _torchrun_launch(local_rank)
    elif _number('SLURM_STEP_NUM_TASKS', 1) > 1:  # set by srun, for each process of a step
        launch = _srun_launch()
    else:
        return None
    if not 0 <= launch.rank < launch.size:
        raise BadInput(f'this is process {launch.rank} of {launch.size}, by the environment; {USE_TORCHRUN}')
    missing = [name for name in ('MASTER_ADDR', 'MASTER_PORT') if name not in os.environ]
    if launch.size > 1 and missing:
        raise BadInput(
            f'{launch.size} processes, but {" and ".join(missing)} not set in the environment; {USE_TORCHRUN}'
        )
    return launch


def _srun_launch() -> Launch:
    """On one node the processes meet there; on several, MASTER_ADDR and MASTER_PORT must be set."""
    if _number('SLURM_STEP_NUM_NODES', 0) == 1:
        os.environ.setdefault('MASTER_ADDR', '127.0.0.1')
        # jobs that share the node get other ports
        os.environ.setdefault('MASTER_PORT', str(FIRST_PORT + _number('SLURM_JOB_ID', 0) % PORTS))
    rank, size = _number('SLURM_PROCID', 0), _number('SLURM_STEP_NUM_TASKS', 1)
    return Launch(rank, size, _number('SLURM_LOCALID', 0), ('srun', sys.executable))


def _torchrun_launch(local_rank: int | None) -> Launch:
    size, rank = _number('WORLD_SIZE', 1), _number('RANK', 0)
    if size > 1 and 'RANK' not in os.environ:
        raise BadInput(f'WORLD_SIZE is {size} but RANK is not set; {USE_TORCHRUN}')
    command = [sys.executable]
    if size > 1:
        command += ['-m', 'torch.distributed.run', f'--nproc_per_node={_number("LOCAL_WORLD_SIZE", 1)}']
        nodes = _number('GROUP_WORLD_SIZE', 1)
        command += [f'--nnodes={nodes}'] if nodes > 1 else []
    return Launch(rank, size, _number('LOCAL_RANK', local_rank if local_rank is not None else rank), tuple(command))


def launch_command() -> list[str]:
    """Return the words that start the processes of this run, without the script."""
    launch = find_launch()
    return list(launch.command) if launch else [sys.executable]


def pick_device(choice: str) -> torch.device:
    """Return the device of `--device`, logging if 'auto' finds no GPU.

    Raises:
        BadInput: 'cuda' without a GPU.
    """
    if choice == 'cuda' and not torch.cuda.is_available():
        raise BadInput('--device cuda: no CUDA GPU is available here; use --device auto or --device cpu')
    if choice == 'cpu' or not torch.cuda.is_available():
        if choice == 'auto':
            log.info('No CUDA GPU here: running on the CPU.')
        return torch.device('cpu')
    return torch.device('cuda')


def join_world(device_choice: str, local_rank: int | None) -> World:
    """Join the process group that a launcher describes in the environment; alone without one. See `find_launch`.

    Args:
        device_choice: see `pick_device`. A launched process takes the GPU of its local rank, or the CPU with gloo. Any
            other has all GPUs: its device is 'cuda' without a number.
        local_rank: of the command line, for launchers that pass it.
    """
    launch = find_launch(local_rank)
    if launch is None:
        return World(pick_device(device_choice))
    if launch.rank > 0:
        log.setLevel(logging.CRITICAL)  # the first process logs for all
    device = pick_device(device_choice)
    if device.type == 'cuda':
        gpus = torch.cuda.device_count()
        # srun with a GPU bound to each task shows every process one GPU
        index = 0 if gpus == 1 and launch.command[0] == 'srun' else launch.local_rank
        if index >= gpus:
            raise BadInput(f'local rank {launch.local_rank} has no GPU: {gpus} are visible')
        device = torch.device('cuda', index)
        torch.cuda.set_device(device)
    if launch.size == 1:
        return World(device)
    if launch.command[0] != sys.executable:
        log.info('Waiting for all %d processes of %s.', launch.size, launch.command[0])
    backend = 'cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo'
    options = {'rank': launch.rank, 'world_size': launch.size}
    if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':
        # without the prefix, a process that torchrun restarted may read the addresses of its dead predecessors
        store = dist.TCPStore(os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']), is_master=False)
        attempt = dist.PrefixStore(f'attempt {_number("TORCHELASTIC_RESTART_COUNT", 0)}', store)
        dist.init_process_group(backend, store=attempt, **options)
    else:
        dist.init_process_group(backend, **options)
    return World(device, launch.rank, launch.size)


def leave_world(world: World) -> None:
    """Leave the process group."""
    if world.size > 1:
        dist.destroy_process_group()


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise BadInput(
            f'environment variable {name}={text!r} should be a whole number; launchers such as torchrun set it'
        )
    return int(text)
