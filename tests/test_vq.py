"""What vq.py promises: the released tokenizers to the last digit, exact crops, safe codes on disk."""
import pytest
import torch
from conftest import difference, fill, golden, released_keys

import vq


@pytest.fixture(scope="module", params=["VQ-16", "VQ-8"])
def released(request):
    """A full-size tokenizer with the golden weights, and what the reference computed with it."""
    expected, _ = golden(request.param.lower().replace("-", ""))
    return request.param, fill(vq.VQModel(vq.VQ_CONFIGS[request.param])).eval(), expected


def test_names_and_shapes_are_those_of_the_released_checkpoints(released):
    name, model, _ = released
    keys, parameters = released_keys(name)
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == keys
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_encoding_and_decoding_give_the_reference_values(released):
    _, model, expected = released
    with torch.no_grad():
        assert difference(model.latents(expected["image"]), expected["h"]) < 1e-4
        assert torch.equal(model.encode(expected["image"]).int(), expected["indices"])
        assert difference(model.decode(expected["indices"].long()), expected["decoded"]) < 1e-4
        assert difference(model.decode(expected["given_indices"].long()), expected["given_decoded"]) < 1e-4
        assert difference(model(expected["image"])[0], expected["decoded"]) < 1e-4


def test_images_need_not_be_square(released):
    _, model, expected = released
    with torch.no_grad():
        assert difference(model.latents(expected["rect_image"]), expected["rect_h"]) < 1e-4
        assert torch.equal(model.encode(expected["rect_image"]).int(), expected["rect_indices"])
        assert difference(model.decode(expected["rect_indices"].long()), expected["rect_decoded"]) < 1e-4


def test_the_epsilon_of_the_group_norm_is_the_released_one(released):
    _, model, expected = released
    h, w = (n // model.config.downsample for n in expected["zero_quant_decoded"].shape[-2:])
    with torch.no_grad():
        assert difference(model.latents(torch.zeros(1, 3, 32, 32)), expected["zero_image_h"]) < 1e-4
        zero = model.decoder(model.post_quant_conv(torch.zeros(1, 8, h, w)))
    assert difference(zero, expected["zero_quant_decoded"]) < 1e-4


def test_training_losses_usage_and_gradients_are_the_reference_ones(released):
    _, model, expected = released
    model.train()
    model.quantize.codebook_used.zero_()
    decoded, losses = model(expected["image"], entropy=True)
    assert difference(decoded, expected["train_decoded"]) < 1e-4
    assert difference(losses["vq"], expected["vq_loss"]) < 1e-4
    assert difference(losses["commit"], expected["commit_loss"]) < 1e-4
    assert difference(losses["entropy"], expected["entropy_loss_at_ratio_1"]) < 1e-4
    assert model.quantize.usage() == pytest.approx(float(expected["codebook_usage"]))
    tail = expected["codebook_used_tail"]
    assert torch.equal(model.quantize.codebook_used[-len(tail):], tail)

    loss = (decoded - expected["image"]).abs().mean() + losses["vq"] + losses["commit"]
    assert difference(loss, expected["grad_loss"]) < 1e-4
    model.zero_grad()
    loss.backward()
    parameters = dict(model.named_parameters())
    norms = torch.stack([parameters[k].grad.double().norm() for k in expected["grad_keys"].tolist()])
    assert difference(norms, expected["grad_norms"]) < 5e-4
    assert difference(model.quant_conv.weight.grad[:, :16, 0, 0], expected["grad_quant_conv_weight"]) < 5e-4
    first = model.quantize.embedding.weight.grad[expected["indices"][0, 0, 0].item()]
    assert difference(first, expected["grad_codebook_first_code"]) < 5e-4
    model.eval()
