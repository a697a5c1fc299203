"""Exercise 1: the nearest entry of a codebook, and a gradient that passes straight through.

Sitting 1 reads `Quantizer` in vq.py. Close that file before you start.
$ python course/exercises/1_nearest_code.py     # what your function returns
$ pytest course -q -k test_1                    # what is right and what is not
"""

# Shapes:  n latents   V codebook entries   D code dimension
import torch


def quantize(z, codebook):
    """The codes of latents, and the vectors that the decoder gets.

    z          (n, D) float32, latents of any length
    codebook   (V, D) float32, entries of any length
    returns    codes (n,) int64, each in [0, V), and quantized (n, D) float32

    Scale every latent and every entry to length 1. The code of a latent is the number of the entry
    that is then nearest to it. `quantized` holds these entries, one for each latent, of length 1.

    Choosing an entry has no derivative. So the gradient passes straight through: the scaled latents
    get the gradient that arrives at `quantized`, as if nothing had been replaced. The codebook gets
    no gradient here. It learns from a loss of its own, which is part of exercise 2.
    """
    raise NotImplementedError  # about 5 lines; torch.nn.functional.normalize, Tensor.detach


if __name__ == "__main__":
    codes, quantized = quantize(torch.randn(5, 8), torch.randn(16, 8))
    print("codes", codes.tolist())
    print("lengths", quantized.norm(dim=-1).tolist())
