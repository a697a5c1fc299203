"""Exercise 5 as a good student would write it."""

import torch


def guide(cond, uncond, scale):
    """Guided logits (B, V)."""
    return uncond + (cond - uncond) * scale


def filter_logits(logits, top_k=0, top_p=1.0):
    """Logits (B, V), with -inf for what top_k and then top_p remove."""
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k).values[..., -1:]  # (B, 1)
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        before = probs.cumsum(-1) - probs  # the sum of all that is likelier
        remove = torch.zeros_like(logits, dtype=torch.bool)
        remove = remove.scatter(-1, order, before >= top_p)  # back to the codes' own places
        logits = logits.masked_fill(remove, -torch.inf)
    return logits


def draw(logits, uniform, temperature=1.0):
    """Codes (B,) by Gumbel's rule."""
    gumbel = -(-uniform.log()).log()
    return (logits / temperature + gumbel).argmax(-1)
