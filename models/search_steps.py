"""Optimizers and backward passes of a search: weights on sampled paths, architecture on the mixture."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.latency import LatencyLoss
from models.model_search import Network
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
        op_weights: mixture weights [blocks, ops], from `Network.mixture_weights`.
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


def train_only(wanted: Iterable[nn.Parameter], others: Iterable[nn.Parameter]) -> None:
    """Enable gradients for `wanted` and disable them for `others`."""
    for p in others:
        p.requires_grad_(False)
    for p in wanted:
        p.requires_grad_(True)
