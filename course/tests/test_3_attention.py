"""Exercise 3: what rotations say about places, and whom attention sees."""

import math

import torch
import torch.nn.functional as F

import gpt

GRID, D = 4, 16


def queries(number=3):
    """Random (2, 3, T, d), `number` times."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(number, 2, 3, GRID * GRID, D, generator=generator)


def turned(exercise, vector):
    """One vector (d,) as it would be at every place: (T, d)."""
    x = vector.expand(1, 1, GRID * GRID, D)
    return exercise.rotate(x, exercise.place_angles(GRID, D))[0, 0]


def test_angles(exercise):
    """The first place is not turned, the next ones by one radian and by less."""
    angles = exercise.place_angles(GRID, D)
    assert angles.shape == (GRID * GRID, D // 2), "angles are not (T, d/2)"
    assert angles.dtype == torch.float32, "angles are not float32"
    assert not angles[0].any(), "the first place is turned"
    assert math.isclose(angles.max(), GRID - 1, rel_tol=1e-5), (
        "the fastest pair does not turn by one radian per row or column"
    )
    rows, columns = angles.amax(0).chunk(2)  # by how much each pair turns at most
    assert (rows.diff() < 0).all() and (columns.diff() < 0).all(), (
        "later pairs do not turn more slowly"
    )


def test_slower_pairs(exercise):
    """Every pair turns more slowly than the one before it, by the factor base^(2 / (d/2))."""
    for base in (10_000.0, 81.0):
        columns = exercise.place_angles(GRID, D, base).amax(0)[D // 4 :]
        factors = columns[:-1] / columns[1:]
        expected = torch.full_like(factors, base ** (2 / (D // 2)))
        assert torch.allclose(factors, expected, rtol=1e-3), (
            "a pair is not base^(2 / (d/2)) times slower than the one before it"
        )


def test_rows_then_columns(exercise):
    """The first half of the pairs turns with the row, the second half with the column."""
    angles = exercise.place_angles(GRID, D).view(GRID, GRID, D // 2)
    rows, columns = angles.chunk(2, dim=-1)
    assert torch.equal(rows, rows[:, :1].expand_as(rows)), (
        "the first half of the pairs turns with the column"
    )
    assert torch.equal(columns, columns[:1].expand_as(columns)), (
        "the second half of the pairs turns with the row"
    )
    assert torch.allclose(rows.transpose(0, 1), columns), "rows and columns turn by other angles"


def test_lengths(exercise):
    """Turning keeps the length of every pair of adjacent channels."""
    x = queries()[0]
    y = exercise.rotate(x, exercise.place_angles(GRID, D))
    assert y.shape == x.shape, "the result does not have the shape of x"
    before, after = (t.unflatten(-1, (-1, 2)).norm(dim=-1) for t in (x, y))
    assert torch.allclose(before, after, atol=1e-5), (
        "the length of a pair of adjacent channels changed"
    )


def test_direction(exercise):
    """A quarter turn takes the pair (1, 0) to (0, 1)."""
    x = torch.tensor([1.0, 0, 0, 0]).expand(1, 1, 1, 4)
    y = exercise.rotate(x, torch.tensor([[math.pi / 2, 0]])).flatten()
    expected = torch.tensor([0.0, 1, 0, 0])
    assert torch.allclose(y, expected, atol=1e-6), "a quarter turn of (1, 0) is not (0, 1)"


def test_distance(exercise):
    """The score of a query and a key depends on how many rows and columns lie between them."""
    query, key = queries()[:2, 0, 0, 0]
    scores = turned(exercise, query) @ turned(exercise, key).T  # (T, T)
    scores = scores.view(GRID, GRID, GRID, GRID)  # row and column of the query, then of the key
    moved_down = torch.allclose(scores[:-1, :, :-1], scores[1:, :, 1:], atol=1e-4)
    moved_right = torch.allclose(scores[:, :-1, :, :-1], scores[:, 1:, :, 1:], atol=1e-4)
    assert moved_down and moved_right, "moving query and key together changed their score"
    assert not torch.isclose(scores[1, 1, 2, 1], scores[1, 1, 1, 2]), (
        "a key below the query and a key to the right of it get the same score"
    )


def test_causal(exercise):
    """A later code never changes an earlier output, and each code sees itself."""
    q, k, v = queries()
    before, first = exercise.attend(q, k, v), v[:, :, 0].clone()
    assert before.isfinite().all(), "an output is not finite"
    k[:, :, 9:] += 1
    v[:, :, 9:] += 1
    after = exercise.attend(q, k, v)
    assert torch.equal(before[:, :, :9], after[:, :, :9]), "a later code changed an earlier output"
    assert (before[:, :, 9] != after[:, :, 9]).all(), "a code does not see itself"
    assert torch.allclose(before[:, :, 0], first, atol=1e-5), (
        "the first output is not the first value, which is all that it may see"
    )


def test_mean(exercise):
    """An output is a mean of values: its weights are positive and sum to 1."""
    q, k, v = queries()
    ones = exercise.attend(q, k, torch.ones_like(v))
    assert torch.allclose(ones, torch.ones_like(v), atol=1e-5), "the weights do not sum to 1"
    outputs = exercise.attend(q, k, v)
    inside = (outputs <= v.cummax(2).values + 1e-5) & (outputs >= v.cummin(2).values - 1e-5)
    assert inside.all(), "an output lies outside of the values that it is a mean of"


def test_scale(exercise):
    """Scores are divided by the square root of d."""
    q, k, v = queries()
    twice = [torch.cat([x, x], dim=-1) for x in (q, k, v)]  # dot products are twice as large
    expected = exercise.attend(q * 2**0.5, k, v)
    got = exercise.attend(*twice)[..., :D]
    assert torch.allclose(got, expected, atol=1e-5), (
        "scores do not shrink with the square root of d"
    )


def test_project_rotations(exercise):
    """Rotations are those of gpt.py."""
    q = queries()[0]
    got = exercise.rotate(q, exercise.place_angles(GRID, D))
    table = gpt.rope_table(GRID, D, cond_tokens=0)
    expected = gpt.rotate(q.transpose(1, 2), table).transpose(1, 2)
    assert torch.allclose(got, expected, atol=1e-5), "gpt.rotate turns in another way"


def test_project_attention(exercise):
    """Attention is that of torch."""
    q, k, v = queries()
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(exercise.attend(q, k, v), expected, atol=1e-5), (
        "F.scaled_dot_product_attention gives other outputs"
    )
