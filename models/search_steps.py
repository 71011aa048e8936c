"""The two steps of a search: one trains the weights on paths, the other the architecture on the mixture."""

import torch
import torch.nn.functional as F

from models.latency import expected_latency
from tools.training import begin_momentum


def always(parameters, losses):
    """For `before_update`, in a single process whose losses are taken as they are."""
    return True


def make_optimizers(net, w_lr, args):
    """Fresh optimizers of the weights (SGD) and of the architecture (Adam), of few launches.

    Args:
        w_lr: learning rate of the weights.
        args: w_mom, w_wd, a_lr, a_beta1, a_beta2, a_wd.
    """
    weights, betas = net.weight_parameters(), (args.a_beta1, args.a_beta2)
    w_optimizer = torch.optim.SGD(weights, w_lr, args.w_mom, weight_decay=args.w_wd, fused=True)
    begin_momentum(w_optimizer)
    return w_optimizer, torch.optim.Adam(net.arch_parameters(), args.a_lr, betas, weight_decay=args.a_wd, fused=True)


def weight_step(net, optimizer, images, labels, paths, grad_clip, precision, before_update=always):
    """Train the weights on some paths, one operator a block each; returns loss and logits of the first.

    The stem, which all paths share, is run once, and its backward pass gets the sum of their gradients.

    Args:
        precision: a `tools.precision.Precision` for this optimizer.
        before_update: gets the parameters, whose gradients it may change, and the losses; says whether to update.
    """
    optimizer.zero_grad(set_to_none=True)
    with precision.autocast():
        shared = net.stem(images)
    features = shared.detach().requires_grad_()
    results = []
    for path in paths:
        with precision.autocast():
            logits = net.searched(features, path).float()
        loss = F.cross_entropy(logits, labels)
        precision.backward(loss, optimizer)
        results.append((loss.detach(), logits.detach()))
    shared.backward(features.grad)
    if before_update(net.weight_parameters(), [loss for loss, _ in results]):
        precision.step(optimizer, grad_clip)
    return results[0]


def architecture_step(
    net, optimizer, images, labels, op_weights, table_matrix, table, args, precision, before_update=always
):
    """Train log_alphas and betas on the mixture and its latency; returns loss, logits and latency.

    Args:
        op_weights: of the mixture [blocks, ops], from `Network.mixture_weights`.
        table_matrix: latencies [blocks, ops] in the unit of `table`, from `LatencyTable.matrix`.
        args: lambda_lat, target_lat and grad_clip.
        precision, before_update: see `weight_step`.
    """
    optimizer.zero_grad(set_to_none=True)
    with precision.autocast():
        logits = net(images, op_weights).float()
    latency = expected_latency(table.base, table_matrix, op_weights, net.depth_weights(), table.space)
    loss = F.cross_entropy(logits, labels)
    precision.backward(loss + args.lambda_lat * (latency / args.target_lat - 1).abs(), optimizer)
    if before_update(net.arch_parameters(), [loss]):
        precision.step(optimizer, args.grad_clip)
        net.project_architecture()
    return loss.detach(), logits.detach(), latency.detach()


def train_only(wanted, others):
    """Let gradients be computed for `wanted` and not for `others`."""
    for p in others:
        p.requires_grad_(False)
    for p in wanted:
        p.requires_grad_(True)
