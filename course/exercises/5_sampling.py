"""Exercise 5: from logits to a code.

Sitting 5 reads `guide`, `filter_logits` and `draw` in sample.py. Close that file before you start.
$ python course/exercises/5_sampling.py     # what your functions return
$ pytest course -q -k test_5                # what is right and what is not
"""

# Shapes:  B images   V codebook entries
import torch


def guide(cond, uncond, scale):
    """Guided logits: away from those of "no class", past those of the class.

    cond, uncond   (B, V) logits with the class, and without one
    scale          0 gives uncond, 1 gives cond, more goes further in the same direction
    returns        (B, V)
    """
    raise NotImplementedError  # 1 line


def filter_logits(logits, top_k=0, top_p=1.0):
    """Set the logits of unlikely codes to -inf and leave the others as they are.

    logits    (B, V)
    top_k     keep the k largest of each row; 0, or more than V, keeps all
    top_p     then keep the fewest codes whose probabilities sum to p or more: the likeliest code,
              the next one, and so on, up to and including the one that crosses p; 1 keeps all
    returns   (B, V)

    For top_p the probabilities are the softmax over the codes that top_k has left. No two logits of
    a row that matter here are equal. -torch.inf is the value of a code that cannot be sampled.
    """
    raise NotImplementedError  # about 10 lines; Tensor.topk, sort, cumsum and scatter help


def draw(logits, uniform, temperature=1.0):
    """A code for each row, sampled from softmax(logits / temperature).

    logits        (B, V), some of them perhaps -inf
    uniform       (B, V) random numbers between 0 and 1, both excluded: all the randomness there is
    temperature   larger than 0
    returns       (B,) int64

    By Gumbel's rule: turn each number u into the noise -log(-log(u)), add it to the logits, and
    take the largest sum.
    """
    raise NotImplementedError  # about 2 lines


if __name__ == "__main__":
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    print("top-k 2   ", filter_logits(logits, top_k=2))
    print("top-p 0.6 ", filter_logits(logits, top_p=0.6))
    codes = draw(logits.expand(1000, 4), torch.rand(1000, 4))
    print("of 1000 codes", codes.bincount(minlength=4).tolist())
