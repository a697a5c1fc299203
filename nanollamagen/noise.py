"""Random numbers without a state: each follows from a seed, a position and its own number.

uniform = noise.uniform(noise.state(seeds, 7), 16384)      # (B, 16384), for seeds (B,)
"""

import torch

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 / golden ratio, as int64


def mix(x):
    """One number of splitmix64 (Steele, Lea and Flood, 2014) for every state in x, int64. Products
    wrap in torch as they do in C. `>>` copies the sign: the masks undo that."""
    x = x + GOLDEN
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x ^= (x >> shift).bitwise_and_((1 << 64 - shift) - 1)  # in place, because x can be large
        x *= factor - (1 << 64)
    return x.bitwise_xor_((x >> 31).bitwise_and_((1 << 33) - 1))


def state(seeds, positions):
    """What the n numbers of a seed and a position follow from. All are int64 and broadcast."""
    return mix(mix(seeds) + positions)


def uniform(state, n):
    """Numbers between 0 and 1, both excluded: float32 (..., n). n may be GOLDEN * arange(n)."""
    steps = n if isinstance(n, torch.Tensor) else GOLDEN * torch.arange(n, device=state.device)
    hashed = mix(state[..., None] + steps)
    forty_bits = (hashed >> 24).bitwise_and_((1 << 40) - 1)
    # Small numbers become large noise, which decides: they keep all 40 bits. The largest would
    # round to 1, which is what the clamp is for.
    return forty_bits.float().add_(0.5).mul_(2.0**-40).clamp_(max=1 - 2.0**-24)


def gumbel(state, n):
    """Gumbel noise, finite: -log(-log(1 - uniform)), computed in place."""
    return uniform(state, n).neg_().log1p_().neg_().log_().neg_()
