"""The two steps of a search: one trains the weights on paths, the other the architecture on the mixture."""

import torch.nn.functional as F
from torch import nn

from models.latency import expected_latency


def weight_step(net, optimizer, images, labels, paths, grad_clip):
    """Train the weights on some paths, one operator a block each; returns loss and logits of the first."""
    optimizer.zero_grad(set_to_none=True)
    results = []
    for path in paths:
        logits = net(images, path)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        results.append((loss.detach(), logits.detach()))
    nn.utils.clip_grad_norm_(net.weight_parameters(), grad_clip)
    optimizer.step()
    return results[0]


def architecture_step(net, optimizer, images, labels, op_weights, table_matrix, table, args):
    """Train log_alphas and betas on the mixture and its latency; returns loss, logits and latency."""
    optimizer.zero_grad(set_to_none=True)
    logits = net(images, op_weights)
    latency = expected_latency(table.base, table_matrix, op_weights, net.depth_weights(), table.space)
    loss = F.cross_entropy(logits, labels)
    (loss + args.lambda_lat * (latency / args.target_lat - 1).abs()).backward()
    nn.utils.clip_grad_norm_(net.arch_parameters(), args.grad_clip)
    optimizer.step()
    net.project_architecture()
    return loss.detach(), logits.detach(), latency.detach()


def train_only(wanted, others):
    """Let gradients be computed for `wanted` and not for `others`."""
    for p in others:
        p.requires_grad_(False)
    for p in wanted:
        p.requires_grad_(True)
