"""Exercise 2: what the tokenizer and its discriminator learn from.

Sitting 2 reads `tokenizer_losses` and `hinge` in train_vq.py, and `Quantizer.forward` in vq.py.
Close both files before you start.
$ python course/exercises/2_losses.py     # what your functions return
$ pytest course -q -k test_2              # what is right and what is not
"""

# Shapes:  n latents   D code dimension   B images   h, w patches that the discriminator judges
import torch


def codebook_losses(z, entries):
    """The two losses that bring latents and their codebook entries together.

    z         (n, D) latents, with gradient
    entries   (n, D) the entry that was chosen for each of them, with gradient
    returns   (codebook loss, commitment loss), two scalars

    Both are the mean squared difference of latents and entries, over all n * D numbers. The
    codebook loss moves the entries only: latents count as constants in it. The commitment loss
    moves the latents only, and is multiplied by 0.25: latents follow more slowly.
    """
    raise NotImplementedError  # about 3 lines; Tensor.detach helps


def hinge(real, fake):
    """What the discriminator learns from.

    real      (B, 1, h, w) its scores for patches of real images
    fake      (B, 1, h, w) its scores for patches of reconstructions
    returns   a scalar, the mean of two parts with equal weight

    A real patch costs how far its score is below 1, a reconstructed one how far its score is above
    -1. Scores beyond these margins cost nothing. Each part is the mean over its patches.
    """
    raise NotImplementedError  # about 3 lines


def adversarial(fake):
    """What the tokenizer learns from the discriminator.

    fake      (B, 1, h, w) scores of patches of the tokenizer's reconstructions
    returns   a scalar that falls as the mean score rises, at the same rate whatever the score is
    """
    raise NotImplementedError  # 1 line


if __name__ == "__main__":
    print("codebook, commitment", codebook_losses(torch.randn(5, 8), torch.randn(5, 8)))
    print("hinge", hinge(torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3)))
    print("adversarial", adversarial(torch.randn(2, 1, 3, 3)))
