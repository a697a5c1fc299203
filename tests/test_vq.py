"""What vq.py promises: the released tokenizers to the last digit, exact crops, safe codes on
disk."""

from copy import deepcopy
from dataclasses import asdict, replace

import pytest
import torch
from conftest import (
    VQ,
    VQ_GRADIENT,
    difference,
    fill,
    golden,
    released_keys,
    with_epsilon,
    with_swapped_kernels,
)

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
        assert difference(model.latents(expected["image"]), expected["h"]) < VQ
        # By the bound, a difference of squared distances may be off by 4 VQ: no code hangs on it.
        assert expected["index_margin"].min() > 4 * VQ < expected["rect_index_margin"].min()
        assert torch.equal(model.encode(expected["image"]).int(), expected["indices"])
        assert difference(model.decode(expected["indices"].long()), expected["decoded"]) < VQ
        assert (
            difference(model.decode(expected["given_indices"].long()), expected["given_decoded"])
            < VQ
        )
        assert difference(model(expected["image"])[0], expected["decoded"]) < VQ


def test_images_need_not_be_square(released):
    _, model, expected = released
    with torch.no_grad():
        assert difference(model.latents(expected["rect_image"]), expected["rect_h"]) < VQ
        assert torch.equal(model.encode(expected["rect_image"]).int(), expected["rect_indices"])
        assert (
            difference(model.decode(expected["rect_indices"].long()), expected["rect_decoded"]) < VQ
        )


def test_the_epsilon_of_the_group_norm_is_the_released_one(released):
    _, model, expected = released
    h, w = (n // model.config.downsample for n in expected["zero_quant_decoded"].shape[-2:])
    with torch.no_grad():
        assert difference(model.latents(torch.zeros(1, 3, 32, 32)), expected["zero_image_h"]) < VQ
        zero = model.decoder(model.post_quant_conv(torch.zeros(1, 8, h, w)))
    assert difference(zero, expected["zero_quant_decoded"]) < VQ


@torch.no_grad()
def test_the_bound_tells_a_wrong_epsilon_and_swapped_axes(released):
    _, model, expected = released
    image, latents = torch.zeros(1, 3, 32, 32), expected["zero_image_h"]
    wrong = with_epsilon(deepcopy(model), torch.nn.GroupNorm, 1e-5)
    assert difference(wrong.latents(image), latents) > 100 * VQ
    wrong = with_swapped_kernels(deepcopy(model))
    assert difference(wrong.latents(expected["rect_image"]), expected["rect_h"]) > 100 * VQ


def test_training_losses_usage_and_gradients_are_the_reference_ones(released):
    _, model, expected = released
    model.train()
    model.quantize.codebook_used.zero_()
    decoded, losses = model(expected["image"], entropy=True)
    assert difference(decoded, expected["train_decoded"]) < VQ
    assert difference(losses["vq"], expected["vq_loss"]) < VQ
    assert difference(losses["commit"], expected["commit_loss"]) < VQ
    assert difference(losses["entropy"], expected["entropy_loss_at_ratio_1"]) < VQ
    assert model.quantize.usage() == pytest.approx(float(expected["codebook_usage"]))
    tail = expected["codebook_used_tail"]
    assert torch.equal(model.quantize.codebook_used[-len(tail) :], tail)

    loss = (decoded - expected["image"]).abs().mean() + losses["vq"] + losses["commit"]
    assert difference(loss, expected["grad_loss"]) < VQ
    model.zero_grad()
    loss.backward()
    parameters = dict(model.named_parameters())
    norms = torch.stack(
        [parameters[k].grad.double().norm() for k in expected["grad_keys"].tolist()]
    )
    assert difference(norms, expected["grad_norms"]) < VQ_GRADIENT
    assert (
        difference(model.quant_conv.weight.grad[:, :16, 0, 0], expected["grad_quant_conv_weight"])
        < VQ_GRADIENT
    )
    first = model.quantize.embedding.weight.grad[expected["indices"][0, 0, 0].item()]
    assert difference(first, expected["grad_codebook_first_code"]) < VQ_GRADIENT
    model.eval()


@pytest.mark.parametrize("name", ["VQ-16", "VQ-8"])
def test_released_files_load_and_their_kind_is_recognised(name, tmp_path, monkeypatch, capsys):
    """In every wrapper, without the usage queue that some files lack. Where a released file has
    both, the weights that the official code samples from win; in our own files the averaged ones
    do. Unknown weights are ignored. The models are narrower here than the released ones."""
    for kind, config in vq.VQ_CONFIGS.items():
        narrow = replace(config, ch=32, ch_mult=[1] * len(config.ch_mult), res_blocks=1)
        monkeypatch.setitem(vq.VQ_CONFIGS, kind, narrow)
    model = vq.VQModel(vq.VQ_CONFIGS[name])
    state = {k: v for k, v in model.state_dict().items() if k != "quantize.codebook_used"}
    other = {k: torch.zeros_like(v) for k, v in state.items()}
    files = {
        "bare": state,
        "model": {"model": state},
        "state_dict": {"state_dict": state},
        "official": {"model": state, "ema": other},
        "own": {"model": other, "ema": state, "config": asdict(vq.VQ_CONFIGS[name])},
        "own without averages": {
            "model": state,
            "ema": None,
            "config": asdict(vq.VQ_CONFIGS[name]),
        },
        "stray": {"model": {**state, "loss.step": torch.zeros(1)}},
    }
    for kind, checkpoint in files.items():
        torch.save(checkpoint, tmp_path / "vq.pt")
        loaded = vq.load_vq(tmp_path / "vq.pt")
        assert loaded.config == vq.VQ_CONFIGS[name] and not loaded.training
        assert vq.weights_hash(loaded) == vq.weights_hash(model), kind
        warned = "1 unknown weights are ignored, the first is loss.step" in capsys.readouterr().err
        assert warned == (kind == "stray")
    del state["encoder.conv_in.bias"]
    torch.save(state, tmp_path / "vq.pt")
    with pytest.raises(
        ValueError, match="does not fit the model: Missing key.*encoder.conv_in.bias"
    ):
        vq.load_vq(tmp_path / "vq.pt")


@pytest.mark.parametrize(
    "checkpoint, sentence",
    [
        ({"model": {"tok_embeddings.weight": torch.zeros(1)}}, "is not a tokenizer checkpoint"),
        (
            {
                "model": {
                    "quantize.embedding.weight": torch.zeros(3, 8),
                    "encoder.conv_blocks.4.x": torch.zeros(1),
                }
            },
            "does not fit",
        ),
        ([1, 2], "holds a list"),
    ],
)
def test_a_wrong_checkpoint_gets_one_sentence(tmp_path, checkpoint, sentence):
    torch.save(checkpoint, tmp_path / "vq.pt")
    with pytest.raises(ValueError, match=sentence):
        vq.load_vq(tmp_path / "vq.pt")


def test_the_nearest_code_needs_no_matrix_of_all_distances(monkeypatch):
    """For 4,096 latents and 16,384 entries all products at once would be 256 MB; no piece is above
    64 MB."""
    model, largest, argmax = vq.Quantizer(vq.VQConfig()), [], torch.Tensor.argmax
    monkeypatch.setattr(
        torch.Tensor, "argmax", lambda t, dim: (largest.append(t.numel()), argmax(t, dim))[1]
    )
    z = torch.nn.functional.normalize(torch.randn(4096, 8), dim=-1)
    codes = model.nearest(z)
    assert max(largest) * 4 <= 2**26 and codes.shape == (4096,)
    distances = torch.cdist(z[:50].double(), model.codebook().double())
    assert torch.equal(codes[:50], distances.argmin(-1))
