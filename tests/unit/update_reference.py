"""Updates in float64, independent of the code that is tested."""

import numpy as np
import torch


def reference(rule, theta, mask, gradients, lrs, ema_decay):
    """The same in float64: theta, ema, and slots in order, after each update.

    From the formulas of the papers, but for Adam, which is torch's.
    """
    update = (torch_adam if rule.name in ("adam", "adamw") else formulas)(rule, theta, mask)
    ema, states = theta, []
    for gradient, lr in zip(gradients, lrs, strict=True):
        theta, *slots = update(gradient, lr)
        ema = ema_decay * ema + (1 - ema_decay) * theta
        states.append([theta, ema, *slots])
    return states


def formulas(rule, theta, mask):
    mean_square, momentum = np.ones_like(theta), np.zeros_like(theta)

    def update(gradient, lr):
        nonlocal theta, mean_square, momentum
        g = gradient + np.where(mask, rule.weight_decay * theta, 0.0)
        if rule.name == "sgd":
            theta = theta - lr * g
            return (theta,)
        if rule.name == "momentum":
            momentum = rule.momentum * momentum + g
            theta = theta - lr * (g + rule.momentum * momentum if rule.nesterov else momentum)
            return theta, momentum
        mean_square = mean_square + (1 - rule.rho) * (g**2 - mean_square)
        momentum = rule.momentum * momentum + lr * g / np.sqrt(mean_square + rule.epsilon)
        theta = theta - momentum
        return theta, mean_square, momentum

    return update


def torch_adam(rule, theta, mask):
    parts = [torch.tensor(theta[where]).requires_grad_() for where in (mask, ~mask)]
    kind = torch.optim.AdamW if rule.name == "adamw" else torch.optim.Adam
    decays = (rule.weight_decay, 0.0)
    groups = [{"params": [p], "weight_decay": d} for p, d in zip(parts, decays, strict=True)]
    optimizer = kind(groups, lr=1.0, betas=rule.betas, eps=rule.epsilon, foreach=False)

    def joined(vectors):
        whole = np.empty_like(theta)
        whole[mask], whole[~mask] = (vector.detach().numpy() for vector in vectors)
        return whole

    def update(gradient, lr):
        for part, where, group in zip(parts, (mask, ~mask), optimizer.param_groups, strict=True):
            part.grad, group["lr"] = torch.tensor(gradient[where]), lr
        optimizer.step()
        slots = ([optimizer.state[part][name] for part in parts] for name in rule.slots)
        return [joined(parts), *map(joined, slots)]

    return update
