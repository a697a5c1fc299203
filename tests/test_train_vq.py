"""What train_vq.py promises: the reference's losses, and runs that resume exactly."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
import types
import zlib

import numpy as np
import pytest
import torch
from conftest import GOLDEN, ROOT, difference, fill, golden, released_keys
from PIL import Image

import train_vq
import vq
from nanollamagen import data, lpips, runs


def test_lpips_gives_the_reference_distance_and_gradient():
    expected, _ = golden("lpips/lpips")
    net, vgg = lpips.LPIPS(), {}
    for key, value in net.features.state_dict().items():
        x = np.random.RandomState(zlib.crc32(f"features.{key}".encode())).standard_normal(
            value.shape
        )
        scale = 0.02 if key.endswith("bias") else 1.4 / value[0].numel() ** 0.5
        vgg[f"features.{key}"] = torch.from_numpy(x.astype(np.float32) * scale)
    net.load(vgg, data.read_checkpoint(GOLDEN / "lpips" / "vgg_lin.pth"))
    image1 = expected["image1"].requires_grad_()
    distance = net(expected["image0"], image1)
    assert difference(distance.detach(), expected["distance"]) < 1e-4
    distance.sum().backward()
    # One ReLU or max-pool decision lay within rounding of a tie when the file was recorded: 705 of
    # 24,576 entries, one receptive field, differ from float32 and float64 results here alike. All
    # others must fit.
    off = (image1.grad - expected["grad_image1"]).abs() > 1e-4 * expected["grad_image1"].abs().max()
    assert off.sum() < 750
    assert torch.equal(net(expected["image0"], expected["image0"]), expected["distance_same"])


def test_the_discriminator_is_the_reference_one():
    expected, _ = golden("patchgan")
    keys, parameters = released_keys("PatchGAN")
    model = fill(train_vq.PatchGAN())
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == keys
    assert sum(p.numel() for p in model.parameters()) == parameters
    with torch.no_grad():
        image = expected["case0_image"]
        assert difference(model.eval()(image), expected["case0_eval"]) < 1e-4
        assert difference(model.train()(image), expected["case0_train"]) < 1e-4
        assert difference(model.eval()(image), expected["case0_eval_after_one_train_pass"]) < 1e-4
    for key, value in model.state_dict().items():
        if "running" in key:
            assert difference(value, expected[f"case0_{key}"]) < 1e-4


def flags_for(data, out, *flags):
    """The flags of a small and quick run."""
    return [
        str(f)
        for f in (
            "--data",
            data,
            "--out",
            out,
            "--model",
            "VQ-demo",
            "--image-size",
            24,
            "--batch-size",
            4,
            "--lpips-weight",
            0,
            "--log-every",
            1,
            "--lr",
            1e-3,
            "--device",
            "cpu",
            *flags,
        )
    ]


def train(monkeypatch, *args):
    """One run within this process."""
    monkeypatch.setattr(sys, "argv", ["train_vq.py", *flags_for(*args)])
    train_vq.main()


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def same(a, b):
    """Whether two nested checkpoints hold equal tensors and values."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return all(map(same, a, b)) if isinstance(a, list) else a == b


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    """Tokenizer, discriminator, both optimizers and the average: equal to the last bit."""
    flags = [
        "--disc-start",
        3,
        "--schedule",
        "cosine",
        "--max-steps",
        7,
        "--save-every",
        4,
        "--entropy-weight",
        0.1,
        "--ema-decay",
        0.9,
    ]
    train(monkeypatch, "shapes:30", tmp_path / "whole", *flags)
    save = data.save_checkpoint

    def killed_after_saving(state, path, keep):
        save(state, path, keep)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data, "save_checkpoint", killed_after_saving)
        with pytest.raises(KeyboardInterrupt):
            train(patch, "shapes:30", tmp_path / "cut", *flags)
    train(monkeypatch, "shapes:30", tmp_path / "cut", *flags, "--resume")
    one, two = (data.read_checkpoint(tmp_path / name / "ckpt.pt") for name in ("whole", "cut"))
    assert one["step"] == 7 and not same(one["model"], one["ema"])
    for part in (
        "model",
        "ema",
        "disc",
        "optimizer",
        "disc_optimizer",
        "step",
        "images_seen",
        "config",
    ):
        assert same(one[part], two[part]), part
    terms = [{k: v for k, v in r.items() if k != "img_per_s"} for r in log(tmp_path / "whole")]
    assert terms == [
        {k: v for k, v in r.items() if k != "img_per_s"} for r in log(tmp_path / "cut")
    ]
    assert "disc" in terms[-1] and "adv" in terms[-1] and "disc" not in terms[2]


def test_fine_tuning_starts_from_the_weights_of_another_run_and_its_discriminator(
    tmp_path, monkeypatch, capsys
):
    """A learning rate of 0 changes nothing, so what is saved after a step is what it started
    from."""
    train(
        monkeypatch,
        "shapes:30",
        tmp_path / "first",
        "--disc-start",
        1,
        "--max-steps",
        3,
        "--sample-every",
        0,
        "--ema-decay",
        0.9,
    )
    train(
        monkeypatch,
        "shapes:8",
        tmp_path / "tuned",
        "--init",
        tmp_path / "first" / "ckpt.pt",
        "--disc-start",
        0,
        "--lr",
        0,
        "--max-steps",
        1,
        "--sample-every",
        0,
    )
    assert "ckpt.pt and its discriminator" in capsys.readouterr().out
    first, tuned = (
        data.read_checkpoint(tmp_path / name / "ckpt.pt") for name in ("first", "tuned")
    )
    names = [k for k in first["ema"] if not k.endswith("codebook_used")]
    assert all(
        torch.equal(tuned["model"][k], first["ema"][k]) for k in names
    )  # averaged weights, as for sampling
    assert all(
        torch.equal(v, tuned["disc"][k])
        for k, v in first["disc"].items()
        if k.endswith(("weight", "bias"))
    )
    assert "adv" in log(tmp_path / "tuned")[0] and tuned["step"] == 1
    torch.save({"model": first["model"], "config": first["config"]}, tmp_path / "bare.pt")
    train(
        monkeypatch,
        "shapes:8",
        tmp_path / "new",
        "--init",
        tmp_path / "bare.pt",
        "--disc-start",
        0,
        "--max-steps",
        1,
    )
    assert "bare.pt, which came without a discriminator: that one is new" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        train(
            monkeypatch,
            "shapes:8",
            tmp_path / "run",
            "--init",
            tmp_path / "first" / "ckpt.pt",
            "--codebook-size",
            99,
        )
    assert stop.value.code == 2 and "--model VQ-demo is not what --init" in capsys.readouterr().err


def test_another_tokenizer_and_another_codebook_can_be_trained(tmp_path, monkeypatch):
    """train_vq.main takes a class that derives from VQModel, with sizes of its own."""

    class Other(vq.VQModel):
        config_class = type("OtherConfig", (vq.VQConfig,), {})

    small = Other.config_class(ch=32, ch_mult=(1, 1), res_blocks=1, z_channels=32, codebook_size=64)
    flags = flags_for("shapes:8", tmp_path, "--max-steps", 1, "--code-dim", 3, "--codebook-size", 7)
    flags[flags.index("--model") + 1] = "small"
    monkeypatch.setattr(sys, "argv", ["train_vq.py", *flags])
    train_vq.main(tokenizer=Other, configs={"small": small})
    model = vq.load_vq(tmp_path / "ckpt.pt", tokenizer=Other)
    assert type(model) is Other and type(model.config) is Other.config_class
    assert model.quantize.embedding.weight.shape == (7, 3)


def test_two_processes_give_the_losses_of_one(tmp_path, monkeypatch):
    """Without the discriminator, whose batch statistics are each process's own."""
    flags = ["--max-steps", 10, "--sample-every", 0]
    train(monkeypatch, "shapes:30", tmp_path / "one", *flags)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run(
        [*torchrun, "train_vq.py", *flags_for("shapes:30", tmp_path / "two", *flags)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    for term in ("rec", "vq", "commit"):
        one, two = ([r[term] for r in log(tmp_path / name)] for name in ("one", "two"))
        assert two == pytest.approx(one, rel=2e-2), (
            term
        )  # codes that flip by rounding move the losses a little
        assert two[:3] == pytest.approx(one[:3], rel=1e-4), term
    assert log(tmp_path / "one")[-1]["rec"] < 0.9 * log(tmp_path / "one")[0]["rec"]


def test_micro_batches_and_repeated_blocks_give_the_losses_of_a_whole_batch(tmp_path, monkeypatch):
    """Without the discriminator, whose batch statistics are those of a micro-batch."""
    flags = ["--max-steps", 4, "--sample-every", 0]
    train(monkeypatch, "shapes:30", tmp_path / "whole", *flags)
    for name, *more in (("micro", "--micro-batch", 1), ("again", "--checkpoint-activations")):
        train(monkeypatch, "shapes:30", tmp_path / name, *flags, *more)
        for term in ("rec", "vq", "commit", "norm"):
            whole, parts = ([r[term] for r in log(tmp_path / run)] for run in ("whole", name))
            assert parts == pytest.approx(whole, rel=1e-3), (name, term)
            assert whole[0] != whole[-1]  # so that a step was there to go wrong
    one, two = (
        data.read_checkpoint(tmp_path / name / "ckpt.pt")["model"] for name in ("whole", "again")
    )
    assert same(one, two)  # computed again, not otherwise
    shapes, forward = [], vq.VQModel.forward
    monkeypatch.setattr(
        vq.VQModel,
        "forward",
        lambda self, x, *rest: shapes.append(len(x)) or forward(self, x, *rest),
    )
    train(monkeypatch, "shapes:8", tmp_path / "watched", "--max-steps", 1, "--micro-batch", 2)
    assert shapes == [2, 2]  # of the four images of a step


def test_the_discriminator_judges_micro_batches_and_its_loss_has_its_weight(tmp_path, monkeypatch):
    """A learning rate of 0 leaves the first weights in the checkpoint, so its two losses can be
    computed from there."""
    train(
        monkeypatch,
        "shapes:8",
        tmp_path / "run",
        "--disc-start",
        0,
        "--disc-weight",
        0.25,
        "--micro-batch",
        2,
        "--lr",
        0,
        "--max-steps",
        1,
        "--sample-every",
        0,
    )
    saved = data.read_checkpoint(tmp_path / "run" / "ckpt.pt")
    disc, model = train_vq.PatchGAN().train(), vq.load_vq(tmp_path / "run" / "ckpt.pt")
    disc.load_state_dict(saved["disc"])
    crops = train_vq.TrainCrops(data.open_images("shapes:8"), 24, 0)
    x = torch.stack([crops[key] for key in next(train_vq.batches(8, 0, 0, 0, 1, 4))])

    def losses(parts):
        with torch.no_grad():
            pairs = [(part, model(part)[0]) for part in parts]
            disc_loss = sum(
                0.25 * train_vq.hinge(disc(real), disc(fake)) for real, fake in pairs
            ) / len(pairs)
            return [
                float(disc_loss),
                float(sum(-0.25 * disc(fake).mean() for _, fake in pairs) / len(pairs)),
            ]

    logged = [log(tmp_path / "run")[0][term] for term in ("disc", "adv")]
    assert logged == pytest.approx(losses(x.split(2)), rel=1e-3)
    assert logged != pytest.approx(losses([x]), rel=1e-3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_finishes_the_step_saves_and_exits_0(tmp_path, number):
    """It goes to the whole process group, as torchrun sends it: to the loader's workers too."""
    command = [
        sys.executable,
        "train_vq.py",
        *flags_for("shapes:30", tmp_path / "run", "--max-steps", 100000, "--workers", 2),
    ]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while (
        not (tmp_path / "run" / "log.jsonl").exists() or len(log(tmp_path / "run")) < 3
    ):  # both workers have begun
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    step = log(tmp_path / "run")[-1]["step"]
    assert (
        process.returncode == 0 and f"asked to stop: saved at step {step}; --resume goes on" in out
    ), err
    assert data.read_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] == step


def test_an_error_ends_a_run_whose_workers_read_ahead(tmp_path):
    """They do not go by a signal that is for the run, but must end with it: with torchrun the
    others would wait."""
    script = """if True:
        import train_vq
        from nanollamagen import runs
        def fails(*_):
            raise RuntimeError("a GPU is out of memory")
        runs.status = fails
        train_vq.main()
        """
    command = [
        sys.executable,
        "-c",
        script,
        *flags_for("shapes:30", tmp_path / "run", "--workers", 2),
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert (
            "a GPU is out of memory" in process.communicate(timeout=30)[1]
            and process.returncode == 1
        )
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_old_checkpoints_are_kept_as_asked_and_steps_after_the_last_come_again(
    tmp_path, monkeypatch
):
    flags = ["--save-every", 2, "--keep", 1, "--sample-every", 0]
    train(monkeypatch, "shapes:8", tmp_path / "run", *flags, "--max-steps", 7)
    names = sorted(path.name for path in (tmp_path / "run").glob("ckpt*"))
    assert names == ["ckpt.pt", "ckpt_00000006.pt", "ckpt_00000007.pt"]
    assert data.read_checkpoint(tmp_path / "run" / names[1])["step"] == 6
    os.replace(tmp_path / "run" / "ckpt_00000006.pt", tmp_path / "run" / "ckpt.pt")
    train(monkeypatch, "shapes:8", tmp_path / "run", *flags, "--max-steps", 8, "--resume")
    assert [r["step"] for r in log(tmp_path / "run")] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_the_weight_decay_given_at_resume_is_the_one_that_counts(tmp_path, monkeypatch):
    """Each of two runs goes on from the same first step; its second differs by what decays, of
    every weight alike."""
    train(monkeypatch, "shapes:8", tmp_path / "plain", "--max-steps", 1, "--sample-every", 0)
    shutil.copytree(tmp_path / "plain", tmp_path / "decayed")
    first = data.read_checkpoint(tmp_path / "plain" / "ckpt.pt")["model"]
    for name, decay in (("plain", 0), ("decayed", 10)):
        train(
            monkeypatch,
            "shapes:8",
            tmp_path / name,
            "--max-steps",
            2,
            "--sample-every",
            0,
            "--resume",
            "--lr",
            0.01,
            "--weight-decay",
            decay,
        )
    plain, decayed = (
        data.read_checkpoint(tmp_path / name / "ckpt.pt")["model"] for name in ("plain", "decayed")
    )
    assert (
        difference(
            plain["encoder.conv_in.weight"] - decayed["encoder.conv_in.weight"],
            0.1 * first["encoder.conv_in.weight"],
        )
        < 1e-4
    )


def test_tensorboard_gets_what_the_log_gets_and_hides_the_steps_that_come_again(
    tmp_path, monkeypatch, capsys
):
    """Through a stand-in for its writer, since the package need not be there."""
    written, purged = [], []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            assert folder == tmp_path / "run"
            purged.append(purge_step)

        def add_scalar(self, name, value, step):
            written.append((step, name, value))

        def flush(self):
            pass

    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter)
    )
    for flags in (["--max-steps", 2], ["--max-steps", 3, "--resume"]):
        train(
            monkeypatch, "shapes:8", tmp_path / "run", "--sample-every", 0, "--tensorboard", *flags
        )
    assert sorted(written) == sorted(
        (r["step"], k, r[k]) for r in log(tmp_path / "run") for k in r if k != "step"
    )
    assert purged == [1, 3]
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard")
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(SystemExit) as stop:
        train(monkeypatch, "shapes:8", tmp_path / "other", "--tensorboard")
    assert (
        stop.value.code == 2
        and "install it with: pip install tensorboard" in capsys.readouterr().err
    )
    assert not (tmp_path / "other").exists()


def test_a_picture_to_watch_that_cannot_be_read_is_left_out(tmp_path, monkeypatch, capsys):
    from test_data import folder

    root = folder(tmp_path / "data", classes=("ant", "bee"), each=2)
    (root / "ant" / "0.png").write_bytes(b"broken")
    train(monkeypatch, root, tmp_path / "run", "--max-steps", 1)
    with Image.open(tmp_path / "run" / "recon_000001.png") as sheet:
        assert sheet.size == (
            3 * 100 + 4,
            2 * 100 + 4,
        )  # three of four, 24 pixels drawn four times as large
    for path in root.rglob("*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(SystemExit) as stop:
        train(monkeypatch, root, tmp_path / "other", "--max-steps", 1)
    assert (
        stop.value.code == 2 and "none of the images tried can be read" in capsys.readouterr().err
    )


def test_training_takes_another_image_for_an_unreadable_one_and_says_so_once(
    tmp_path, monkeypatch, capsys
):
    from test_data import folder

    root = folder(tmp_path / "data")
    (root / "ant" / "0.png").write_bytes(b"broken")
    train(monkeypatch, root, tmp_path / "run", "--max-steps", 6, "--sample-every", 0)
    assert capsys.readouterr().err.count("ant/0.png") == 1
    assert len(log(tmp_path / "run")) == 6


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--data", "nowhere"], "--data nowhere: no such file or folder"),
        (
            ["--image-size", "26"],
            "--image-size 26 is not a multiple of the downsampling 4; try --image-size 24",
        ),
        (["--lpips-weight", "1"], "Or train without it: --lpips-weight 0"),
        (["--resume"], "ckpt.pt: No such file or directory"),
        (["--image-size", "16"], "the discriminator needs 24 pixels"),
    ],
)
def test_a_mistake_gets_one_sentence(tmp_path, monkeypatch, capsys, flags, sentence):
    monkeypatch.setenv("NANOLLAMAGEN_CACHE", str(tmp_path / "cache"))

    def offline(url, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(data.urllib.request, "urlopen", offline)
    with pytest.raises(SystemExit) as stop:
        train(monkeypatch, "shapes:8", tmp_path / "run", "--max-steps", 1, *flags)
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


# what is refused beyond 0 or more, or 1 or more
AT_LEAST_1 = [
    "--image-size",
    "--codebook-size",
    "--code-dim",
    "--batch-size",
    "--micro-batch",
    "--max-steps",
    "--log-every",
]
AT_LEAST_0 = [
    "--warmup-steps",
    "--disc-start",
    "--sample-every",
    "--save-every",
    "--keep",
    "--seed",
    "--workers",
]
ABOVE_0 = ["--epochs", "--grad-clip", "--timeout"]  # and not a number is none of these
WEIGHTS = [
    "--lr",
    "--weight-decay",
    "--ema-decay",
    "--lpips-weight",
    "--disc-weight",
    "--entropy-weight",
]
WRONG = [
    *((flag, value) for flag in AT_LEAST_1 for value in ("0", "-1", "nan", 10**12)),
    *((flag, value) for flag in AT_LEAST_0 for value in ("-1", "nan", 10**12)),
    *((flag, value) for flag in ABOVE_0 for value in ("0", "-1", "nan", "1e12", "inf")),
    *((flag, value) for flag in WEIGHTS for value in ("-1", "nan", "1e12", "inf")),
    ("--ema-decay", "1"),
    ("--device", "gpu"),
    ("--device", "cuda:99"),
    ("--micro-batch", "3"),
    ("--data", "FILE"),
    ("--data", "EMPTY"),
    ("--data", "shapes:0"),
    ("--data", "shapes:-1"),
    ("--init", "nowhere.pt"),
    ("--init", "EMPTY"),
    ("--init", "FILE"),
    ("--init", "GPT"),
    ("--out", "FILE"),
    ("--out", "FILE/run"),
    ("--out", "/proc/run"),
    ("--out", "BROKEN"),
]


@pytest.mark.parametrize("flag, value", WRONG)
def test_no_value_of_any_flag_ends_in_a_traceback(tmp_path, monkeypatch, capsys, flag, value):
    """Exit code 2 and one sentence that names the flag or the file; nothing is written."""
    places = {
        "FILE": tmp_path / "file",
        "EMPTY": tmp_path / "empty",
        "GPT": tmp_path / "gpt.pt",
        "BROKEN": tmp_path / "broken",
    }
    places["FILE"].write_text("")
    places["EMPTY"].mkdir()
    places["BROKEN"].mkdir()
    (places["BROKEN"] / "ckpt.pt").write_text("not a checkpoint")
    torch.save(
        {"model": {"tok_embeddings.weight": torch.zeros(1)}, "config": {"dim": 1}}, places["GPT"]
    )
    before = sorted(tmp_path.rglob("*"))
    first, _, rest = str(value).partition("/")
    value = f"{places[first]}/{rest}".rstrip("/") if first in places else str(value)
    more = ["--resume"] if first == "BROKEN" else []
    with pytest.raises(SystemExit) as stop:
        train(
            monkeypatch,
            "shapes:8",
            tmp_path / "run",
            "--disc-weight",
            0,
            "--max-steps",
            1,
            flag,
            value,
            *more,
        )
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "error: " in error and (flag in error or value in error), error
    assert sorted(tmp_path.rglob("*")) == before


def test_a_gpu_that_is_not_there_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit) as stop:
        train(monkeypatch, "shapes:8", tmp_path / "run", "--device", "cuda")
    assert (
        stop.value.code == 2
        and "argument --device: cuda: torch sees 0 GPUs here" in capsys.readouterr().err
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")  # the third process of a torchrun
    with pytest.raises(SystemExit) as stop:
        train(monkeypatch, "shapes:8", tmp_path / "run", "--device", "cuda")
    assert stop.value.code == 2 and "cuda: torch sees 2 GPUs here" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (
        data.device("cuda") == "cuda:1"
        and data.device("cuda:0") == "cuda:0"
        and data.device("cpu") == "cpu"
    )


def test_missing_lpips_files_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOLLAMAGEN_CACHE", str(tmp_path))
    monkeypatch.setattr(
        data.urllib.request, "urlopen", lambda *a, **k: (_ for _ in ()).throw(OSError("no network"))
    )
    with pytest.raises(
        OSError, match="vgg16-397923af.pth and lpips_vgg_lin.pth in " + str(tmp_path)
    ):
        lpips.load()


@pytest.mark.parametrize(
    "module, name, value",
    [
        (vq, "to_tensor", lambda image: torch.full((3, 24, 24), torch.nan)),
        (
            train_vq,
            "hinge",
            lambda real, fake: torch.nan * real.mean(),
        ),  # the discriminator's alone
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    tmp_path, monkeypatch, capsys, module, name, value
):
    flags = ["--disc-start", 0, "--sample-every", 0, "--save-every", 1]
    train(monkeypatch, "shapes:8", tmp_path / "run", "--max-steps", 1, *flags)
    good = (tmp_path / "run" / "ckpt.pt").read_bytes()
    monkeypatch.setattr(module, name, value)
    with pytest.raises(SystemExit) as stop:
        train(monkeypatch, "shapes:8", tmp_path / "run", "--max-steps", 3, *flags, "--resume")
    assert stop.value.code == 2 and "not finite at step 2" in capsys.readouterr().err
    assert (tmp_path / "run" / "ckpt.pt").read_bytes() == good


def test_a_full_disk_ends_the_run_with_one_sentence(tmp_path, monkeypatch):
    """It ends where the log cannot be written; a checkpoint that cannot be is
    tests/test_data.py's."""

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, "log", full)
    monkeypatch.setattr(
        sys, "argv", ["train_vq.py", *flags_for("shapes:8", tmp_path / "run", "--max-steps", 1)]
    )
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "train_vq.py"), run_name="__main__")
    assert (
        stop.value.code
        == "train_vq.py: [Errno 28] No space left on device; the last checkpoint is untouched"
    )
