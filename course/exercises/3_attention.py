"""Exercise 3: positions with two dimensions, and attention that never looks ahead.

Sitting 3 reads `rope_table`, `rotate` and `Attention` in gpt.py. Close that file before you start.
$ python course/exercises/3_attention.py     # what your functions return
$ pytest course -q -k test_3                 # what is right and what is not
"""

# Shapes:  B images   n heads   T = grid * grid codes, row by row   d channels of a head
import torch


def place_angles(grid, d, base=10000.0):
    """By which angle each pair of channels turns at each place.

    grid      rows = columns of codes
    d         channels of a head, a multiple of 4
    returns   (T, d/2) float32, in radians

    Code i is in row i // grid and in column i % grid. Of the d/2 pairs, the first d/4 turn with the
    row and the last d/4 with the column. In each of these halves pair j = 0 .. d/4 - 1 turns by
    row * base^(-2j / (d/2)), or column * base^(-2j / (d/2)): the first pair of a half by one radian
    per row or column, the others more and more slowly.
    """
    raise NotImplementedError  # about 6 lines


def rotate(x, angles):
    """Turn queries or keys by the angles of their places.

    x         (B, n, T, d)
    angles    (T, d/2)
    returns   (B, n, T, d)

    A pair is two adjacent channels: 0 and 1, 2 and 3, and so on. The pair (x0, x1) turned by an
    angle a is (x0 cos a - x1 sin a, x1 cos a + x0 sin a).
    """
    raise NotImplementedError  # about 4 lines; x[..., 0::2] is every other channel


def attend(q, k, v):
    """Causal attention, without F.scaled_dot_product_attention.

    q, k, v   (B, n, T, d) queries, keys and values
    returns   (B, n, T, d)

    Output i is a mean of the values 0 .. i, its own included. The weights are the softmax of the
    dot products of query i with these keys, divided by the square root of d.
    """
    raise NotImplementedError  # about 5 lines; Tensor.masked_fill with -torch.inf helps


if __name__ == "__main__":
    print("angles", place_angles(grid=3, d=8))
    q, k, v = torch.randn(3, 1, 1, 9, 8)
    print("attention", attend(q, k, v).shape)
