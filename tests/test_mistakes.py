"""An error names the flag and what is wrong, with exit code 2: every number at nonsense, every path
missing or unfit.

To add a script: a line in COMMANDS with words that would work, and its flags in the lists below."""

import importlib
import json
import os
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import evaluate
import gpt
import sample
import vq
from nanollamagen import captions

sys.path.insert(0, str(ROOT / "ablations"))
sys.path.insert(0, str(ROOT / "extras"))
import sweep

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here asks a server
# Inception's weights are not there: what is reported must have been found before they are read.
GONE = "gone.pth"
COMMANDS = {
    "compare": (evaluate, "a.npz a.npz --inception gone.pth"),
    "stats": (evaluate, "stats a.npz --inception gone.pth"),
    "recon": (evaluate, "recon --vq vq.pt --data shapes:4 --inception gone.pth"),
    "clip": (evaluate, "clip --prompts prompts.txt --samples a.npz --clip gone.pth"),
    "captions": (captions, "encode --codes codes --t5 words"),
    # The GPT's images have 16 pixels. That is said last.
    "sample": (sample, "--vq vq.pt --gpt gpt.pt --image-size 256 --out a.png"),
    "sweep": (sweep, "--vq vq.pt --gpt gpt.pt --ref a.npz --inception gone.pth"),
}
SCRIPTS = [  # that take --device, with words that come before it
    *((name, "") for name in ("train_vq", "train_gpt", "sample", "sweep", "edit", "window")),
    *((name, "encode") for name in ("vq", "var", "nanollamagen.captions")),
    ("evaluate", "recon"),
    ("train_var", ""),
    ("train_var", "tokenizer"),
    *((name, "") for name in ("train_grpo", "rewards")),
]
NONSENSE = ["0", "-1", "nan", "1.5e300", "9" * 30, "many", ""]
NUMBERS = [  # command, flag, which of NONSENSE mean something
    ("compare", "--size", []),
    ("compare", "--batch-size", []),
    ("stats", "--keep", []),
    ("stats", "--size", []),
    ("recon", "--image-size", []),
    ("recon", "--eval-size", []),
    ("recon", "--batch-size", []),
    ("clip", "--size", []),
    ("captions", "--batch-size", []),
    ("sample", "--image-size", []),
    ("sample", "--count", []),
    ("sample", "--num-samples", []),
    ("sample", "--resize", []),
    ("sample", "--seed", ["0"]),
    ("sample", "--cfg-scale", ["0"]),
    ("sample", "--cfg-interval", ["0", "-1"]),
    ("sample", "--temperature", ["0"]),
    ("sample", "--top-k", ["0"]),
    ("sample", "--top-p", []),
    ("sample", "--batch-size", []),
    ("sweep", "--cfg-scale", ["0"]),
    ("sweep", "--top-k", ["0"]),
    ("sweep", "--num-samples", []),
    ("sweep", "--seed", ["0"]),
    ("sweep", "--image-size", []),
    ("sweep", "--size", []),
    ("sweep", "--batch-size", []),
]
READ = [
    ("compare", "--inception"),
    ("recon", "--vq"),
    ("recon", "--data"),
    ("clip", "--prompts"),
    ("clip", "--samples"),
    ("captions", "--codes"),
    ("sample", "--vq"),
    ("sample", "--gpt"),
    ("sweep", "--vq"),
    ("sweep", "--gpt"),
    ("sweep", "--ref"),
]
WRITTEN = [
    ("compare", "--json"),
    ("stats", "--out"),
    ("recon", "--out"),
    ("recon", "--json"),
    ("clip", "--json"),
    ("sample", "--out"),
    ("sweep", "--out"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Small files of each kind, and some of no kind."""
    folder = tmp_path_factory.mktemp("files")
    pictures = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    np.savez(folder / "a.npz", arr_0=pictures, labels=np.arange(4))
    config = vq.VQConfig(ch=32, ch_mult=(1, 1, 1), res_blocks=1, z_channels=32, codebook_size=64)
    weights = vq.VQModel(config).state_dict()
    torch.save({"model": weights, "config": vars(config), "image_size": 16}, folder / "vq.pt")
    config = gpt.GPTConfig(dim=32, n_layer=1, n_head=2, vocab_size=64, grid=4, num_classes=3)
    weights = gpt.GPT(config).state_dict()
    torch.save({"model": weights, "config": vars(config)}, folder / "gpt.pt")
    (folder / "prompts.txt").write_text("one\ntwo\nthree\nfour\n")
    (folder / "codes").mkdir()
    np.save(folder / "codes" / "codes.npy", np.zeros((4, 1, 16), np.uint16))
    meta = {
        "classes": [],
        "captions": True,
        "h": 4,
        "w": 4,
        "codes": 16,
        "codebook_size": 64,
        "image_size": 16,
    }
    (folder / "codes" / "meta.json").write_text(json.dumps({**meta, "tokenizer": "0"}))
    (folder / "codes" / "captions.jsonl").write_text('{"caption": "a"}\n' * 4)
    (folder / "nothing").mkdir()
    (folder / "empty").write_bytes(b"")
    return folder


@pytest.fixture
def complaint(folder, monkeypatch, capsys):
    """complaint(command, flag, value): the sentence that a command line ends with."""

    def call(command, *words):
        module, good = COMMANDS[command]
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [f"{command}.py", *good.split(), *words])
        with pytest.raises(SystemExit) as stop:
            module.main()
        text = capsys.readouterr().err
        errors = [line for line in text.splitlines() if "error: " in line]
        assert stop.value.code == 2 and len(errors) == 1 and "Traceback" not in text, text
        return errors[0].split("error: ", 1)[1]

    return call


@pytest.mark.parametrize("command, flag, allowed", NUMBERS)
def test_a_number_out_of_range_is_named(complaint, command, flag, allowed):
    for value in NONSENSE:
        if value not in allowed:
            sentence = complaint(command, f"{flag}={value}")
            assert flag in sentence and GONE not in sentence, (value, sentence)
            assert "unrecognized" not in sentence, sentence


@pytest.mark.parametrize("command, flag", READ)
def test_a_path_that_is_missing_or_of_another_kind_is_named(complaint, command, flag):
    for value in ("nowhere", "nothing", "empty", "prompts.txt", ""):
        if (flag, value) != ("--prompts", "prompts.txt"):
            sentence = complaint(command, f"{flag}={value}")
            assert value in sentence and GONE not in sentence, (value, sentence)


@pytest.mark.parametrize("command, flag", WRITTEN)
def test_a_place_where_nothing_can_be_written_is_named_before_the_work(complaint, command, flag):
    unfit = "empty" if command == "sweep" else "nothing"  # a file for a folder, or the reverse
    for value in ("empty/inside", unfit, "/proc/none/at/all", ""):
        sentence = complaint(command, f"{flag}={value}")
        assert flag in sentence and value.split("/")[0] in sentence, (value, sentence)
        assert GONE not in sentence, (value, sentence)


def test_a_number_out_of_range_gets_the_range(complaint):
    sentence = complaint("compare", "--batch-size=0")
    assert sentence == "argument --batch-size: 0 is not a whole number from 1 to 1,048,576"
    assert complaint("sweep", "--cfg-scale=1,nan").endswith("nan is not a number from 0 to 1,000")


@pytest.mark.parametrize("name, words", SCRIPTS)
def test_a_device_that_is_not_there_is_named(name, words, monkeypatch, capsys):
    """In every script that takes --device, before it does anything else."""
    absent = ["banana", "", "meta", "xpu", "cuda:-1", "cuda:99", "mps:1", "cpu:x"]
    absent += [] if torch.cuda.is_available() else ["cuda"]
    absent += [] if torch.backends.mps.is_available() else ["mps"]
    script = importlib.import_module(name)
    for value in absent:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words.split(), f"--device={value}"])
        with pytest.raises(SystemExit) as stop:
            script.main()
        errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert stop.value.code == 2 and len(errors) == 1
        assert f"argument --device: {value}" in errors[0], errors


def test_sizes_that_the_models_do_not_have_are_named(complaint):
    assert "--image-size 18 is no multiple of 4" in complaint("recon", "--image-size", "18")
    assert "gpt.pt makes 16 x 16 pixels" in complaint("sweep", "--image-size", "32")


def test_a_picture_is_not_drawn_by_several_processes(complaint, monkeypatch):
    """Each of torchrun's would draw the same one over the other's."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert complaint("sample") == "torchrun is for --num-samples; a picture takes one process"


def test_damaged_features_of_captions_are_named(complaint, folder):
    (folder / "codes" / "text.json").write_text('{"hash": "wo')
    try:
        assert "codes/text.json is damaged; delete it" in complaint("captions")
        with pytest.raises(ValueError, match="is damaged"):
            captions.load_text(folder / "codes")
        about = {"encoder": "words", "dim": 64, "hash": "words", "images": 4}
        about |= {"bytes": 1, "tokens": 4}
        (folder / "codes" / "text.json").write_text(json.dumps(about))
        (folder / "codes" / "text.npy").write_bytes(b"")
        with pytest.raises(ValueError, match="do not belong together"):
            captions.load_text(folder / "codes")
    finally:
        for name in ("text.json", "text.npy"):
            (folder / "codes" / name).unlink(missing_ok=True)
