"""Exercise 6 as a good student would write it."""

import gpt


def cached_attention(layer, x, position, rope, cache):
    """Attention of x (B, 1, C) at one position; fills the cache (2, B, n, L, d) there."""
    B, _, C = x.shape
    d = C // layer.n_head
    q, k, v = (t.view(B, 1, layer.n_head, d) for t in layer.wqkv(x).chunk(3, dim=-1))
    here = rope[position : position + 1]  # (1, d/2, 2)
    q, k = gpt.rotate(q, here), gpt.rotate(k, here)
    cache[0, :, :, position] = k[:, 0]
    cache[1, :, :, position] = v[:, 0]
    keys, values = cache[:, :, :, : position + 1]  # each (B, n, position + 1, d)
    scores = q.transpose(1, 2) @ keys.transpose(-1, -2) / d**0.5  # (B, n, 1, position + 1)
    y = scores.softmax(-1) @ values  # (B, n, 1, d)
    return layer.wo(y.transpose(1, 2).reshape(B, 1, C))
