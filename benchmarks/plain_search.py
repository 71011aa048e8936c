"""Plain implementation of a search's two steps: the baseline of benchmarks and tests.

Contiguous layout, swish composed in Python, operators one by one with a residual connection and weight each, one host
synchronisation per block, optimizers that update parameters one by one.
"""

import torch
import torch.nn.functional as F
from torch import nn

from models.layers import ConvLayer
from models.search import train_only


class PlainSwish(nn.Module):
    """x * sigmoid(x), two operators for autograd."""

    def forward(self, x):
        return x * torch.sigmoid(x)


def make_plain(net):
    """Give a supernet the plain layout and swish, in place."""
    for module in net.modules():
        if isinstance(module, ConvLayer):
            module.forward = lambda x, layer=module: layer.act(layer.bn(layer.conv(x)))
    return plain_swish(net).to(memory_format=torch.contiguous_format)


def plain_swish(net):
    """Replace every swish by its Python composition, in place."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.SiLU):
                setattr(module, name, PlainSwish())
    return net


def plain_forward(net, x, choice):
    """Run the supernet, written out: images [N, 3, H, W] -> logits, along a path or as a mixture [blocks, ops]."""
    x, choices = net.second_stem(net.first_stem(x)), iter(choice)
    for stage in net.stages():
        exits = [x] if stage.stage.input_is_exit else []
        for name in stage.block_names:
            ops, chosen = getattr(stage, name).m_ops, next(choices)
            x = ops[chosen](x) if isinstance(chosen, int) else sum(w * op(x) for w, op in zip(chosen, ops, strict=True))
            exits.append(x)
        x = sum(weight * y for weight, y in zip(F.softmax(stage.betas, dim=0), exits, strict=True))
    return net.classifier(F.adaptive_avg_pool2d(net.feature_mix_layer(x), 1).flatten(1))


def plain_paths(net, generator):
    """Draw a path by Gumbel noise and one at random among the other operators, block by block."""
    first, second = [], []
    for op in net.mixed_ops():
        noise = -torch.empty(len(op.m_ops)).exponential_(generator=generator).log()
        first.append((op.log_alphas.detach() + noise.to(op.log_alphas.device)).argmax().item())
        others = [index for index in range(len(op.m_ops)) if index != first[-1]]
        second.append(others[torch.randint(len(others), (), generator=generator).item()])
    return first, second


def plain_weight_step(net, optimizer, images, labels, paths, grad_clip):
    """Train the weights on some paths; return loss and logits of the first."""
    train_only(net.weight_parameters(), net.arch_parameters())
    optimizer.zero_grad()
    results = []
    for path in paths:
        logits = plain_forward(net, images, path)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        results.append((loss.detach(), logits.detach()))
    nn.utils.clip_grad_norm_(net.weight_parameters(), grad_clip, foreach=False)
    optimizer.step()
    return results[0]


def plain_architecture_step(net, optimizer, images, labels, op_weights, latency_loss, grad_clip):
    """Train the architecture on the mixture; return loss, logits and latency."""
    train_only(net.arch_parameters(), net.weight_parameters())
    optimizer.zero_grad()
    logits = plain_forward(net, images, op_weights)
    of_latency, latency = latency_loss(op_weights, net.depth_weights())
    loss = F.cross_entropy(logits, labels)
    (loss + of_latency).backward()
    nn.utils.clip_grad_norm_(net.arch_parameters(), grad_clip, foreach=False)
    optimizer.step()
    with torch.no_grad():
        for p in net.arch_parameters():
            p.copy_(F.log_softmax(p, dim=0))
    return loss.detach(), logits.detach(), latency.detach()
