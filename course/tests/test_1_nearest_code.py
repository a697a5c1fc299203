"""Exercise 1: what the nearest code on the unit sphere, and its gradient, must be like."""

import torch
import torch.nn.functional as F

import vq


def latents_and_codebook():
    """Latents (50, 8) and entries (20, 8), of lengths between 0.1 and 10."""
    generator = torch.Generator().manual_seed(1)
    z, codebook = torch.randn(50, 8, generator=generator), torch.randn(20, 8, generator=generator)
    z *= 10 ** (2 * torch.rand(50, 1, generator=generator) - 1)
    codebook *= 10 ** (2 * torch.rand(20, 1, generator=generator) - 1)
    return z, codebook


def test_shapes(exercise):
    """Codes are whole numbers, one per latent, and each has a vector."""
    z, codebook = latents_and_codebook()
    codes, quantized = exercise.quantize(z, codebook)
    assert codes.shape == (50,) and codes.dtype == torch.int64, "codes are not int64 (n,)"
    assert quantized.shape == (50, 8), "quantized is not (n, D)"


def test_nearest(exercise):
    """The code of a latent is the entry at the smallest angle to it."""
    z, codebook = latents_and_codebook()
    codes, _ = exercise.quantize(z, codebook)
    cosines = F.cosine_similarity(z[:, None], codebook[None], dim=-1)  # (n, V)
    chosen = cosines[torch.arange(50), codes]
    assert (chosen >= cosines.amax(1) - 1e-5).all(), "another entry has a smaller angle to a latent"


def test_length_of_latents(exercise):
    """The length of a latent does not matter."""
    z, codebook = latents_and_codebook()
    longer = z * torch.linspace(0.1, 9, 50)[:, None]
    before, after = exercise.quantize(z, codebook)[0], exercise.quantize(longer, codebook)[0]
    assert (before == after).all(), "the length of a latent changed its code"


def test_length_of_entries(exercise):
    """The length of an entry does not matter."""
    z, codebook = latents_and_codebook()
    longer = codebook * torch.linspace(0.1, 9, 20)[:, None]
    before, after = exercise.quantize(z, codebook)[0], exercise.quantize(z, longer)[0]
    assert (before == after).all(), "the length of an entry changed a code"


def test_values(exercise):
    """The decoder gets the entries that the codes name, with length 1."""
    z, codebook = latents_and_codebook()
    codes, quantized = exercise.quantize(z, codebook)
    lengths = quantized.norm(dim=-1)
    assert (lengths - 1).abs().max() < 1e-5, "a quantized vector does not have length 1"
    cosines = F.cosine_similarity(quantized, codebook[codes], dim=-1)
    assert cosines.min() > 1 - 1e-5, "a quantized vector is not the entry that its code names"


def test_gradient(exercise):
    """The gradient passes straight through to the scaled latents."""
    z, codebook = latents_and_codebook()
    weights = torch.randn(50, 8, generator=torch.Generator().manual_seed(2))
    z.requires_grad_()
    _, quantized = exercise.quantize(z, codebook)
    assert quantized.requires_grad, "the latents get no gradient"
    (quantized * weights).sum().backward()
    assert z.grad is not None, "the latents get no gradient"
    got, z.grad = z.grad, None
    (F.normalize(z, dim=-1) * weights).sum().backward()
    assert torch.allclose(got, z.grad, atol=1e-5), (
        "the scaled latents do not get the gradient that arrives at the quantized vectors"
    )


def test_codebook_gradient(exercise):
    """The codebook gets no gradient from here."""
    z, codebook = latents_and_codebook()
    weights = torch.randn(50, 8, generator=torch.Generator().manual_seed(2))
    codebook.requires_grad_()
    _, quantized = exercise.quantize(z.requires_grad_(), codebook)
    if quantized.requires_grad:
        (quantized * weights).sum().backward()
    none = codebook.grad is None or not codebook.grad.any()
    assert none, "the codebook gets a gradient, which only its own loss may give it"


def test_project(exercise):
    """The codes are those of vq.Quantizer."""
    z, codebook = latents_and_codebook()
    theirs = vq.Quantizer(vq.VQConfig(codebook_size=20, code_dim=8))
    with torch.no_grad():
        theirs.embedding.weight.copy_(codebook)
    grid = z.view(2, 5, 5, 8).permute(0, 3, 1, 2)  # (B, D, h, w)
    expected = theirs(grid)[2].flatten()
    got = exercise.quantize(z, codebook)[0]
    assert (got == expected).all(), "vq.Quantizer gives other codes"
