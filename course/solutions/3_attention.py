"""Exercise 3 as a good student would write it."""

import torch


def place_angles(grid, d, base=10000.0):
    """Angles (T, d/2) of a grid of codes: half of the pairs for rows, half for columns."""
    half = d // 2
    frequency = base ** (-torch.arange(0, half, 2) / half)  # (d/4,)
    places = torch.arange(grid * grid)
    row, column = places // grid, places % grid
    return torch.cat([row[:, None] * frequency, column[:, None] * frequency], dim=-1)


def rotate(x, angles):
    """Turn adjacent pairs of x (B, n, T, d) by angles (T, d/2)."""
    x0, x1 = x[..., 0::2], x[..., 1::2]  # each (B, n, T, d/2)
    cos, sin = angles.cos(), angles.sin()
    pairs = torch.stack([x0 * cos - x1 * sin, x1 * cos + x0 * sin], dim=-1)
    return pairs.flatten(-2)


def attend(q, k, v):
    """Causal attention over (B, n, T, d)."""
    T, d = q.shape[-2:]
    scores = q @ k.transpose(-1, -2) / d**0.5  # (B, n, T, T): queries down, keys across
    later = torch.ones(T, T).triu(1).bool()
    scores = scores.masked_fill(later, -torch.inf)
    return scores.softmax(-1) @ v
