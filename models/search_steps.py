"""The two steps of a search: one trains the weights on paths, the other the architecture on the mixture."""

import torch.nn.functional as F
from torch import nn

from models.latency import expected_latency


def always(parameters, losses):
    """For `before_update`, in a single process whose losses are taken as they are."""
    return True


def weight_step(net, optimizer, images, labels, paths, grad_clip, before_update=always):
    """Train the weights on some paths, one operator a block each; returns loss and logits of the first.

    Args:
        before_update: gets the parameters, whose gradients it may change, and the losses; says whether to update.
    """
    optimizer.zero_grad(set_to_none=True)
    results = []
    for path in paths:
        logits = net(images, path)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        results.append((loss.detach(), logits.detach()))
    parameters = net.weight_parameters()
    if before_update(parameters, [loss for loss, _ in results]):
        nn.utils.clip_grad_norm_(parameters, grad_clip)
        optimizer.step()
    return results[0]


def architecture_step(net, optimizer, images, labels, op_weights, table_matrix, table, args, before_update=always):
    """Train log_alphas and betas on the mixture and its latency; returns loss, logits and latency.

    Args:
        before_update: see `weight_step`.
    """
    optimizer.zero_grad(set_to_none=True)
    logits = net(images, op_weights)
    latency = expected_latency(table.base, table_matrix, op_weights, net.depth_weights(), table.space)
    loss = F.cross_entropy(logits, labels)
    (loss + args.lambda_lat * (latency / args.target_lat - 1).abs()).backward()
    parameters = net.arch_parameters()
    if before_update(parameters, [loss]):
        nn.utils.clip_grad_norm_(parameters, args.grad_clip)
        optimizer.step()
        net.project_architecture()
    return loss.detach(), logits.detach(), latency.detach()


def train_only(wanted, others):
    """Let gradients be computed for `wanted` and not for `others`."""
    for p in others:
        p.requires_grad_(False)
    for p in wanted:
        p.requires_grad_(True)
