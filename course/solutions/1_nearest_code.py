"""Exercise 1 as a good student would write it."""

import torch.nn.functional as F


def quantize(z, codebook):
    """Latents (n, D), codebook (V, D) -> codes (n,), quantized (n, D)."""
    z = F.normalize(z, dim=-1)
    entries = F.normalize(codebook, dim=-1)
    codes = (z @ entries.T).argmax(-1)  # on the sphere the nearest has the largest dot product
    quantized = entries[codes]
    return codes, z + (quantized - z).detach()  # the values of quantized, the gradient of z
