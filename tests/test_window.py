"""What extras/window.py promises: the picture of sample.py in fewer steps."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_gpt import random_model
from test_sample import CONFIGS, SETTINGS, captions_for
from test_sample import pair as pair
from test_sample import recorded as recorded

import sample
from extras import window
from nanollamagen import fast


def one_condition(model):
    if model.config.caption_dim:
        return captions_for(model, [3])
    return [torch.tensor([3])]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_windows_give_the_codes_of_one_code_at_a_time_in_fewer_steps(config):
    """With a cache that grows, guidance that ends within a window, and windows that are longer than
    what is left."""
    model, T = random_model(config), config.grid**2
    cond = one_condition(model)
    for settings in [*SETTINGS, dict(cfg_scale=1.5, top_p=0.7, temperature=0.8)]:
        right = sample.generate(model, *cond, seeds=[7], **settings)
        for size in (1, 5, 100):
            trace = []
            codes = window.generate(model, *cond, seed=7, window=size, trace=trace, **settings)
            assert torch.equal(codes, right), (settings, size)
            assert len(trace) == T - 1 if size == 1 else len(trace) < T - 1
            assert trace[-1][0] == T


def test_packed_layers_give_the_same_codes():
    model, cond = random_model(), torch.tensor([2])
    right = window.generate(model, cond, seed=1, window=3, cfg_scale=3.0, top_k=20)
    fast.pack(model)
    packed = window.generate(model, cond, seed=1, window=3, cfg_scale=3.0, top_k=20)
    assert torch.equal(packed, right)


def test_a_recorded_step_gives_the_same_codes(recorded, monkeypatch):
    model = random_model(CONFIGS["heads of 64"])
    settings = dict(seed=1, cfg_scale=3.0, cfg_interval=30, top_k=20)
    codes = window.generate(model, torch.tensor([2]), **settings)
    assert recorded
    monkeypatch.undo()
    assert torch.equal(codes, window.generate(model, torch.tensor([2]), **settings))


def test_the_command_writes_the_picture_of_sample_py(pair, tmp_path):
    flags = ["--vq", pair / "vq.pt", "--gpt", pair / "gpt.pt", "--classes", "1,catfish"]
    pictures = []
    for script in ("sample.py", "extras/window.py"):
        out = tmp_path / f"{len(pictures)}.png"
        words = [sys.executable, script, *flags, "--seed", "5", "--top-k", "20", "--out", out]
        result = subprocess.run(
            [str(word) for word in words], cwd=ROOT, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1]
    assert "32 codes in" in result.stdout


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--window", "0"], "--window: 0 is not a whole number from 1 to"),
        (["--out", "a.npz"], "--out a.npz: give a name that ends in .png"),
    ],
)
def test_a_mistake_names_the_flag(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["window.py", "--vq", "a", "--gpt", "b", *flags])
    with pytest.raises(SystemExit) as stop:
        window.main()
    assert stop.value.code == 2 and message in capsys.readouterr().err
