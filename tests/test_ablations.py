"""What ablations/ promises: sweeps that repeat nothing."""
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_evaluate import pictures, save_npz, tokenizer, weights  # noqa: F401

import evaluate
import gpt

sys.path.insert(0, str(ROOT / "ablations"))
import sweep  # noqa: E402


@pytest.fixture
def swept(tokenizer, weights, tmp_path, capsys, monkeypatch):
    """A sweep of four cells with an untrained GPT; `calls` lists the samplings that it asked for."""
    config = gpt.GPTConfig(dim=32, n_layer=1, n_head=2, vocab_size=64, grid=4, num_classes=3)
    torch.manual_seed(0)
    torch.save({"model": gpt.GPT(config).state_dict(), "config": vars(config)}, tmp_path / "gpt.pt")
    ref, calls, write_npz = save_npz(tmp_path / "ref.npz", arr_0=pictures(4)), [], sweep.sample.write_npz
    monkeypatch.setattr(evaluate, "frechet_distance", lambda *a: float(np.square(a[0] - a[2]).sum()))   # in no time
    monkeypatch.setattr(sweep.sample, "write_npz", lambda *a, **k: calls.append(k) or write_npz(*a, **k))

    def run(*words):
        flags = ["--vq", tokenizer[1], "--gpt", tmp_path / "gpt.pt", "--ref", ref, "--cfg-scale", "1,2.5", "--top-k",
                 "0,8", "--num-samples", 4, "--out", tmp_path / "sweep", "--inception", weights, *words]
        monkeypatch.setattr(sys, "argv", ["sweep.py", *map(str, flags)])
        code = 0
        try:
            sweep.main()
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        return code, printed.out + printed.err
    return SimpleNamespace(run=run, calls=calls, out=tmp_path / "sweep")


def test_a_sweep_writes_a_table_and_a_picture_and_never_repeats_a_cell(swept):
    code, text = swept.run()
    assert code == 0 and "4 of 4 cells were new" in text, text
    assert [(c["cfg_scale"], c["top_k"]) for c in swept.calls] == [(1, 0), (1, 8), (2.5, 0), (2.5, 8)]
    table = (swept.out / "sweep.md").read_text().splitlines()
    assert table[0] == "| cfg_scale | top_k | IS | FID | sFID | precision | recall |" and len(table) == 6
    assert len((swept.out / "sweep.csv").read_text().splitlines()) == 5
    assert Image.open(swept.out / "sweep.png").size == (1200, 500)
    code, text = swept.run()
    assert code == 0 and "0 of 4 cells were new" in text and len(swept.calls) == 4
    next(swept.out.glob("cfg2.5-top8-*.json")).unlink()                           # scores lost, samples still there
    code, text = swept.run()
    assert code == 0 and "1 of 4 cells were new" in text and len(swept.calls) == 4
    code, text = swept.run("--pr-half", "--top-k", 0)                             # other scores of the same samples
    assert code == 0 and "2 of 2 cells were new" in text and len(swept.calls) == 4
    code, text = swept.run("--seed", 1, "--top-k", 0, "--cfg-scale", 1)
    assert code == 0 and len(swept.calls) == 5


def test_a_sweep_refuses_models_that_do_not_belong_together(swept, tokenizer, tmp_path):
    config = gpt.GPTConfig(dim=32, n_layer=1, n_head=2, vocab_size=65, grid=4, num_classes=3)
    torch.save({"model": gpt.GPT(config).state_dict(), "config": vars(config)}, tmp_path / "gpt.pt")
    code, text = swept.run()
    assert code == 2 and "do not belong together" in text.splitlines()[-1]
