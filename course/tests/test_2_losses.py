"""Exercise 2: whom each loss moves, and when it stops."""

import torch

import train_vq


def vectors():
    """Latents and entries (30, 8), both with gradient."""
    generator = torch.Generator().manual_seed(1)
    z, entries = torch.randn(2, 30, 8, generator=generator)
    return z.requires_grad_(), entries.requires_grad_()


def scores():
    """Scores of real and of reconstructed patches, (4, 1, 3, 3), on both sides of the margins."""
    generator = torch.Generator().manual_seed(2)
    real, fake = 2 * torch.randn(2, 4, 1, 3, 3, generator=generator)
    return real.requires_grad_(), fake.requires_grad_()


def gradients(loss, *tensors):
    """The gradient of each tensor, zeros where there is none."""
    found = torch.autograd.grad(loss, tensors, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found)]


def test_codebook_loss(exercise):
    """The codebook loss moves entries to their latents, and the latents stay."""
    z, entries = vectors()
    of_z, of_entries = gradients(exercise.codebook_losses(z, entries)[0], z, entries)
    assert not of_z.any(), "the codebook loss moves the latents"
    assert of_entries.any(), "the codebook loss does not move the entries"
    nearer = (entries - of_entries - z).norm() < (entries - z).norm()
    assert nearer, "a step down the codebook loss takes entries away from their latents"


def test_commitment_loss(exercise):
    """The commitment loss moves latents to their entries, and the entries stay."""
    z, entries = vectors()
    of_z, of_entries = gradients(exercise.codebook_losses(z, entries)[1], z, entries)
    assert not of_entries.any(), "the commitment loss moves the entries"
    assert of_z.any(), "the commitment loss does not move the latents"
    nearer = (z - of_z - entries).norm() < (z - entries).norm()
    assert nearer, "a step down the commitment loss takes latents away from their entries"


def test_weights(exercise):
    """The commitment loss is a quarter of the codebook loss, which is a mean of squares."""
    z, entries = vectors()
    codebook, commitment = exercise.codebook_losses(z, entries)
    assert torch.isclose(commitment, codebook / 4), (
        "the commitment loss is not a quarter of the codebook loss"
    )
    half = exercise.codebook_losses(z, (z + entries) / 2)[0]
    assert torch.isclose(half, codebook / 4), "half the difference is not a quarter of the loss"
    twice = exercise.codebook_losses(z.repeat(2, 1), entries.repeat(2, 1))[0]
    assert torch.isclose(twice, codebook), "twice as many latents of the same kind change the loss"


def test_hinge_pushes(exercise):
    """The discriminator learns to score real patches higher and reconstructions lower."""
    real, fake = scores()
    of_real, of_fake = gradients(exercise.hinge(real, fake), real, fake)
    assert (of_real <= 0).all() and of_real.any(), "a real patch is pushed to lower scores"
    assert (of_fake >= 0).all() and of_fake.any(), "a reconstruction is pushed to higher scores"


def test_hinge_margins(exercise):
    """Scores beyond the margins cost nothing, scores within them cost something."""
    real, fake = scores()
    of_real, of_fake = gradients(exercise.hinge(real, fake), real, fake)
    assert not of_real[real > 1].any(), "a real patch with a score above 1 is still pushed"
    assert not of_fake[fake < -1].any(), "a reconstruction with a score below -1 is still pushed"
    assert of_real[real < 1].all(), "a real patch with a score below 1 is not pushed"
    assert of_fake[fake > -1].all(), "a reconstruction with a score above -1 is not pushed"


def test_hinge_is_fair(exercise):
    """Real patches and reconstructions weigh the same, however many there are."""
    real, fake = scores()
    loss = exercise.hinge(real, fake)
    assert torch.isclose(loss, exercise.hinge(-fake, -real)), (
        "real patches and reconstructions do not weigh the same"
    )
    more = exercise.hinge(real.repeat(3, 1, 1, 1), fake)
    assert torch.isclose(loss, more), "three times as many real patches change the loss"
    undecided = exercise.hinge(torch.zeros(4, 1, 3, 3), torch.zeros(4, 1, 3, 3))
    assert torch.isclose(undecided, torch.tensor(1.0)), "a discriminator that says 0 does not pay 1"


def test_adversarial(exercise):
    """The tokenizer wants higher scores, and never has enough."""
    _, fake = scores()
    (gradient,) = gradients(exercise.adversarial(fake), fake)
    assert (gradient <= 0).all() and gradient.any(), "the tokenizer learns to get lower scores"
    assert torch.allclose(gradient, gradient.mean()), (
        "the push on the tokenizer depends on the score"
    )
    assert torch.isclose(gradient.sum(), torch.tensor(-1.0)), (
        "the adversarial loss is not a mean over the patches"
    )


def test_project(exercise):
    """The discriminator's loss is that of train_vq.py."""
    real, fake = scores()
    same = torch.isclose(exercise.hinge(real, fake), train_vq.hinge(real, fake))
    assert same, "train_vq.hinge gives another loss"
