"""What train_vq.py promises: the reference's losses, and runs that resume exactly."""

import argparse
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import torch
from conftest import (
    GOLDEN,
    LPIPS,
    PATCHGAN,
    ROOT,
    difference,
    fill,
    golden,
    released_keys,
    with_epsilon,
    with_swapped_kernels,
    words,
)
from PIL import Image
from test_data import folder

import train_vq
import vq
from nanollamagen import data, files, flags, lpips, runs


def test_lpips_gives_the_reference_distance_and_gradient():
    expected, _ = golden("lpips/lpips")
    net, vgg = lpips.LPIPS(), {}
    for key, value in net.features.state_dict().items():
        x = np.random.RandomState(zlib.crc32(f"features.{key}".encode())).standard_normal(
            value.shape
        )
        scale = 0.02 if key.endswith("bias") else 1.4 / value[0].numel() ** 0.5
        vgg[f"features.{key}"] = torch.from_numpy(x.astype(np.float32) * scale)
    net.load(vgg, files.read_checkpoint(GOLDEN / "lpips" / "vgg_lin.pth"))
    image1 = expected["image1"].double().requires_grad_()
    distance = net(expected["image0"], expected["image1"])
    assert difference(distance, expected["distance"]) < LPIPS
    assert torch.equal(net(expected["image0"], expected["image0"]), expected["distance_same"])
    # One ReLU or max-pool decision lay within rounding of a tie when the file was recorded: 705 of
    # 24,576 entries, one receptive field, differ from float64 results. All others must fit. In
    # float32 the instruction set would decide such ties.
    net = net.double()
    net(expected["image0"].double(), image1).sum().backward()
    off = (image1.grad - expected["grad_image1"]).abs() > 1e-4 * expected["grad_image1"].abs().max()
    assert off.sum() < 750
    with_swapped_kernels(net)
    assert difference(net(expected["image0"].double(), image1), expected["distance"]) > 100 * LPIPS


def test_the_discriminator_is_the_reference_one():
    expected, _ = golden("patchgan")
    keys, parameters = released_keys("PatchGAN")
    model = fill(train_vq.PatchGAN())
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == keys
    assert sum(p.numel() for p in model.parameters()) == parameters
    with torch.no_grad():
        image = expected["case0_image"]
        assert difference(model.eval()(image), expected["case0_eval"]) < PATCHGAN
        assert difference(model.train()(image), expected["case0_train"]) < PATCHGAN
        assert (
            difference(model.eval()(image), expected["case0_eval_after_one_train_pass"]) < PATCHGAN
        )
    for key, value in model.state_dict().items():
        if "running" in key:
            assert difference(value, expected[f"case0_{key}"]) < PATCHGAN


@torch.no_grad()
def test_the_discriminators_bound_tells_mistakes():
    expected, _ = golden("patchgan")
    image, scores = expected["case0_image"], expected["case0_train"]
    model = with_epsilon(fill(train_vq.PatchGAN()), torch.nn.BatchNorm2d, 1e-6)
    assert difference(model(image), scores) > 3 * PATCHGAN
    assert difference(with_swapped_kernels(fill(train_vq.PatchGAN()))(image), scores) > PATCHGAN


def flags_for(data, out, *flags):
    """The flags of a small and quick run."""
    small = (
        "--model VQ-demo --image-size 24 --batch-size 4 --lpips-weight 0 --log-every 1 --lr 1e-3"
    )
    more = " ".join(map(str, flags))
    return words(f"--data {data} --out {out} {small} --device cpu {more}")


def train(monkeypatch, *args):
    """One run within this process."""
    monkeypatch.setattr(sys, "argv", ["train_vq.py", *flags_for(*args)])
    train_vq.main()


def refused(monkeypatch, capsys, *args):
    """The error with which a run ends at once, with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        train(monkeypatch, *args)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out, name):
    return [line[name] for line in log(out)]


def same(a, b):
    """Whether two nested checkpoints hold equal tensors and values."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return all(map(same, a, b)) if isinstance(a, list) else a == b


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of three steps: with a discriminator, which learned, and an average."""
    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        train(patch, "shapes:30", out, "--disc-start 1 --max-steps 3 --ema-decay 0.9")
    return out


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    """Tokenizer, discriminator, both optimizers and the average: equal to the last bit."""
    recipe = "--disc-start 3 --schedule cosine --warmup-steps 3 --ema-decay 0.9 --micro-batch 2"
    recipe += " --max-steps 7 --save-every 4"
    train(monkeypatch, "shapes:30", tmp_path / "whole", recipe)
    save = files.save_checkpoint

    def killed_after_saving(state, path):
        save(state, path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "save_checkpoint", killed_after_saving)
        with pytest.raises(KeyboardInterrupt):
            train(patch, "shapes:30", tmp_path / "cut", recipe)
    train(monkeypatch, "shapes:30", tmp_path / "cut", recipe, "--resume")
    one, two = (files.read_checkpoint(tmp_path / name / "ckpt.pt") for name in ("whole", "cut"))
    assert one["step"] == 7 and not same(one["model"], one["ema"])
    for part in one.keys() - {"args"}:
        assert same(one[part], two[part]), part
    lines = [log(tmp_path / name) for name in ("whole", "cut")]
    for line in lines[0] + lines[1]:
        del line["img_per_s"]
    assert lines[0] == lines[1]
    assert {"disc", "adv"} <= lines[0][-1].keys() and "disc" not in lines[0][2]


def test_fine_tuning_starts_from_the_weights_of_another_run_and_its_discriminator(
    finished, tmp_path, monkeypatch, capsys
):
    """A learning rate of 0 changes nothing, so what is saved after a step is what it started
    from."""
    monkeypatch.setattr(train_vq, "learning_rate", lambda *_: 0.0)
    one_step = "--disc-start 0 --max-steps 1"
    init = f"--init {finished}/ckpt.pt"
    train(monkeypatch, "shapes:8", tmp_path / "tuned", one_step, init)
    assert "ckpt.pt and its discriminator" in capsys.readouterr().out
    first, tuned = (
        files.read_checkpoint(run / "ckpt.pt") for run in (finished, tmp_path / "tuned")
    )
    for name in first["ema"].keys() - {"quantize.codebook_used"}:
        assert torch.equal(tuned["model"][name], first["ema"][name])  # averages, as for sampling
    for name, value in first["disc"].items():
        if name.endswith(("weight", "bias")):
            assert torch.equal(value, tuned["disc"][name])
    assert "adv" in log(tmp_path / "tuned")[0] and tuned["step"] == 1

    torch.save({"model": first["model"], "config": first["config"]}, tmp_path / "bare.pt")
    init = f"--init {tmp_path}/bare.pt"
    train(monkeypatch, "shapes:8", tmp_path / "new", one_step, init)
    assert "bare.pt; the discriminator is new" in capsys.readouterr().out
    error = refused(monkeypatch, capsys, "shapes:8", tmp_path / "run", init, "--codebook-size 99")
    assert "bare.pt does not fit --model VQ-demo" in error and "'codebook_size': 256" in error


def test_another_tokenizer_and_another_codebook_can_be_trained(tmp_path, monkeypatch):
    """train_vq.main takes a class that derives from VQModel, with sizes of its own."""

    class Other(vq.VQModel):
        config_class = type("OtherConfig", (vq.VQConfig,), {})

    small = Other.config_class(ch=32, ch_mult=(1, 1), res_blocks=1, z_channels=32, codebook_size=64)
    args = flags_for("shapes:8", tmp_path, "--max-steps 1 --code-dim 3 --codebook-size 7")
    args[args.index("--model") + 1] = "small"
    monkeypatch.setattr(sys, "argv", ["train_vq.py", *args])
    train_vq.main(tokenizer=Other, configs={"small": small})
    model = vq.load_vq(tmp_path / "ckpt.pt", tokenizer=Other)
    assert type(model) is Other and type(model.config) is Other.config_class
    assert model.quantize.embedding.weight.shape == (7, 3)


def test_micro_batches_and_two_processes_give_the_losses_of_one_batch(tmp_path, monkeypatch):
    """Without the discriminator, whose batch statistics are those of a micro-batch."""
    steps, sizes, forward = "--max-steps 10", [], vq.VQModel.forward
    train(monkeypatch, "shapes:30", tmp_path / "one", steps)
    with monkeypatch.context() as patch:
        patch.setattr(
            vq.VQModel, "forward", lambda self, x: sizes.append(len(x)) or forward(self, x)
        )
        train(patch, "shapes:30", tmp_path / "micro", steps, "--micro-batch 2")
    assert sizes == 20 * [2]  # of the four images of a step
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run(
        [*torchrun, "train_vq.py", *flags_for("shapes:30", tmp_path / "two", steps)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    for term in ("rec", "vq", "commit", "norm"):
        whole = losses(tmp_path / "one", term)
        for name in ("micro", "two"):
            parts = losses(tmp_path / name, term)
            assert parts[:3] == pytest.approx(whole[:3], rel=1e-3), (name, term)
            if term != "norm":  # codes that flip by rounding move the losses a little
                assert parts == pytest.approx(whole, rel=2e-2), (name, term)
    rec = losses(tmp_path / "one", "rec")
    assert rec[-1] < 0.9 * rec[0]  # so that there was something to differ


def test_the_discriminator_judges_micro_batches_and_its_loss_has_its_weight(tmp_path, monkeypatch):
    """A learning rate of 0 leaves the first weights in the checkpoint, so its two losses can be
    computed from there."""
    monkeypatch.setattr(train_vq, "learning_rate", lambda *_: 0.0)
    weighted = "--disc-start 0 --disc-weight 0.25 --micro-batch 2 --max-steps 1"
    train(monkeypatch, "shapes:8", tmp_path / "run", weighted)
    saved = files.read_checkpoint(tmp_path / "run" / "ckpt.pt")
    disc, model = train_vq.PatchGAN().train(), vq.load_vq(tmp_path / "run" / "ckpt.pt")
    disc.load_state_dict(saved["disc"])
    args = argparse.Namespace(batch_size=4, image_size=24, seed=0, workers=0)
    images = data.open_images("shapes:8")
    x = next(train_vq.load_batches(images, args, 0, 0, 1, torch.device("cpu")))

    @torch.no_grad()
    def expected(parts):
        disc_loss = adv = 0
        for real in parts:
            fake = model(real)[0]
            disc_loss += 0.25 * train_vq.hinge(disc(real), disc(fake)) / len(parts)
            adv -= 0.25 * disc(fake).mean() / len(parts)
        return [float(disc_loss), float(adv)]

    line = log(tmp_path / "run")[0]
    assert [line["disc"], line["adv"]] == pytest.approx(expected(x.split(2)), rel=1e-3)
    assert [line["disc"], line["adv"]] != pytest.approx(expected([x]), rel=1e-3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_finishes_the_step_saves_and_exits_0(tmp_path, number):
    """It goes to the whole process group, as torchrun sends it: to the loader's workers too."""
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "train_vq.py", *flags_for("shapes:30", out, "--workers 2")],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (out / "log.jsonl").exists() or len(log(out)) < 3:  # both workers have begun
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.killpg(process.pid, number)
    text, errors = process.communicate(timeout=60)
    step = log(out)[-1]["step"]
    assert process.returncode == 0, errors
    assert f"stopped as asked; saved at step {step}. --resume continues" in text
    assert files.read_checkpoint(out / "ckpt.pt")["step"] == step


def test_an_error_ends_a_run_whose_workers_read_ahead(tmp_path):
    """They ignore a signal that is for the run, but must end with it: with torchrun the other
    processes would wait."""
    script = """if True:
        import train_vq
        from nanollamagen import runs
        def fails(*_):
            raise RuntimeError("a GPU is out of memory")
        runs.status = fails
        train_vq.main()
        """
    process = subprocess.Popen(
        [sys.executable, "-c", script, *flags_for("shapes:30", tmp_path / "run", "--workers 2")],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert "a GPU is out of memory" in process.communicate(timeout=30)[1]
        assert process.returncode == 1
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_old_checkpoints_are_kept_as_asked_and_steps_after_the_last_come_again(
    tmp_path, monkeypatch
):
    out, keep = tmp_path / "run", "--save-every 2 --keep 1"
    train(monkeypatch, "shapes:8", out, keep, "--max-steps 5")
    assert sorted(path.name for path in out.glob("*_*")) == [
        "ckpt_00000004.pt",
        "ckpt_00000005.pt",
        "recon_000002.png",
        "recon_000004.png",
        "recon_000005.png",
    ]
    assert files.read_checkpoint(out / "ckpt_00000004.pt")["step"] == 4
    os.replace(out / "ckpt_00000004.pt", out / "ckpt.pt")
    train(monkeypatch, "shapes:8", out, keep, "--max-steps 6 --resume")
    assert losses(out, "step") == [1, 2, 3, 4, 5, 6]


def test_the_weight_decay_given_at_resume_is_the_one_that_counts(finished, tmp_path, monkeypatch):
    """Each of two runs continues from the same step; the next one differs by what decays, of every
    weight alike."""
    name, weights = "encoder.conv_in.weight", []
    for decay in (0, 10):
        out = tmp_path / str(decay)
        shutil.copytree(finished, out)
        more = f"--max-steps 4 --resume --lr 0.01 --weight-decay {decay} --disc-weight 0"
        train(monkeypatch, "shapes:30", out, more)
        weights.append(files.read_checkpoint(out / "ckpt.pt")["model"][name])
    first = files.read_checkpoint(finished / "ckpt.pt")["model"][name]
    assert difference(weights[0] - weights[1], 0.1 * first) < 1e-4


def test_averages_that_start_at_a_resume_start_from_the_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(train_vq, "learning_rate", lambda *_: 0.0)
    train(monkeypatch, "shapes:8", tmp_path, "--max-steps 1")
    train(monkeypatch, "shapes:8", tmp_path, "--max-steps 2 --resume --ema-decay 0.9")
    saved = files.read_checkpoint(tmp_path / "ckpt.pt")
    for name in saved["ema"].keys() - {"quantize.codebook_used"}:
        assert torch.equal(saved["ema"][name], saved["model"][name])


def test_a_run_is_neither_overwritten_nor_continued_as_another(finished, monkeypatch, capsys):
    before = (finished / "ckpt.pt").read_bytes()
    for more, sentence in (
        ("", "add --resume to continue it"),
        ("--resume --codebook-size 99", "ckpt.pt is of another model or other data (codebook_size"),
    ):
        assert sentence in refused(monkeypatch, capsys, "shapes:30", finished, more)
    assert (finished / "ckpt.pt").read_bytes() == before


def test_a_machine_without_a_compiler_trains_without_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    train(monkeypatch, "shapes:8", tmp_path / "run", "--max-steps 1 --compile")
    assert "not compiled: torch.compile needs" in capsys.readouterr().err
    assert len(log(tmp_path / "run")) == 1


def test_an_example_that_cannot_be_read_is_left_out_of_the_picture(tmp_path, monkeypatch, capsys):
    root = folder(tmp_path / "data", classes=("ant", "bee"), each=2)
    (root / "ant" / "0.png").write_bytes(b"broken")
    train(monkeypatch, root, tmp_path / "run", "--max-steps 1")
    with Image.open(tmp_path / "run" / "recon_000001.png") as sheet:
        # three of four images; 24 pixels are enlarged four times
        assert sheet.size == (3 * 100 + 4, 2 * 100 + 4)
    for path in root.rglob("*.png"):
        path.write_bytes(b"broken")
    error = refused(monkeypatch, capsys, root, tmp_path / "other", "--max-steps 1")
    assert "none of the images tried can be read" in error


def test_training_takes_another_image_for_an_unreadable_one_and_says_so_once(
    tmp_path, monkeypatch, capsys
):
    root = folder(tmp_path / "data")
    (root / "ant" / "0.png").write_bytes(b"broken")
    train(monkeypatch, root, tmp_path / "run", "--max-steps 6")
    assert capsys.readouterr().err.count("ant/0.png") == 1
    assert len(log(tmp_path / "run")) == 6


FROM_1 = words("--image-size --codebook-size --code-dim --batch-size --micro-batch --max-steps")
FROM_1 += words("--log-every --save-every")
FROM_0 = words("--warmup-steps --disc-start --keep --seed --workers")
ABOVE_0 = words("--epochs --lr")
WEIGHTS = words("--weight-decay --lpips-weight --disc-weight")
HUGE = str(10**30)
MISTAKES = [
    *((flag, value, "not a whole number from 1 to") for flag in FROM_1 for value in ("0", "-1")),
    *((flag, "-1", "not a whole number from 0 to") for flag in FROM_0),
    *((f, value, "not a whole number from") for f in FROM_1 + FROM_0 for value in ("nan", HUGE)),
    *((f, value, "not a number from") for f in ABOVE_0 for value in ("0", "-1", "nan", "inf")),
    *((flag, value, "not a number from 0") for flag in WEIGHTS for value in ("-1", "nan", "inf")),
    *(("--ema-decay", value, "from 0 to 1") for value in ("-0.1", "nan", "1.1")),
    ("--image-size", "26", "26 is not a multiple of the downsampling 4; try --image-size 24"),
    ("--image-size", "16", "the discriminator needs 24 pixels; --disc-weight 0 trains without it"),
    ("--micro-batch", "3", "--micro-batch 3 does not divide the 4 images"),
    ("--lpips-weight", "1", "Or train without it: --lpips-weight 0"),
    ("--device", "gpu", "argument --device: gpu is none of cuda, mps, cpu"),
    ("--device", "cuda:99", "argument --device: cuda:99: torch sees"),
    ("--data", "nowhere", "--data nowhere: no such file or folder"),
    ("--data", "FILE", "file holds 0 images"),
    ("--data", "EMPTY", "empty holds 0 images"),
    ("--data", "shapes:0", "--data shapes:0: no such file or folder"),
    ("--data", "shapes:-1", "--data shapes:-1: no such file or folder"),
    ("--init", "nowhere.pt", "nowhere.pt: No such file or directory"),
    ("--init", "EMPTY", "empty: Is a directory"),
    ("--init", "FILE", "file is truncated, or not a PyTorch checkpoint"),
    ("--init", "GPT", "gpt.pt is not a tokenizer checkpoint"),
    ("--out", "FILE", "file: no folder can be made there"),
    ("--out", "FILE/run", "file/run: no folder can be made there"),
    ("--out", "/proc/run", "--out /proc/run: no folder can be made there"),
    ("--out", "BROKEN", "ckpt.pt is truncated, or not a PyTorch checkpoint"),
    ("--out", "RUN --resume", "run has no ckpt.pt"),
]


@pytest.mark.parametrize(
    "flag, value, sentence", MISTAKES, ids=[f"{flag}={value}" for flag, value, _ in MISTAKES]
)
def test_a_mistake_gets_one_sentence(
    tmp_path, tmp_path_factory, monkeypatch, capsys, flag, value, sentence
):
    """Nothing is written. FILE, EMPTY, GPT and BROKEN are an empty file, an empty folder, a GPT's
    checkpoint and a run with a damaged checkpoint; RUN is not there."""
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "ckpt.pt").write_text("not a checkpoint")
    model = {"tok_embeddings.weight": torch.zeros(1)}
    torch.save({"model": model, "config": {"dim": 1}}, tmp_path / "gpt.pt")
    places = {"FILE": "file", "EMPTY": "empty", "GPT": "gpt.pt", "BROKEN": "broken", "RUN": "run"}
    for name, place in places.items():
        value = value.replace(name, str(tmp_path / place))

    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setenv("NANOLLAMAGEN_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(files.urllib.request, "urlopen", offline)
    before = sorted(tmp_path.rglob("*"))
    more = ("--max-steps 1", flag, value)
    error = refused(monkeypatch, capsys, "shapes:8", tmp_path / "run", *more)
    assert "error: " in error and sentence in error
    assert sorted(tmp_path.rglob("*")) == before


def test_the_largest_seed_is_a_seed(tmp_path, monkeypatch):
    train(monkeypatch, "shapes:8", tmp_path / "run", "--max-steps 1 --seed", 2**63 - 1)
    assert len(log(tmp_path / "run")) == 1


def test_a_gpu_that_is_not_there_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    on_gpu = ("shapes:8", tmp_path / "run", "--device cuda")
    error = refused(monkeypatch, capsys, *on_gpu)
    assert "argument --device: cuda: torch sees 0 GPUs here" in error
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")  # the third process of a torchrun
    assert "cuda: torch sees 2 GPUs here" in refused(monkeypatch, capsys, *on_gpu)
    monkeypatch.setenv("LOCAL_RANK", "1")
    for name, expected in (("cuda", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cpu")):
        assert flags.device(name, ("cuda", "cpu")) == expected


def test_missing_lpips_files_are_named(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setenv("NANOLLAMAGEN_CACHE", str(tmp_path))
    monkeypatch.setattr(files.urllib.request, "urlopen", offline)
    names = "vgg16-397923af.pth and lpips_vgg_lin.pth in "
    with pytest.raises(OSError, match=names + str(tmp_path)):
        lpips.load()


@pytest.mark.parametrize(
    "module, name, value",
    [
        (vq.VQModel, "latents", lambda model, x: model.quant_conv(model.encoder(x)) * torch.nan),
        (
            train_vq,
            "hinge",
            lambda real, fake: torch.nan * real.mean(),
        ),  # the discriminator's alone
    ],
    ids=["tokenizer", "discriminator"],
)
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    finished, tmp_path, monkeypatch, capsys, module, name, value
):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    good = (out / "ckpt.pt").read_bytes()
    monkeypatch.setattr(module, name, value)
    more = "--disc-start 0 --save-every 1 --max-steps 5 --resume"
    assert "from the last checkpoint) at step 4" in refused(
        monkeypatch, capsys, "shapes:30", out, more
    )
    assert (out / "ckpt.pt").read_bytes() == good


def test_a_full_disk_ends_the_run_with_one_sentence(tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:  # a checkpoint
        patch.setattr(files, "save_checkpoint", full)
        error = refused(patch, capsys, "shapes:8", tmp_path / "one", "--max-steps 1")
    assert error == "train_vq.py: [Errno 28] No space left on device"
    monkeypatch.setattr(runs.Log, "write", full)  # the log
    args = flags_for("shapes:8", tmp_path / "two", "--max-steps 1")
    monkeypatch.setattr(sys, "argv", ["train_vq.py", *args])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "train_vq.py"), run_name="__main__")
    expected = "train_vq.py: [Errno 28] No space left on device; the last checkpoint is untouched"
    assert stop.value.code == expected
