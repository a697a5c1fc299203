"""What ablations/ promises: diffs that apply and do what they say, runs and sweeps that repeat
nothing."""

import json
import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, pictures, save_npz
from PIL import Image

import evaluate
import gpt
import vq

sys.path.insert(0, str(ROOT / "ablations"))
import compare
import ideas
import run
import speedrun
import sweep
import table


@pytest.fixture
def swept(tokenizer, weights, tmp_path, capsys, monkeypatch):
    """A sweep of four cells with an untrained GPT; `calls` lists the samplings that it asked
    for."""
    config = gpt.GPTConfig(dim=32, n_layer=1, n_head=2, vocab_size=64, grid=4, num_classes=3)
    torch.manual_seed(0)
    torch.save({"model": gpt.GPT(config).state_dict(), "config": vars(config)}, tmp_path / "gpt.pt")
    ref, calls = save_npz(tmp_path / "ref.npz", arr_0=pictures(4)), []
    write_npz = sweep.sample.write_npz

    def noted(*args, **settings):
        calls.append(settings)
        return write_npz(*args, **settings)

    def quick_distance(mu1, sigma1, mu2, sigma2):
        return float(np.square(mu1 - mu2).sum())

    monkeypatch.setattr(evaluate, "frechet_distance", quick_distance)
    monkeypatch.setattr(sweep.sample, "write_npz", noted)
    flags = (
        f"--vq {tokenizer[1]} --gpt {tmp_path}/gpt.pt --ref {ref} --cfg-scale 1,2.5 --top-k 0,8 "
        f"--num-samples 4 --out {tmp_path}/sweep --inception {weights}"
    )

    def start(*words):
        monkeypatch.setattr(sys, "argv", ["sweep.py", *flags.split(), *map(str, words)])
        code = 0
        try:
            sweep.main()
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return SimpleNamespace(run=start, calls=calls, out=tmp_path / "sweep")


@pytest.mark.slow
def test_a_sweep_writes_a_table_and_a_picture_and_never_repeats_a_cell(swept):
    code, text = swept.run()
    assert code == 0 and "4 of 4 cells were new" in text, text
    cells = [(call["cfg_scale"], call["top_k"]) for call in swept.calls]
    assert cells == [(1, 0), (1, 8), (2.5, 0), (2.5, 8)]
    header, *lines = (swept.out / "sweep.md").read_text().splitlines()
    assert header == "| cfg_scale | top_k | IS | FID | sFID | precision | recall |"
    assert len(lines) == 5
    assert len((swept.out / "sweep.csv").read_text().splitlines()) == 5
    assert Image.open(swept.out / "sweep.png").size == (1200, 500)
    code, text = swept.run()
    assert code == 0 and "0 of 4 cells were new" in text and len(swept.calls) == 4
    next(swept.out.glob("cfg2.5-top8-*.json")).unlink()  # scores lost, samples still there
    code, text = swept.run()
    assert code == 0 and "1 of 4 cells were new" in text and len(swept.calls) == 4
    code, text = swept.run("--pr-half", "--top-k", 0)  # other scores of the same samples
    assert code == 0 and "2 of 2 cells were new" in text and len(swept.calls) == 4
    code, text = swept.run("--seed", 1, "--top-k", 0, "--cfg-scale", 1)
    assert code == 0 and len(swept.calls) == 5


def test_a_sweep_refuses_models_that_do_not_belong_together(swept, tokenizer, tmp_path):
    config = gpt.GPTConfig(dim=32, n_layer=1, n_head=2, vocab_size=65, grid=4, num_classes=3)
    torch.save({"model": gpt.GPT(config).state_dict(), "config": vars(config)}, tmp_path / "gpt.pt")
    code, text = swept.run()
    assert code == 2 and "do not belong together" in text.splitlines()[-1]


# ---- diffs and run.py --------------------------------------------------------------------------
DIFFS = sorted(path.stem for path in (ROOT / "ablations").glob("*.diff"))
TOKENIZERS = {  # and the size of their codebook
    "bsq": "--codebook-size 64 --code-dim 6",
    "fsq": "--codebook-size 1000 --code-dim 4",
    "ibq": "--codebook-size 64",
    "no_sphere": "--codebook-size 64",
}

# run in the folder with the changed scripts, after two steps; `model` is what they trained
PROMISES = {
    "adaln": """
        fresh = gpt.GPT(model.config).eval()
        x, cond = torch.randn(2, 3, 128), torch.randn(2, 1, 128)
        # every block starts as the identity
        assert torch.equal(fresh.layers[0](x, fresh.rope[:3], cond), x)""",
    "bsq": """
        corners = model.quantize.codebook()
        assert torch.allclose(corners.abs(), torch.tensor(6**-0.5))  # as before the training
        z = vq.unit_vectors(torch.randn(1, 6, 8, 8))
        codes = model.quantize.nearest(z)
        assert torch.equal(codes[:, None] >> torch.arange(6) & 1, (z > 0).long())
        assert torch.equal(corners[codes] > 0, z > 0)""",
    "cca": """
        labels, codes = torch.tensor([0, 1]), torch.randint(64, (2, 16))
        every = model(codes[:, :-1], labels).log_softmax(-1).gather(-1, codes[..., None])
        assert torch.allclose(train_gpt.log_p(model, codes, labels), every.sum((1, 2)))
        gains = torch.zeros(3, requires_grad=True)
        with torch.enable_grad():
            right = torch.tensor([True, True, False])
            train_gpt.contrast(gains, right, beta=0.5, negative=4.0).backward()
        # an image becomes likelier with its class, and less likely with another
        assert torch.allclose(gains.grad, torch.tensor([-1.0, -1.0, 4.0]) * 0.25 / 4)
        assert model.config.num_classes == 3""",
    "fsq": """
        assert not list(model.quantize.parameters())             # no codebook that could be learned
        every = torch.arange(1000)
        assert torch.equal(model.quantize.nearest(latents_of(model, every)), every)""",
    "gpt2_block": "assert not any('w3' in name for name, _ in model.named_parameters())",
    "ibq": """
        with torch.enable_grad():
            quantized, _, codes = model.quantize(torch.randn(1, 8, 1, 1))
            quantized[0, 0].sum().backward()
        assert torch.allclose(quantized.flatten(), model.quantize.codebook()[codes.item()])
        taught = model.quantize.embedding.weight.grad.norm(dim=-1)
        assert taught.shape == (64,) and taught.min() > 0        # all codes, by a single latent""",
    "learned_positions": """
        weight = model.pos_embeddings.weight
        assert weight.shape == (17, 128) and weight.abs().max() < 1
        swapped = torch.tensor([[1, 2, 3]]), torch.tensor([[2, 1, 3]])
        a, b = (model(codes, torch.tensor([0]))[0, -1] for codes in swapped)
        assert not torch.equal(a, b)                             # places are still told apart""",
    "maskgit": """
        codes = sample.generate(model, torch.tensor([0, 1]), cfg_scale=2, seeds=[0, 1])
        assert codes.shape == (2, 16)
        assert 0 <= codes.min() and codes.max() < 64             # none is left hidden
        alone = sample.generate(model, torch.tensor([1]), cfg_scale=2, seeds=[1])
        assert torch.equal(codes[1:], alone)
        share = train_gpt.hidden(1000, 16).float().mean(1)
        assert share.min() >= 1 / 16
        assert 0.6 < share.mean() < 0.7                          # a cosine's mean is 2 / pi""",
    "model_size": "assert sum(name.startswith('toy') for name in gpt.GPT_CONFIGS) == 3",
    "muon": """
        for shape in (8, 24), (24, 8):
            values = torch.linalg.svdvals(train_gpt.orthogonal(torch.randn(shape)))
            assert 0.5 < values.min() and values.max() < 1.5""",
    "no_sphere": """
        lengths = model.quantize.codebook().norm(dim=-1)
        assert not torch.allclose(lengths, torch.ones(64), atol=0.1)""",
    "qk_norm": """
        shapes = {name.split('.')[-2]: tuple(q.shape) for name, q in model.named_parameters()}
        assert shapes['q_norm'] == shapes['k_norm'] == (32,)""",
    "rar": """
        raster = torch.arange(16).expand(8, 16)
        early, middle, late = (train_gpt.orders(8, 16, done, 'cpu') for done in (0.0, 0.6, 0.75))
        assert all(torch.equal(order.sort(1).values, raster) for order in (early, middle, late))
        assert torch.equal(late, raster) and (early != raster).any(1).all()
        tokens, labels = torch.randint(64, (8, 15)), torch.zeros(8, dtype=torch.int64)
        assert torch.equal(model(tokens, labels), model(tokens, labels, raster))""",
    "rope_1d": """
        table = gpt.rope_table(4, 8, 1)[1:]                      # (T, d/2, 2)
        assert torch.allclose(table[:, 0, 0], torch.arange(16).float().cos(), atol=1e-6)""",
    "rope_class": "assert torch.allclose(gpt.rope_table(4, 8, 3).norm(dim=-1), torch.ones(19, 4))",
}

PROGRAM = """
import runpy, sys, torch
sys.path.insert(0, '.')
for script, *words in {calls}:
    sys.argv = [script, *words]
    runpy.run_path(script, run_name='__main__')
import gpt, sample, train_gpt, vq

def latents_of(model, codes):   # numbers that are rounded to these codes
    wanted = model.quantize.codebook()[codes]
    levels = torch.tensor(vq.LEVELS)
    half, offset = (levels - 1) * 0.4995, 0.5 * (levels % 2 == 0)
    inside = ((wanted * (levels // 2) + offset) / half).clamp(-0.9999, 0.9999)
    return inside.atanh() - (offset / half).atanh()

torch.manual_seed(0)
model = {load}.eval()
torch.set_grad_enabled(False)
{promise}
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with vq.pt, an untrained tokenizer of 64 codes, codes/, 1100 images of 4 x 4
    random codes of it, and gpt.pt, an untrained GPT for them."""
    folder, rng = tmp_path_factory.mktemp("small"), np.random.RandomState(0)
    config = vq.VQConfig(ch=32, ch_mult=(1, 1), res_blocks=1, z_channels=32, codebook_size=64)
    torch.manual_seed(0)
    model = vq.VQModel(config)
    torch.save(
        {"model": model.state_dict(), "config": vars(config), "image_size": 8}, folder / "vq.pt"
    )
    (folder / "codes").mkdir()
    np.save(folder / "codes" / "codes.npy", rng.randint(64, size=(1100, 2, 16)).astype(np.uint16))
    np.save(folder / "codes" / "labels.npy", rng.randint(3, size=1100).astype(np.int32))
    meta = {
        "classes": ["a", "b", "c"],
        "captions": False,
        "image_size": 8,
        "h": 4,
        "codes": 16,
        "w": 4,
        "images": 1100,
        "codebook_size": 64,
        "crops": "centre",
        "tokenizer": vq.weights_hash(model),
        "data": "none",
        "skipped": {},
    }
    (folder / "codes" / "meta.json").write_text(json.dumps(meta))
    config = replace(gpt.GPT_CONFIGS["demo"], vocab_size=64, grid=4, num_classes=3)
    start = {"model": gpt.GPT(config).state_dict(), "config": vars(config)}
    torch.save(start, folder / "gpt.pt")
    return folder


def test_every_diff_applies_to_the_scripts_and_says_what_it_is_about():
    for name in run.names():
        idea = run.read(name)
        assert {"title", "idea", "source", "reported", "expect", "stage"} <= idea.keys(), name
        assert idea["added"] + idea["removed"] <= (100 if name == "maskgit" else 80), name
        if name in DIFFS:
            done = subprocess.run(
                ["git", "apply", "--check", idea["path"]], cwd=ROOT, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", DIFFS)
def test_with_the_diff_two_steps_are_trained_two_pictures_drawn_and_its_promise_holds(
    name, small, tmp_path
):
    scripts = tmp_path / "scripts"
    run.changed_scripts(run.names()[name], scripts)
    if name in TOKENIZERS:
        calls = [
            "train_vq.py --data shapes --model VQ-demo --image-size 16 --batch-size 2 "
            f"--lpips-weight 0 --disc-weight 0 --max-steps 2 --out out {TOKENIZERS[name]}",
            "vq.py encode --vq out/ckpt.pt --data shapes:2 --out codes --workers 0",
        ]
        load, written = "vq.load_vq('out/ckpt.pt')", "codes/meta.json"
    else:
        size = "toy-0.1M" if name == "model_size" else "demo"
        init = f"--init {small}/gpt.pt" if name == "cca" else ""
        calls = [
            f"train_gpt.py --codes {small}/codes --model {size} --batch-size 8 --lr 3e-4 "
            f"--max-steps 2 --val-images 8 --val-every 2 --out out {init}",
            f"sample.py --vq {small}/vq.pt --gpt out/ckpt.pt --classes 0,1 --cfg-scale 2 "
            "--out two.png",
        ]
        load, written = "gpt.load_gpt('out/ckpt.pt')", "two.png"
    promise = textwrap.dedent(PROMISES[name])
    program = PROGRAM.format(calls=[call.split() for call in calls], load=load, promise=promise)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=scripts, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (scripts / written).exists()


def ablate(words):
    """Exit code and output of run.py."""
    command = [sys.executable, str(ROOT / "ablations" / "run.py"), *words.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_a_finished_run_is_not_repeated(small, tmp_path):
    words = (
        f"averaged_weights --codes {small}/codes --steps 2 --seeds 1 --out {tmp_path}/out "
        f"--results {tmp_path}/results.json -- --val-images 8"
    )
    code, text = ablate(words)
    # The third run measures the averaged weights.
    assert code == 0 and text.count("> train_gpt.py") == 3, text
    said = r"averaged_weights --ema-decay 0.9999: validation loss \S+ against \S+ \(1 seed\): .*"
    said += r"x the seconds per step, \S+ x the peak memory, 1.00 x the weights"
    assert re.fullmatch(said, text.splitlines()[-1]), text
    assert Image.open(tmp_path / "out" / "averaged_weights.png").size == (1160, 450)
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["ablation"] for row in rows] == ["baseline", "averaged_weights"]
    assert all(row["val_loss"] > 0 and row["seconds"] > 0 for row in rows)
    code, text = ablate(words)
    assert code == 0 and "> train_gpt.py" not in text
    assert rows == json.loads((tmp_path / "results.json").read_text())
    assert re.fullmatch(said, text.splitlines()[-1]), text  # the verdict is there again


def pair(seed, base, mine, **more):
    """A row of the baseline and one of qk_norm, which differ in the loss and in `more`, pairs of
    values."""
    same = {"stage": "gpt", "steps": 5, "more": "", "data": "x", "flags": "", "seed": seed}
    values = {"val_loss": (base, mine), **more}
    return tuple(
        {**same, "ablation": name, **{k: v[i] for k, v in values.items()}}
        for i, name in enumerate(("baseline", "qk_norm"))
    )


def test_the_verdict_has_the_means_the_paired_difference_and_what_is_expected():
    idea = {**run.read("muon"), "label": "muon"}
    both = [pair(0, 3.60, 3.50), pair(1, 3.70, 3.61), pair(2, 3.80, 3.69)]
    three = compare.sentence(idea, "", both, "val_loss")
    assert three.startswith("muon: validation loss 3.6000 against 3.7000 (3 seeds): ")
    assert three.endswith(" -0.1000 ± 0.0058, lower, as expected")
    one = compare.sentence(idea, "--lr 1", both[:1], "val_loss")
    assert one.startswith(
        "muon --lr 1: validation loss 3.5000 against 3.6000 (1 seed): -0.1000, one"
    )
    far = [pair(0, 3.60, 3.50), pair(1, 3.70, 3.71), pair(2, 3.80, 3.69)]
    assert "too small to be seen with 3 seeds (less than 0.17)" in compare.sentence(
        idea, "", far, "val_loss"
    )
    equal = [pair(0, 3.60, 3.60), pair(1, 3.70, 3.70)]
    assert compare.sentence(idea, "", equal, "val_loss").endswith("nothing changed in training")
    assert compare.judge("val_loss", "higher", -1, 0.01, 3) == "lower, not as expected"
    assert compare.judge("val_loss", "same", -1, 1, 3) == "no difference to be seen, as expected"
    assert compare.judge("val_loss", "", -1, 0.01, 3) == "lower, which is better"
    assert compare.judge("psnr", "", -1, 0.01, 3) == "lower, which is worse"


def test_seconds_are_compared_only_between_runs_of_one_start():
    """A machine is not equally busy at all times; memory and weights do not depend on that."""
    cost = {"seconds": (1.0, 1.5), "memory": (2.0, 3.0), "parameters": (10, 10)}
    together = pair(0, 1, 1, start=("a", "a"), **cost)
    apart = pair(1, 1, 1, start=("a", "b"), **{**cost, "seconds": (1.0, 9.0)})
    old = pair(2, 1, 1, seconds=(1.0, 9.0))  # from before there was a start
    assert compare.costs([together, apart, old]) == {
        "seconds": 1.5,
        "memory": 1.5,
        "parameters": 1.0,
    }
    assert compare.costs([old]) == {}


def test_at_equal_time_a_slower_ablation_gets_fewer_steps(tmp_path, monkeypatch):
    trained = []

    def note(idea, variant, seed, scripts, args):
        trained.append((idea["name"], seed, args.steps))
        return {"val_loss": 1.0, "seconds": 2.0 if idea["name"] == "muon" else 1.0}

    monkeypatch.setattr(run, "measure", note)
    monkeypatch.setattr(run, "changed_scripts", lambda *_: None)
    args = SimpleNamespace(codes="codes", resize=32, steps=10, seeds=2, more=[], out=tmp_path)
    args.equal_time, args.start, args.results = True, "now", tmp_path / "results.json"
    idea = {**run.read("muon"), "file": "muon"}
    run.measure_all(idea, args)
    both = [(name, seed, 10) for seed in range(2) for name in ("baseline", "muon")]
    assert trained == both + [("muon at equal time", seed, 5) for seed in range(2)]
    run.measure_all(idea, args)  # nothing is repeated
    assert len(trained) == 6
    rows = json.loads(args.results.read_text())
    assert table.equal_time(rows, idea, "") == "+0.0000 ± 0.0000"


def test_a_parabola_finds_the_minimum_between_the_scales_that_were_tried():
    curve = [(x, (x - 1.8) ** 2 + 3) for x in (1, 1.5, 2.5)]
    said = "lowest FID 3.09 at scale 1.5 (a parabola has its minimum at 1.8)"
    assert compare.lowest(curve, "FID", "scale") == said
    assert compare.lowest(curve[:2], "FID", "scale").endswith("the end of the range")


# ---- what is changed in a clone ------------------------------------------------------------------
@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A repository with this working tree's scripts, committed; ideas.py is about it."""
    folder = tmp_path / "clone"
    run.changed_scripts(None, folder)
    shutil.copytree(ROOT / "ablations", folder / "ablations")
    (folder / ".gitignore").write_text("__pycache__\n")
    who = "-c user.name=a -c user.email=a@b"
    for words in ("init -q", "add .", f"{who} commit -qm start"):
        subprocess.run(["git", *words.split()], cwd=folder, check=True)
    monkeypatch.setattr(ideas, "ROOT", folder)
    monkeypatch.setattr(ideas, "HERE", folder / "ablations")
    return folder


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_the_baseline_of_changes_is_head_and_every_edit_is_another_run(clone, tmp_path):
    args = SimpleNamespace(changes="", codes="codes", data=None, out=tmp_path)
    args.resize, args.steps, args.more = 32, 5, []
    found = []
    for old, new in (("F.silu", "F.relu"), ("F.relu", "F.elu"), ("F.elu", "F.relu")):
        edit(clone / "gpt.py", old, new)
        idea = ideas.read_changes(args)
        ideas.changed_scripts(None, tmp_path / "head", idea["commit"])
        ideas.changed_scripts(idea["path"], tmp_path / "mine", idea["commit"])
        assert "F.silu" in (tmp_path / "head" / "gpt.py").read_text()
        assert new in (tmp_path / "mine" / "gpt.py").read_text()
        assert (idea["label"], idea["added"], idea["removed"]) == ("changes to gpt.py", 1, 1)
        found.append([run.key_of(what, "", 0, args) for what in (idea, run.baseline_of(idea))])
    assert found[0] == found[2] and found[0][0] != found[1][0] and found[0][1] != found[1][1]
    subprocess.run(
        "git checkout -q -b idea && git -c user.name=a -c user.email=a@b commit -qam x "
        "&& git checkout -q -",
        shell=True,
        cwd=clone,
        check=True,
    )
    args.changes = "idea"
    branch = ideas.read_changes(args)
    assert branch["path"].read_text() == idea["path"].read_text()
    assert "F.silu" in (clone / "gpt.py").read_text()


def test_changes_that_training_does_not_use_are_refused(clone, tmp_path):
    with pytest.raises(ValueError, match="no script has uncommitted changes"):
        ideas.diff("")
    edit(clone / "sample.py", "import", "import  ")
    with pytest.raises(ValueError, match="only sample.py differs, and training does not use it"):
        ideas.stage_of(ideas.diff(""))
    edit(clone / "vq.py", "import", "import  ")
    assert ideas.stage_of(ideas.diff("")) == "vq"
    edit(clone / "nanollamagen" / "loss.py", "import", "import  ")
    assert ideas.stage_of(ideas.diff("")) == "vq"
    edit(clone / "train_gpt.py", "import", "import  ")
    assert ideas.stage_of(ideas.diff("")) == "gpt"
    assert ideas.stage_of(ideas.diff(""), tokenizer=True) == "vq"


def test_saved_changes_are_a_diff_of_the_folder_that_applies_to_the_scripts(clone, tmp_path):
    edit(clone / "gpt.py", "F.silu", "F.relu")
    args = SimpleNamespace(changes=None, codes=None, data=None, save="relu")
    ideas.save(args)
    path = clone / "ablations" / "relu.diff"
    idea = ideas.read("relu")
    assert {"title", "idea", "source", "reported", "expect", "stage"} <= idea.keys()
    assert (idea["stage"], idea["added"], compare.expectation(idea)) == ("gpt", 1, "")
    subprocess.run(["git", "apply", "-R", path], cwd=clone, check=True)
    ideas.changed_scripts(path, tmp_path / "scripts")
    assert "F.relu" in (tmp_path / "scripts" / "gpt.py").read_text()
    with pytest.raises(ValueError, match="--save relu: a new name"):
        ideas.save(args)


def test_the_changes_of_a_clone_are_measured_from_one_command(clone, small, tmp_path):
    edit(clone / "gpt.py", "F.silu", "F.relu")
    command = [sys.executable, "ablations/run.py", "--changes", "--codes", small / "codes"]
    command += ["--steps", "2", "--seeds", "1", "--", "--val-images", "8"]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("changes to gpt.py: validation loss ") and "1.00 x the weights" in last
    rows = json.loads((clone / "runs" / "ablations" / "changes.json").read_text())
    assert [row["ablation"] for row in rows] == ["baseline", "changes"]
    assert (clone / "ablations" / "results.json").read_text() == (
        ROOT / "ablations" / "results.json"
    ).read_text()


@pytest.mark.parametrize(
    "left, resumed",
    [
        ([], False),
        (["ckpt.pt"], True),
        (["ckpt_00000020/"], True),
        (["ckpt_00000020.pt"], False),
        (["ckpt.tmp/"], False),
    ],
)
def test_a_run_resumes_what_a_stopped_one_left(small, tmp_path, monkeypatch, left, resumed):
    """FSDP leaves shards, in a folder; only the end has a ckpt.pt."""
    (tmp_path / "run" / "out").mkdir(parents=True)
    for name in left:
        path = tmp_path / "run" / "out" / name
        path.mkdir() if name.endswith("/") else path.touch()
    started = []

    def note(scripts, words, nproc=1):
        started.append(words)
        return "", 1.0

    monkeypatch.setattr(run, "call", note)
    monkeypatch.setattr(run, "log", lambda *_: {"val_loss": 1.0})
    args = SimpleNamespace(
        codes=small / "codes", data=None, gpt=None, steps=5, save_every=5, more=[], nproc=2
    )
    run.measure(run.read("rar"), "", 0, tmp_path / "run" / "scripts", args)
    (words,) = started
    assert words[0] == "train_gpt.py" and ("--resume" in words) == resumed


def test_tuning_starts_from_the_model_that_its_baseline_samples_from(small, monkeypatch):
    """Both are judged without guidance and with it."""
    started, found = [], []

    def note(scripts, words, nproc=1):
        started.append([str(word) for word in words])
        return json.dumps({"accuracy": 0.1 * len(started), "distance": len(started)}), 1.0

    monkeypatch.setattr(run, "call", note)
    monkeypatch.setattr(run, "log", lambda *_: {"val_loss": 1.0})
    where = {"codes": "codes", "data": "shapes:20", "gpt": "first.pt", "vq": "vq.pt", "net": "net"}
    args = SimpleNamespace(**where, steps=5, save_every=5, more=[], nproc=1, resize=24)
    idea = run.read("cca")
    for what, variant in ((run.baseline_of(idea), ""), (idea, "--lr 1e-4")):
        started.clear()
        found.append(run.measure(what, variant, 0, small / "run" / "scripts", args))
        samples = [words for words in started if words[0] == "sample.py"]
        sampled_from = [words[words.index("--gpt") + 1] for words in samples]
        trained = what is idea
        assert set(sampled_from) == {str(small / "run/out/ckpt.pt") if trained else "first.pt"}
        assert [words[-2:] == ["--cfg-scale", "1"] for words in samples] == [True, False]
        trainings = [words for words in started if words[0] == "train_gpt.py"]
        assert len(trainings) == trained
        assert all(words[-4:] == ["--init", "first.pt", "--lr", "1e-4"] for words in trainings)
    assert found[0] == {
        **{"accuracy": 0.2, "distance": 2},
        **{"accuracy_guided": 0.4, "distance_guided": 4},
    }


def test_samples_are_judged_by_a_network_of_their_own_data_and_size(small, tmp_path, monkeypatch):
    """And those of another size are other runs; 32 pixels are what the rows of results.json were
    measured at."""
    found = []

    def note(idea, args):
        found.append((args.net, run.key_of(idea, "", 0, args)))

    monkeypatch.setattr(run, "measure_all", note)
    for data, size in (("shapes:20", 32), ("shapes:20", 32), ("shapes:30", 32), ("shapes:20", 64)):
        words = (
            f"run.py guidance --gpt {small}/vq.pt --vq {small}/vq.pt --data {data} "
            f"--resize {size} --out {tmp_path}"
        )
        monkeypatch.setattr(sys, "argv", words.split())
        run.main()
    nets, keys = zip(*found)
    assert nets[0] == nets[1] and len(set(nets)) == 3 and {net.parent for net in nets} == {tmp_path}
    assert keys[0] == keys[1] != keys[3] and keys[0]["data"] == run.digest(
        [str(small / "vq.pt")] * 2
    )


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("", "give --changes or one of these names: adaln"),
        ("rar --changes", "give --changes or one of these names: adaln"),
        ("rarr", "no ablation is called 'rarr'; there are: adaln, averaged_weights"),
        ("rar", "rar needs --codes"),
        ("rar --codes nowhere", "--codes nowhere: no such file or folder"),
        ("fsq --data shapes:20", "fsq needs --test"),
        ("guidance --gpt nowhere.pt", "--gpt nowhere.pt: no such file or folder"),
        ("rar --codes CODES --steps 0", "argument --steps: 0 is not a whole number from 1"),
        ("rar --codes CODES --seeds 0", "argument --seeds: 0 is not a whole number from 1"),
        ("--table --results nowhere.json", "--results nowhere.json: no such file"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_is_trained(words, sentence, small, tmp_path):
    words = words.replace("CODES", str(small / "codes"))
    code, text = ablate(f"{words} --out {tmp_path}/out")
    assert code == 2 and sentence in text.splitlines()[-1] and "> train" not in text


def test_codes_that_do_not_fit_are_refused(small, tmp_path):
    folder = tmp_path / "codes"
    shutil.copytree(small / "codes", folder)
    np.save(folder / "codes.npy", np.load(folder / "codes.npy")[:40])
    np.save(folder / "labels.npy", np.load(folder / "labels.npy")[:40])
    code, text = ablate(f"rar --codes {folder} --out {tmp_path}/out")
    assert code == 2 and "more than 1000 are needed" in text.splitlines()[-1]
    other = torch.load(small / "vq.pt")
    other["model"]["quantize.embedding.weight"] += 1
    torch.save(other, tmp_path / "other.pt")
    code, text = ablate(
        f"maskgit --codes {small}/codes --vq {tmp_path}/other.pt --data shapes:20 "
        f"--out {tmp_path}/out"
    )
    assert code == 2 and "is not the tokenizer that made --codes" in text.splitlines()[-1]


def test_a_diff_that_does_not_apply_names_the_file_and_the_hunk(tmp_path):
    text = run.names()["qk_norm"].read_text()
    text = text.replace("self.wo = nn.Linear", "self.other = nn.Linear")
    (tmp_path / "old.diff").write_text(text)
    sentence = r"old.diff does not apply: the hunk at line \d+ of gpt.py"
    with pytest.raises(ValueError, match=sentence):
        run.changed_scripts(tmp_path / "old.diff", tmp_path / "scripts")


def test_differences_are_paired_by_seed_and_called_by_their_error():
    same = {"stage": "gpt", "steps": 5, "more": "", "data": "x", "flags": "", "seconds": 1}
    rows = []
    for name, loss, off in (("baseline", 4.0, 0), ("rar", 4.5, 0.1)):
        for seed in range(2):
            row = {"ablation": name, "seed": seed, "val_loss": loss + seed + off * seed % 2}
            rows.append({**same, **row})
    deviation, freedom = compare.spread(rows, [run.read("rar")])["gpt", "val_loss"]
    assert freedom == 1
    assert abs(deviation - 0.1 / 2**0.5) < 1e-9  # the seeds' own distance of 1 is not in it
    (line,) = table.lines_of(rows, run.read("rar"), {("gpt", "val_loss"): (0.01, 9)})
    assert "+0.5500 ± 0.0500 |  |  |  |  | 2 | higher: agrees" in line  # rows that say no costs
    assert compare.verdict("lower", 0.5, 0.01, 9) == "higher: does not agree"
    assert compare.verdict("lower", 0.5, 0.3, 9) == "cannot be seen at this size"
    two_seeds = compare.verdict("same", 0.5, 0.1, 1)
    assert two_seeds == "agrees: no difference to be seen"
    a, b, r = table.power_law([1e5, 1e6, 1e7], [8.0, 4.0, 2.0])
    assert abs(b - np.log10(0.5)) < 1e-9 and abs(r + 1) < 1e-9


def test_the_readme_holds_what_was_measured_and_the_pictures_can_be_drawn(tmp_path):
    rows = json.loads((ROOT / "ablations" / "results.json").read_text())
    ideas = [run.read(name) for name in run.names()]

    def without_counts(text):  # how many lines a diff changes moves with the scripts
        return re.sub(r"\+\d+ -\d+", "", text)

    readme = without_counts((ROOT / "ablations" / "README.md").read_text())
    scatter = table.spread(rows, ideas)
    for idea in ideas:
        lines = without_counts("\n".join(table.lines_of(rows, idea, scatter)))
        assert lines in readme, f"{idea['name']}: python ablations/run.py --table"
    loss = ("loss", False, [("a", 0.1, 0.01), ("b", -0.2, 0.0)])
    table.bars([loss, ("PSNR", True, [("c", 1.0, 0.1)])], tmp_path / "bars.png")
    table.scaling([(1e5, 5.0), (1e6, 4.5), (1e7, 4.1)], tmp_path / "fit.png")
    cells = [(scale, k, scale * k, 1 / scale) for scale in (1, 2) for k in (0, 64)]
    table.guidance(cells, tmp_path / "guidance.png")
    sizes = [Image.open(tmp_path / f"{name}.png").size for name in ("bars", "fit", "guidance")]
    assert sizes == [(1120, 120), (640, 400), (1120, 420)]


# ---- the speedrun --------------------------------------------------------------------------------
@pytest.fixture
def race(tmp_path, monkeypatch):
    """A speedrun of its own with one record, `0_mine.txt`; `started` lists the trainings."""
    shutil.copytree(speedrun.CODES, tmp_path / "race" / "codes")
    monkeypatch.setattr(speedrun, "HERE", tmp_path / "race")
    monkeypatch.setattr(speedrun, "CODES", tmp_path / "race" / "codes")
    monkeypatch.chdir(tmp_path)
    started = []
    monkeypatch.setattr(run, "call", lambda scripts, words: started.append(words))
    monkeypatch.setattr(run, "log", lambda out: {"val_loss": 2.0, "parameters": 1})
    (tmp_path / "race.md").write_text("<!-- table -->\n<!-- /table -->\n")

    def start(flags):
        (tmp_path / "race" / "0_mine.txt").write_text(f"mine\n\nstage: gpt\nflags: {flags}\n")
        monkeypatch.setattr(sys, "argv", ["speedrun.py"])
        speedrun.main()

    return SimpleNamespace(run=start, started=started, folder=tmp_path / "race")


def test_a_record_takes_the_whole_budget_and_not_a_step_more(race, capsys):
    with pytest.raises(SystemExit) as stop:
        race.run("--model demo --batch-size 32 --max-steps 355")
    said = "0_mine.txt: 4.008e+12 operations are more than the budget of 4e+12"
    assert stop.value.code == 2 and said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        race.run("--model demo --max-steps 1")  # a batch that the recipe decides
    assert not race.started
    race.run("--model demo --batch-size 32 --max-steps 354 --val-images 9 --codes else --seed 7")
    assert len(race.started) == 3
    for seed, words in enumerate(race.started):  # of a flag that comes twice, the last one counts
        last = dict(zip(words[1::2], words[2::2]))
        assert (last["--val-images"], last["--codes"], last["--seed"]) == (
            "1000",
            speedrun.CODES,
            seed,
        )
    assert "| 11,328 |" in (race.folder.parent / "race.md").read_text()


def test_codes_that_differ_in_one_code_are_refused(race, capsys):
    codes = np.load(race.folder / "codes" / "codes.npy")
    codes[5, 0, 3] ^= 1
    np.save(race.folder / "codes" / "codes.npy", codes)
    with pytest.raises(SystemExit) as stop:
        race.run("--model demo --batch-size 32 --max-steps 1")
    assert stop.value.code == 2 and not race.started
    assert "codes was changed; take it back with git checkout" in capsys.readouterr().err


def test_a_record_is_lower_than_the_last_one_by_more_than_two_standard_errors():
    last = [2.0, 2.1, 2.2]  # a standard error of 0.058; that of two such differences is 0.082
    assert speedrun.against(last, [1.8, 1.9, 2.0]) == ("-0.2000 ± 0.0816", "yes")
    assert speedrun.against(last, [1.85, 1.95, 2.05]) == ("-0.1500 ± 0.0816", "no")
    assert speedrun.against(last, [2.2, 2.3, 2.4]) == ("+0.2000 ± 0.0816", "no")


def test_every_record_of_the_page_was_measured_and_its_diffs_still_apply(monkeypatch, tmp_path):
    monkeypatch.setattr(speedrun, "measure", None)  # all rows are there
    found = speedrun.measure_all(speedrun.HERE / "results.json")
    page = speedrun.HERE.with_suffix(".md").read_text()
    assert "\n".join(speedrun.lines_of(found)) in page, "python ablations/speedrun.py"
    ideas.changed_scripts(None, tmp_path)
    for path in found[-1]["diffs"]:
        ideas.apply(path, tmp_path)
    for record in found:
        assert {"title", "idea", "source"} <= record.keys()
        assert all(
            0.99 * speedrun.BUDGET < r["operations"] <= speedrun.BUDGET for r in record["rows"]
        )
