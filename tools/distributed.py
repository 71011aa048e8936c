"""Which device and which of how many processes this is."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tools.errors import BadInput

Value = TypeVar('Value')


@dataclass(frozen=True)
class World:
    """This process among all of a run."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def gpus(self) -> int:
        """GPUs that this process trains on: all visible ones where it is alone and has not been given one."""
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
        """The largest of each value over all processes, to take decisions together; without waiting for a GPU."""
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
        """What `decide()` returns in the first process, in all of them; the others do not call it."""
        values = [decide() if self.is_first else None]
        if self.size > 1:
            dist.broadcast_object_list(values, 0)
        return values[0]

    def all_any(self, flags: Tensor) -> None:
        """Set each flag that is set in any process, in place.

        Args:
            flags: bool [N], on the CPU.
        """
        if self.size > 1:
            numbers = flags.to(torch.uint8)
            dist.all_reduce(numbers, dist.ReduceOp.MAX)
            flags |= numbers.bool()

    def broadcast_buffers(self, *modules: nn.Module) -> None:
        """Give all processes the first one's buffers (the running statistics of batch norm)."""
        self.broadcast(buffer for module in modules for buffer in module.buffers())

    def split_evenly(self, count: int, what: str) -> int:
        """This process's part of a total such as the batch size.

        Raises:
            BadInput: the processes cannot share it evenly.
        """
        if count % self.size:
            raise BadInput(f'{what} {count} is a total for all processes and should be a multiple of {self.size}')
        return count // self.size


def pick_device(choice: str) -> torch.device:
    """The device of `--device`, with one line to stdout where 'auto' finds no GPU.

    Raises:
        BadInput: 'cuda' where there is none.
    """
    if choice == 'cuda' and not torch.cuda.is_available():
        raise BadInput('--device cuda: no CUDA GPU is available here; use --device auto or --device cpu')
    if choice == 'cpu' or not torch.cuda.is_available():
        if choice == 'auto':
            print('No CUDA GPU here: running on the CPU.', flush=True)
        return torch.device('cpu')
    return torch.device('cuda')


def join_world(device_choice: str, local_rank: int | None) -> World:
    """Join the process group that torchrun or torch.distributed.launch describes in the environment; alone without one.

    Args:
        device_choice: see `pick_device`; each process that was launched takes the GPU of its local rank, or the CPU
            with gloo. One that was not has all GPUs: its device is 'cuda' without a number.
        local_rank: of the command line, for launchers that pass it; the environment's LOCAL_RANK goes first.
    """
    size, rank = _from_environment('WORLD_SIZE', 1), _from_environment('RANK', 0)
    launched = size > 1 or 'LOCAL_RANK' in os.environ  # by torchrun, also with a single process
    if not launched:
        return World(pick_device(device_choice))
    if size > 1 and 'RANK' not in os.environ or not 0 <= rank < size:
        raise BadInput(f'WORLD_SIZE is {size} but RANK is {os.environ.get("RANK")}: start the processes with torchrun')
    local_rank = _from_environment('LOCAL_RANK', local_rank if local_rank is not None else rank)
    device = pick_device(device_choice if rank == 0 or device_choice != 'auto' or torch.cuda.is_available() else 'cpu')
    if device.type == 'cuda':
        if local_rank >= torch.cuda.device_count():
            raise BadInput(f'local rank {local_rank} has no GPU: {torch.cuda.device_count()} are visible')
        device = torch.device('cuda', local_rank)
        torch.cuda.set_device(device)
    if size == 1:
        return World(device)
    backend = 'cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo'
    if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':
        # without the prefix, a process that torchrun restarted may read the addresses of its dead predecessors
        store = dist.TCPStore(os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']), is_master=False)
        attempt = dist.PrefixStore(f'attempt {_from_environment("TORCHELASTIC_RESTART_COUNT", 0)}', store)
        dist.init_process_group(backend, store=attempt, rank=rank, world_size=size)
    else:
        dist.init_process_group(backend)
    return World(device, rank, size)


def leave_world(world: World) -> None:
    """Leave the process group."""
    if world.size > 1:
        dist.destroy_process_group()


def _from_environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise BadInput(
            f'environment variable {name}={text!r} should be a whole number; launchers such as torchrun set it'
        )
    return int(text)
