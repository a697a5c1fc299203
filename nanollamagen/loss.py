"""Cross-entropy that writes its gradient where the logits were.

A step's largest tensors are the logits (B * T, V). F.cross_entropy makes three more of their size
in float32, which costs a step of GPT-B on two CPU cores 8 to 10 %. Here they exist for a few rows
at a time. The loss and the gradients are the same:

    loss = cross_entropy(logits.flatten(0, 1), tokens.flatten())
    loss.backward()                          # from here on `logits` holds its gradient
"""

# Shapes:  N rows   V classes
import torch


def cross_entropy(logits, targets, reduction="mean"):
    """Mean (or "sum") of -log p(target): logits (N, V) and targets (N,) int64 -> float32 ().

    As F.cross_entropy(logits, targets, reduction=...), but backward overwrites the logits: compute
    before it whatever needs them. Create a second loss on the same logits after this one."""
    scale = 1 if reduction == "sum" else 1 / len(logits)
    return CrossEntropy.apply(logits, targets, scale)


class CrossEntropy(torch.autograd.Function):
    """What `cross_entropy` does; see there."""

    @staticmethod
    def chunks(logits, *more):
        """The same few rows of each tensor, again and again until all rows were there."""
        # small kernels are slow on a GPU; large buffers overflow a CPU's cache
        rows = 1024 if logits.is_cuda else 64
        return zip(*(x.split(rows) for x in (logits, *more)))

    @staticmethod
    def forward(ctx, logits, targets, scale):
        log_sums = logits.new_empty(len(logits), 1, dtype=torch.float32)  # log of sum exp(logit)
        total = torch.zeros((), device=logits.device)
        for rows, target, log_sum in CrossEntropy.chunks(logits, targets[:, None], log_sums):
            log_p = rows.float().log_softmax(1).gather(1, target)
            log_sum.copy_(rows.gather(1, target) - log_p)
            total -= log_p.sum()
        ctx.save_for_backward(logits, targets, log_sums)
        ctx.scale = scale
        return total * scale

    @staticmethod
    def backward(ctx, grad):
        logits, targets, log_sums = ctx.saved_tensors
        for rows, target, log_sum in CrossEntropy.chunks(logits, targets[:, None], log_sums):
            gradient = (rows.float() - log_sum).exp_()  # softmax, minus 1 at the target
            gradient.scatter_add_(1, target, gradient.new_full(target.shape, -1))
            rows.copy_(gradient.mul_(grad * ctx.scale))
        return logits, None, None
