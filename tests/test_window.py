"""What extras/window.py promises: the picture of sample.py, in fewer steps."""

import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, run_script
from test_gpt import TINY, random_model
from test_sample import captions_for, pair  # noqa: F401

import sample

sys.path.insert(0, str(ROOT / "extras"))
import window

SETTINGS = [
    dict(),
    dict(cfg_scale=3.0),
    dict(cfg_scale=3.0, cfg_interval=0, top_k=20),
    dict(cfg_scale=3.0, cfg_interval=30, top_k=20),
    dict(cfg_scale=3.0, top_p=0.8, temperature=0.7),
    dict(cfg_scale=2.0, temperature=0.0),
]
CLASSES = replace(TINY, grid=9, dim=200, n_head=2)
CAPTIONS = replace(TINY, grid=8, num_classes=0, cond_tokens=20, caption_dim=7)


@pytest.mark.parametrize("config", [CLASSES, CAPTIONS], ids=["classes", "captions"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_codes_are_those_of_sample_generate(config, settings):
    """From the same seed, while the cache grows and guidance ends half-way, in windows of any size:
    of one code, and of more codes than the image has."""
    model, T = random_model(config), config.grid**2
    cond = captions_for(model, [11, 20]) if config.caption_dim else [torch.tensor([0, 3])]
    right = sample.generate(model, *cond, seeds=[7, 2**63 + 8], **settings)
    for i, seed in enumerate([7, 2**63 + 8]):
        one = [x[i : i + 1] for x in cond]
        for W in (1, 5, T - 1, 100):
            codes, steps = window.window_codes(model, *one, window=W, seed=seed, **settings)
            assert torch.equal(codes, right[i : i + 1]), W
            assert steps == T if W == 1 else steps < T


@torch.no_grad()
def test_a_model_that_is_sure_takes_one_step_for_each_window():
    """Its codes do not depend on those before them, so the guesses after the first are right."""
    model = random_model(TINY)
    model.norm.weight.zero_()  # all logits are 0
    for W in (4, 5):
        codes, steps = window.window_codes(
            model, torch.tensor([1]), window=W, temperature=0.0, cfg_scale=2.0
        )
        assert codes.tolist() == [[0] * 16]  # which is the first guess of every code
        assert steps == 1 + -(-15 // W)
    settings = dict(seeds=[3])
    codes, steps = window.window_codes(model, torch.tensor([1]), window=4, seed=3)
    assert torch.equal(codes, sample.generate(model, torch.tensor([1]), **settings))
    assert steps < 12


def test_the_trace_tells_every_guess():
    """What tests/window_figure.py makes its figure from: each step's first code is final in it."""
    model, trace = random_model(TINY), []
    codes, steps = window.window_codes(model, torch.tensor([2]), window=4, seed=1, trace=trace)
    assert len(trace) == steps - 1
    firsts = [first for first, _ in trace]
    assert firsts[0] == 1 and all(b > a for a, b in zip(firsts, firsts[1:]))
    for first, guesses in trace:
        assert torch.equal(guesses[: first + 1], codes[0, : first + 1])
    assert torch.equal(trace[-1][1], codes[0])


# ---- the command line --------------------------------------------------------------------------
def test_the_picture_is_that_of_sample_py(pair, tmp_path):  # noqa: F811
    """To the last byte, with an image for each class; and it says how many steps each took."""
    models = ["--vq", pair / "vq.pt", "--gpt", pair / "gpt.pt", "--classes", "1,catfish"]
    models += ["--seed", 5, "--cfg-scale", 3]
    plain = run_script("sample.py", *models, "--out", tmp_path / "plain.png")
    assert plain.returncode == 0, plain.stderr
    fast = run_script("extras/window.py", *models, "--window", 6, "--out", tmp_path / "fast.png")
    assert fast.returncode == 0, fast.stderr
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "fast.png").read_bytes()
    for name in ("dog", "catfish"):
        assert f"{name}: 16 codes in " in fast.stdout
