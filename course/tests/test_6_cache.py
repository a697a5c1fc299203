"""Exercise 6: positions one by one are the pass over all of them at once."""

import torch

import gpt

B, C, N_HEAD, D, GRID = 2, 32, 2, 16, 3
L = 1 + GRID**2  # the class, then the codes


def layer_and_inputs():
    """A layer with random weights, the rotary table, and inputs (B, L, C)."""
    layer = gpt.Attention(gpt.GPTConfig(dim=C, n_head=N_HEAD)).eval()
    generator = torch.Generator().manual_seed(1)
    for weight in layer.parameters():
        weight.requires_grad_(False).normal_(std=0.3, generator=generator)
    x = torch.randn(B, L, C, generator=generator)
    return layer, gpt.rope_table(GRID, D, cond_tokens=1), x


def new_cache(fill=0.0):
    """A cache whose positions all hold the same number."""
    return torch.full((2, B, N_HEAD, L, D), fill)


def one_by_one(exercise, layer, rope, x, cache):
    """Outputs (B, L, C), a position at a time."""
    outputs = []
    for position in range(x.shape[1]):
        some = x[:, position : position + 1]
        outputs.append(exercise.cached_attention(layer, some, position, rope, cache))
    return torch.cat(outputs, dim=1)


def test_shape(exercise):
    """One position goes in, one comes out."""
    layer, rope, x = layer_and_inputs()
    y = exercise.cached_attention(layer, x[:, :1], 0, rope, new_cache())
    assert y.shape == (B, 1, C), "the output is not (B, 1, C)"


def test_first_position(exercise):
    """The first position sees itself alone."""
    layer, rope, x = layer_and_inputs()
    y = exercise.cached_attention(layer, x[:, :1], 0, rope, new_cache())
    value = layer.wqkv(x[:, :1])[..., 2 * C :]
    assert torch.allclose(y, layer.wo(value), atol=1e-5), (
        "the first output does not come from the first value alone"
    )


def test_full_pass(exercise):
    """Positions one by one give the outputs of a pass over all of them."""
    layer, rope, x = layer_and_inputs()
    got = one_by_one(exercise, layer, rope, x, new_cache())
    expected = layer(x, rope)
    assert torch.allclose(got, expected, atol=1e-4), (
        "an output is not that of a pass over all positions at once"
    )


def test_later_positions(exercise):
    """What the cache holds at later positions has no influence."""
    layer, rope, x = layer_and_inputs()
    zeros = one_by_one(exercise, layer, rope, x, new_cache())
    numbers = one_by_one(exercise, layer, rope, x, new_cache(3.0))
    assert torch.allclose(zeros, numbers, atol=1e-5), (
        "what the cache holds at later positions changed an output"
    )


def test_own_place(exercise):
    """A position fills its own place in the cache, and no other."""
    layer, rope, x = layer_and_inputs()
    cache = new_cache(3.0)
    exercise.cached_attention(layer, x[:, 4:5], 4, rope, cache)
    changed = (cache != 3).any(-1)  # (2, B, n, L)
    others = [position for position in range(L) if position != 4]
    assert not changed[..., others].any(), "the cache changed at another position"
    assert changed[0, ..., 4].all(), "the key of the position is not in the cache"
    assert changed[1, ..., 4].all(), "the value of the position is not in the cache"


def test_images(exercise):
    """The images of a batch do not see each other."""
    layer, rope, x = layer_and_inputs()
    before = one_by_one(exercise, layer, rope, x, new_cache())
    x[1] += 1
    after = one_by_one(exercise, layer, rope, x, new_cache())
    assert torch.allclose(before[0], after[0], atol=1e-5), "one image changed the other's output"


def test_project(exercise):
    """Outputs and cache are those of gpt.py, which decodes with the same layer."""
    layer, rope, x = layer_and_inputs()
    cache, theirs = new_cache(), new_cache()
    for position in range(L):
        here, some = torch.tensor([position]), x[:, position : position + 1]
        got = exercise.cached_attention(layer, some, position, rope, cache)
        visible = gpt.who_sees_whom(here, L)
        expected = layer(some, rope[here], visible, theirs, here)
        assert torch.allclose(got, expected, atol=1e-5), "gpt.Attention gives another output"
        assert torch.allclose(cache, theirs, atol=1e-5), "gpt.Attention fills the cache otherwise"
