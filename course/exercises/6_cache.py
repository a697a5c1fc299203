"""Exercise 6: one new position, with the keys and values of those before it remembered.

Sitting 6 reads `GPT.extend` and `attend_to_cache` in gpt.py, and the model that serve_vllm.py runs.
Close them before you start.
$ python course/exercises/6_cache.py     # what your function returns
$ pytest course -q -k test_6             # what is right and what is not
"""

# Shapes:  B images   C width   n heads   d = C / n channels of a head   L positions
import torch

import gpt


def cached_attention(layer, x, position, rope, cache):
    """Attention at one position, as it would be in a pass over all positions at once.

    layer      a gpt.Attention. layer.wqkv turns C channels into 3 * C: the queries of all heads,
               then all keys, then all values. layer.wo is applied to the result. layer.n_head is n.
    x          (B, 1, C), the input at this position
    position   int, from 0
    rope       (L, d/2, 2), the rotary table of all positions, for gpt.rotate(x (B, 1, n, d), rows
               (1, d/2, 2)). It turns queries and keys, not values.
    cache      (2, B, n, L, d): keys, then values. Positions before this one are filled. Later ones
               may hold any numbers.
    returns    (B, 1, C)

    Write the key (turned) and the value of this position into the cache, and no others. Then attend
    to the positions 0 .. position. Scores are divided by the square root of d.
    """
    raise NotImplementedError  # about 12 lines


if __name__ == "__main__":
    layer = gpt.Attention(gpt.GPTConfig(dim=32, n_head=2))
    rope, cache = gpt.rope_table(3, 16, cond_tokens=1), torch.zeros(2, 1, 2, 10, 16)
    with torch.no_grad():
        for position in range(10):
            y = cached_attention(layer, torch.randn(1, 1, 32), position, rope, cache)
            filled = cache[1, 0, 0].any(-1).sum().item()
            print("position", position, tuple(y.shape), "filled positions", filled)
