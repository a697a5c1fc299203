"""What gpt.py promises: the released models to the last digit, and decoding that equals one full
forward."""

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    GPT,
    GPT_GRADIENT,
    SHALLOW,
    VAR,
    difference,
    fill,
    golden,
    released_keys,
    rounding,
)

import gpt

TINY = gpt.GPTConfig(dim=64, n_layer=2, n_head=4, vocab_size=40, grid=4, num_classes=5)


def random_model(config=TINY):
    """A small model whose output layer is not zero, so that predictions differ."""
    torch.manual_seed(0)
    model = gpt.GPT(config)
    torch.nn.init.normal_(model.output.weight, std=0.2)
    return model.eval()


GRIDS = [
    ("gpt_b_c2i", 4),
    ("gpt_b_c2i", 16),
    pytest.param("gpt_3b_head", 4, marks=pytest.mark.slow),  # heads of 100 channels
]


@functools.cache
def released(name):
    """(weights of the golden model, its configuration, what the reference computed with it)."""
    expected, meta = golden(name)
    c = meta["config"]
    config = gpt.GPTConfig(
        dim=c["dim"], n_layer=c["n_layer"], n_head=c["n_head"], dropout=0, class_dropout=0
    )
    return fill(gpt.GPT(config)).state_dict(), config, expected


def on_grid(name, grid):
    state, config, expected = released(name)
    with torch.device("meta"):
        model = gpt.GPT(replace(config, grid=grid))
    model.load_state_dict(state, assign=True)
    return model.to("cpu"), {
        k.removeprefix(f"g{grid}_"): v for k, v in expected.items() if k.startswith(f"g{grid}_")
    }


@pytest.mark.parametrize("name, grid", GRIDS)
def test_teacher_forced_logits_are_the_reference_ones(name, grid):
    model, expected = on_grid(name, grid)
    with torch.no_grad():
        logits = model.eval()(expected["idx"].long(), expected["cls"].long())[
            :, expected["pos"].long()
        ]
    assert difference(logits[..., expected["vocab_sel"].long()], expected["logits"]) < GPT
    assert difference(logits.logsumexp(-1), expected["lse"]) < GPT
    assert torch.equal(logits.argmax(-1).int(), expected["argmax"])


@pytest.mark.parametrize("name, grid", GRIDS)
def test_training_loss_and_gradients_are_the_reference_ones(name, grid):
    model, expected = on_grid(name, grid)
    idx = expected["idx"].long()
    model.train().requires_grad_()
    logits = model(idx[:, :-1], expected["cls"].long())
    nll = F.cross_entropy(logits.transpose(1, 2), idx, reduction="none")
    assert difference(nll.detach(), expected["train_nll"]) < GPT
    assert difference(nll.mean().detach(), expected["train_loss"]) < GPT
    nll.mean().backward()
    norms = {k: p.grad.double().norm() for k, p in model.named_parameters()}
    assert (
        difference(
            torch.stack([norms[k] for k in expected["grad_keys"].tolist()]), expected["grad_norms"]
        )
        < GPT_GRADIENT
    )
    assert (
        difference(torch.stack(list(norms.values())).norm(), expected["grad_total_norm"])
        < GPT_GRADIENT
    )


@torch.no_grad()
def test_the_bound_tells_a_wrong_epsilon_and_swapped_axes(monkeypatch):
    model, expected = on_grid("gpt_b_c2i", 4)
    model.eval()

    def off():
        logits = model(expected["idx"].long(), expected["cls"].long())[:, expected["pos"].long()]
        return difference(logits[..., expected["vocab_sel"].long()], expected["logits"])

    assert off() < GPT
    rope = model.rope
    model.rope = torch.cat([rope[:1], rope[1:].view(4, 4, -1, 2).transpose(0, 1).flatten(0, 1)])
    assert off() > 100 * GPT
    model.rope = rope
    wrong_norm(monkeypatch)
    assert off() > 2 * GPT


@pytest.mark.parametrize(
    "name, bound",
    [
        ("gpt_b_c2i", GPT),
        ("gpt_3b_head", GPT),
        ("gpt_t2i", GPT),
        ("var/var_d2", VAR),
        ("var/var_d4", VAR),
        ("var/var_shared", VAR),
    ],
)
def test_no_recorded_code_hangs_on_rounding(name, bound):
    """Codes are compared for equality: the runner-up is further away than twice what the bound
    allows the logits, which guidance multiplies by up to 1 + 2 cfg. Padded positions have no
    logits."""
    expected, meta = golden(name)
    for key in [k for k in expected if k.endswith("logits") and "uncond" not in k]:
        largest = expected[key].abs().max()
        margin = expected[key.replace("logits", "argmax_margin")]
        assert margin[margin > 0].min() > 2 * bound * largest, key
    for run in meta.get("generations", []) + meta.get("runs", []):
        cfg = run.get("cfg_scale", run.get("cfg"))
        if "min_margin" in run:
            assert run["min_margin"] > 2 * bound * largest * (1 + 2 * cfg), run["key"]


def wrong_norm(monkeypatch):
    """Plant RMSNorm's epsilon as 1e-6."""
    monkeypatch.setattr(
        gpt.RMSNorm, "forward", lambda norm, x: F.rms_norm(x, x.shape[-1:], norm.weight, 1e-6)
    )


def test_rotary_table_and_rotation_are_the_reference_ones():
    expected, meta = golden("rope2d")
    for name in [k.removesuffix("_table") for k in expected if k.endswith("_table")]:
        g, d, c = (int(part[1:]) for part in name.split("_"))
        table = gpt.rope_table(g, d, c)
        assert list(table.shape) == expected[f"{name}_shape"].tolist()
        assert (
            difference(table[expected[f"{name}_rows"].long()], expected[f"{name}_table"]) < SHALLOW
        )
        weighted = (torch.arange(1, len(table) + 1).double()[:, None, None] * table.double()).sum(0)
        assert difference(weighted, expected[f"{name}_weighted_colsum"]) < rounding(8)
    import numpy as np

    for d, c in [(64, 1), (100, 1), (128, 1), (64, 120), (100, 120), (128, 120)]:
        x = (
            np.random.RandomState(meta["seed"] + d + c)
            .standard_normal((2, c + 16, 3, d))
            .astype(np.float32)
        )
        rows = expected[f"apply_d{d}_c{c}_rows"].long()
        turned = gpt.rotate(torch.from_numpy(x), gpt.rope_table(4, d, c))[:, rows]
        assert difference(turned, expected[f"apply_d{d}_c{c}_out"]) < SHALLOW


@pytest.mark.parametrize("name", ["B", "L", "XL", "XXL", "XXXL", "1B", "3B", "7B"])
def test_every_size_has_the_released_names_shapes_and_parameter_count(name):
    keys, parameters = released_keys(f"GPT-{name} c2i")
    with torch.device("meta"):
        model = gpt.GPT(gpt.GPT_CONFIGS[name])
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == keys
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_paper_sizes():
    """111M, 343M, 775M, 1.4B and 3.1B parameters (paper, table 1)."""
    for name, millions in [("B", 111), ("L", 343), ("XL", 775), ("XXL", 1411), ("3B", 3097)]:
        assert round(released_keys(f"GPT-{name} c2i")[1] / 1e6) == millions


def test_an_untrained_model_guesses_uniformly():
    """The output layer starts at zero, so the first loss is ln(V)."""
    logits = gpt.GPT(TINY)(torch.zeros(2, 3, dtype=torch.long), torch.tensor([0, 1]))
    assert torch.equal(logits, torch.zeros(2, 4, TINY.vocab_size))


def test_a_later_code_never_changes_an_earlier_prediction():
    model, codes = random_model(), torch.randint(40, (2, 15))
    with torch.no_grad():
        before = model(codes, torch.tensor([1, 2]))
        codes[:, 9] = (codes[:, 9] + 1) % 40
        after = model(codes, torch.tensor([1, 2]))
    assert torch.equal(before[:, :10], after[:, :10])  # class token and codes 0..8
    assert not torch.equal(before[:, 10], after[:, 10])  # so the test is able to fail


def test_cached_decoding_matches_one_full_forward():
    model, codes, labels = random_model(), torch.randint(40, (3, 15)), torch.tensor([1, 2, 5])
    with torch.no_grad():
        full = model(codes, labels)
        cache = model.new_cache(3)
        steps = [model.extend(model.cls_embedding(labels), 0, cache)]
        steps += [
            model.extend(model.tok_embeddings(codes[:, i : i + 1]), i + 1, cache) for i in range(15)
        ]
    assert torch.allclose(torch.cat(steps, 1), full, atol=1e-5)
    assert [layer.shape for layer in cache] == 2 * [
        (2, 3, 4, 16, 16)
    ]  # one class token and 15 codes: no more


def test_the_rotary_table_stays_float32_in_a_half_precision_model():
    model = random_model()
    table = model.rope.clone()
    model = model.bfloat16()
    assert model.rope.dtype == torch.float32 and torch.equal(model.rope, table)
    assert model(torch.zeros(1, 3, dtype=torch.long), torch.tensor([0])).dtype == torch.bfloat16


def test_classes_are_dropped_in_training_only():
    model = random_model(replace(TINY, dropout=0.0, class_dropout=1.0))
    codes, label, none = torch.zeros(1, 3, dtype=torch.long), torch.tensor([1]), torch.tensor([5])
    assert not torch.equal(model(codes, label), model(codes, none))
    model.train()
    assert torch.equal(model(codes, label), model(codes, none))


def test_released_files_load_in_every_wrapper(tmp_path):
    """Bare, {"model"}, {"module"}, {"state_dict"}, and beside an argparse.Namespace, as official
    training saves."""
    import argparse

    config = replace(gpt.GPT_CONFIGS["B"], num_classes=3)
    state = gpt.GPT(config).state_dict()
    state["freqs_cis"] = torch.zeros(2)
    for checkpoint in (
        state,
        {"model": state},
        {"module": state},
        {"state_dict": state},
        {"model": state, "args": argparse.Namespace(lr=1e-4)},
    ):
        torch.save(checkpoint, tmp_path / "c2i.pt")
        model = gpt.load_gpt(tmp_path / "c2i.pt", grid=24)
        assert model.config == replace(config, grid=24) and not model.training


class Danger:
    """Unpickling this would call print."""

    def __reduce__(self):
        return print, ("code ran",)


def test_a_bad_checkpoint_gets_one_sentence(tmp_path, capsys):
    path = tmp_path / "ckpt.pt"
    torch.save({"model": Danger()}, path)
    with pytest.raises(ValueError, match="is refused: it could run code"):
        gpt.load_gpt(path)
    assert "code ran" not in capsys.readouterr().out
    torch.save({"model": random_model().state_dict()}, path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="truncated, or not"):
        gpt.load_gpt(path)
    path.write_text("hello")
    with pytest.raises(ValueError, match="truncated, or not"):
        gpt.load_gpt(path)
    torch.save({"model": {"encoder.conv_in.weight": torch.zeros(1)}}, path)
    with pytest.raises(ValueError, match="not a GPT checkpoint"):
        gpt.load_gpt(path)
    with pytest.raises(OSError):
        gpt.load_gpt(tmp_path / "missing.pt")
