"""Optimizers and backward passes of a search: weights on sampled paths, architecture on the mixture."""

import os
import shlex
import shutil
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.latency import LatencyLoss
from models.model_search import Network
from tools.errors import BadInput
from tools.precision import Precision
from tools.training import begin_momentum


def make_optimizers(net: Network, w_lr: float, args) -> tuple[torch.optim.SGD, torch.optim.Adam]:
    """Return fresh optimizers of the weights and of the architecture. Fused, for few kernel launches per step.

    Args:
        w_lr: learning rate of the weights.
        args: w_mom, w_wd, a_lr, a_beta1, a_beta2, a_wd.
    """
    weights, betas = net.weight_parameters(), (args.a_beta1, args.a_beta2)
    w_optimizer = torch.optim.SGD(weights, w_lr, args.w_mom, weight_decay=args.w_wd, fused=True)
    begin_momentum(w_optimizer)
    return w_optimizer, torch.optim.Adam(net.arch_parameters(), args.a_lr, betas, weight_decay=args.a_wd, fused=True)


def backward_on_paths(
    net: Network, images: Tensor, labels: Tensor, paths: Sequence[Sequence[int]], precision: Precision
) -> tuple[list[Tensor], Tensor]:
    """Add the weights' gradients of the cross entropy on each path (paper, section 3.2).

    All paths share the stem: it runs once, and its backward pass gets the sum of their gradients.

    Args:
        paths: an op index per block, for each path.
        precision: that of the weights' optimizer.

    Returns:
        The loss of each path, and the logits [N, classes] of the first.
    """
    with precision.autocast():
        shared = net.stem(images)
    features = shared.detach().requires_grad_()
    losses, outputs = [], []
    for path in paths:
        with precision.autocast():
            logits = net.searched(features, path).float()
        loss = F.cross_entropy(logits, labels)
        precision.backward(loss)
        losses.append(loss.detach())
        outputs.append(logits.detach())
    shared.backward(features.grad)
    return losses, outputs[0]


def backward_on_mixture(
    net: Network, images: Tensor, labels: Tensor, op_weights: Tensor, latency_loss: LatencyLoss, precision: Precision
) -> tuple[Tensor, Tensor, Tensor]:
    """Add the gradients of log_alphas and betas: cross entropy of the mixture plus its latency loss (section 3.1).

    Args:
        op_weights: mixture weights [blocks, ops], from `Network.noisy_weights` with noise from `mixture_noise`.
        precision: that of the architecture's optimizer.

    Returns:
        The cross entropy, the logits [N, classes], and the latency of the mixture in the table's unit.
    """
    with precision.autocast():
        logits = net(images, op_weights).float()
    loss = F.cross_entropy(logits, labels)
    of_latency, latency = latency_loss(op_weights, net.depth_weights())
    precision.backward(loss + of_latency)
    return loss.detach(), logits.detach(), latency.detach()


def rehearse_architecture_step(
    net: Network, shape: Sequence[int], latency_loss: LatencyLoss, precision: Precision, args
) -> None:
    """Run and discard an architecture step at the widest widths, so that a GPU with too little memory fails now.

    The first architecture step of a search comes after the warm-up, and scaling widens operators after that. The step
    has a network, optimizers and images to itself, and draws nothing.

    Args:
        net: supernet of the search; not changed.
        shape: a batch of images, [N, 3, H, W].
        precision: that of the architecture's optimizer; not changed.
        args: grad_clip, and those of `make_optimizers`.

    Raises:
        torch.OutOfMemoryError: the step needs more memory than there is.
    """
    _widest_step(net, shape, latency_loss, Precision(precision.device, precision.dtype), args)
    torch.cuda.empty_cache()


def _widest_step(net: Network, shape: Sequence[int], latency_loss: LatencyLoss, precision: Precision, args) -> None:
    classifier, device = net.classifier.linear, precision.device
    with torch.device('meta'):  # initial weights would be drawn from torch's global generator
        widest = Network(net.space.max_widths(), classifier.out_features, net.space, net.mode)
    widest = widest.to_empty(device=device).train()
    with torch.no_grad():
        torch._foreach_zero_(list(widest.parameters()))
    _, optimizer = make_optimizers(widest, 0.0, args)  # the momentum of the weights takes memory too
    images = torch.zeros(*shape, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(shape[0], dtype=torch.int64, device=device)
    train_only(widest.arch_parameters(), widest.weight_parameters())
    op_weights = F.softmax(widest.log_alphas(), dim=1)
    backward_on_mixture(widest, images, labels, op_weights, latency_loss, precision)
    precision.step(optimizer, args.grad_clip)


def check_step_args(args, device: torch.device) -> None:
    """Check that this machine can do what the flags ask for.

    Args:
        args: compile, cuda_graph.

    Raises:
        BadInput: it cannot.
    """
    if args.cuda_graph and device.type != 'cuda':
        raise BadInput('--cuda_graph: only a GPU runs graphs, and this run is on the CPU; leave it out')
    if args.compile:
        # as torch looks for a C++ compiler, and its Triton for a C compiler
        variable, usual = ('CC', ('gcc', 'clang')) if device.type == 'cuda' else ('CXX', ('g++',))
        names = [shlex.split(os.environ[variable])[0]] if os.environ.get(variable, '').strip() else usual
        if not any(map(shutil.which, names)):
            raise BadInput(
                f'--compile: no compiler {" or ".join(names)} on the PATH, which torch.compile needs; install one, name'
                f' one by the environment variable {variable}, or leave --compile out'
            )


def train_only(wanted: Iterable[nn.Parameter], others: Iterable[nn.Parameter]) -> None:
    """Enable gradients for `wanted` and disable them for `others`."""
    for p in others:
        p.requires_grad_(False)
    for p in wanted:
        p.requires_grad_(True)
