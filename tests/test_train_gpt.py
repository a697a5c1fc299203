"""What train_gpt.py promises: the right first loss, exact resumption, and the same run on one
process or two."""

import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
import types
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from bench import imagenet_codes
from conftest import ROOT, fill, words

import gpt
import sample
import train_gpt
import vq
from nanollamagen import codes as codes_module
from nanollamagen import data, files, runs
from nanollamagen.loss import cross_entropy


def flags_for(codes, out, *flags):
    """The flags of a small and quick run."""
    return [
        str(f)
        for f in (
            "--codes",
            codes,
            "--out",
            out,
            *words("--model demo --batch-size 8 --lr 9.375e-4 --log-every 1 --device cpu"),
            *flags,
        )
    ]


def train(monkeypatch, *args):
    """One run within this process."""
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", *flags_for(*args)])
    train_gpt.main()


def torchrun(n, *args, script=""):
    """One run on n processes; a hang is an error, not a wait. script: what to do in each of them
    before."""
    command = ["train_gpt.py"]
    if script:
        path = args[1].with_suffix(".py")
        path.write_text(f"import train_gpt\n{script}\ntrain_gpt.main()\n")
        command = [path]
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={n}",
            *command,
            *flags_for(*args),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out):
    return [record["loss"] for record in log(out)]


def test_the_plan_says_the_first_loss_and_training_learns_what_the_class_tells(
    codes, tmp_path, monkeypatch, capsys
):
    train(
        monkeypatch,
        codes,
        tmp_path / "run",
        *words("--max-steps 60 --val-images 6 --val-every 20"),
    )
    assert "the first loss should be ln(20) = 3.00" in capsys.readouterr().out
    records = log(tmp_path / "run")
    assert records[0]["loss"] == pytest.approx(math.log(20), abs=1e-5)
    assert records[-1]["loss"] < 2.5  # ln 8 = 2.08 is the best possible
    assert [r["step"] for r in records if "val_loss" in r] == [20, 40, 60]
    model = gpt.load_gpt(tmp_path / "run" / "ckpt.pt")
    assert (
        model.classes == ["a", "b", "c"]
        and model.config.grid == 4
        and model.config.num_classes == 3
    )


def test_a_resumed_run_equals_an_uninterrupted_one(codes, tmp_path, monkeypatch):
    """With dropout, averaged weights and a schedule: the same losses and weights to the last
    bit."""
    flags = words(
        "--ema-decay 0.99 --schedule cosine --save-every 7 --max-steps 12 --micro-batch 4"
    )
    train(monkeypatch, codes, tmp_path / "whole", *flags)
    save = files.save_checkpoint

    def killed_after_saving(state, path):
        save(state, path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "save_checkpoint", killed_after_saving)
        with pytest.raises(KeyboardInterrupt):
            train(patch, codes, tmp_path / "cut", *flags)
    assert files.read_checkpoint(tmp_path / "cut" / "ckpt.pt")["step"] == 7
    train(monkeypatch, codes, tmp_path / "cut", *flags, "--resume")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    one, two = (files.read_checkpoint(tmp_path / name / "ckpt.pt") for name in ("whole", "cut"))
    for part in ("model", "ema"):
        assert all(torch.equal(one[part][k], two[part][k]) for k in one[part])
    assert not all(torch.equal(one["model"][k], one["ema"][k]) for k in one["ema"])


def test_going_on_without_keep_leaves_what_was_kept(codes, tmp_path, monkeypatch):
    train(monkeypatch, codes, tmp_path / "run", "--save-every", 1, "--max-steps", 3, "--keep", 1)
    train(monkeypatch, codes, tmp_path / "run", "--save-every", 1, "--max-steps", 4, "--resume")
    names = sorted(path.name for path in (tmp_path / "run").glob("ckpt*"))
    assert names == ["ckpt.pt", "ckpt_00000002.pt", "ckpt_00000003.pt"]
    assert [files.read_checkpoint(tmp_path / "run" / name)["step"] for name in names] == [4, 2, 3]


def test_a_signal_that_comes_again_at_once_is_the_same_wish_and_later_ends_the_process(monkeypatch):
    """torchrun sends on what a queue has sent to every process already."""
    numbers, now, ended = (signal.SIGTERM, signal.SIGUSR1), 100.0, []
    before = [signal.getsignal(number) for number in numbers]
    monkeypatch.setattr(runs, "time", types.SimpleNamespace(time=lambda: now), raising=False)
    monkeypatch.setattr(os, "_exit", ended.append)
    try:
        caught = runs.catch_signals()
        assert not caught
        for moment, number, expected in (
            (100.0, signal.SIGTERM, []),
            (104.9, signal.SIGTERM, []),
            (104.9, signal.SIGUSR1, []),
            (105.1, signal.SIGTERM, [143]),
        ):
            now = moment
            signal.getsignal(number)(number, None)
            assert caught and ended == expected
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


def test_two_processes_and_micro_batches_give_the_losses_of_one(codes, tmp_path, monkeypatch):
    flags = words("--dropout 0 --class-dropout 0 --max-steps 20 --val-images 6 --val-every 10")
    train(monkeypatch, codes, tmp_path / "one", *flags)
    train(monkeypatch, codes, tmp_path / "micro", *flags, "--micro-batch", 2)
    result = torchrun(2, codes, tmp_path / "two", *flags, "--micro-batch", 2)
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "micro") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    for name in ("micro", "two"):
        assert log(tmp_path / name)[-1]["val_loss"] == pytest.approx(
            log(tmp_path / "one")[-1]["val_loss"], abs=1e-4
        )
    assert losses(tmp_path / "one")[-1] < 2.8  # so that there was something to differ


@pytest.mark.parametrize(
    "model, flags, plan",
    [
        ("L", [], "steps of 256 images"),
        ("L", [], "learning rate 1.0e-04"),
        ("XL", [], "steps of 256 images"),
        ("XL", [], "learning rate 2.0e-04"),
        ("3B", [], "steps of 512 images"),
        ("3B", [], "learning rate 2.0e-04"),
        ("3B", ["--batch-size", 64, "--lr", 3e-4], "steps of 64 images"),
        (
            "3B",
            ["--batch-size", 64],
            "learning rate 2.0e-04; the authors', scaled to this batch: 2.5e-05",
        ),
        ("3B", ["--batch-size", 64, "--lr", 3e-4], "learning rate 3.0e-04;"),
    ],
)
def test_a_size_comes_with_its_recipe_and_flags_win(
    codes, tmp_path, monkeypatch, capsys, model, flags, plan
):
    monkeypatch.setitem(gpt.GPT_CONFIGS, model, gpt.GPTConfig(dim=32, n_layer=1, n_head=2))
    flags = [*words(f"--codes {codes} --out {tmp_path}/run --model {model} --device cpu"), *flags]
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", *map(str, flags), "--max-steps", "1"])
    train_gpt.main()
    assert plan in capsys.readouterr().out


def test_batches_are_made_one_ahead_and_no_more():
    made = []
    coming = codes_module.prefetch(made.append(i) or [i] for i in range(5))
    assert not made  # nothing is read before the first step
    for i, batch in enumerate(coming):
        time.sleep(0.05)
        assert batch == [i] and made == list(range(min(i + 2, 5)))
    with pytest.raises(ZeroDivisionError):  # a mistake in the thread is not swallowed
        list(codes_module.prefetch([1 / 0] for _ in range(3)))


def test_a_machine_without_a_compiler_trains_without_and_says_so(
    codes, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    train(monkeypatch, codes, tmp_path / "run", "--max-steps", 1, "--compile")
    assert (
        "not compiled: torch.compile needs" in capsys.readouterr().err
        and len(losses(tmp_path / "run")) == 1
    )


def test_the_picture_needs_no_second_model_and_draws_a_few_images_at_once(tmp_path, monkeypatch):
    """Its weights are those of the training, not copies; and it shows what one batch of all images
    would."""
    config = gpt.GPTConfig(dim=32, n_layer=1, n_head=2, vocab_size=20, grid=4, num_classes=3)
    model = fill(gpt.GPT(config)).eval()
    tokenizer = vq.VQModel(
        vq.VQConfig(ch=32, ch_mult=(1, 1), res_blocks=1, z_channels=32, codebook_size=20)
    ).eval()
    labels, titles, batches, generate = torch.arange(3), ["a", "b", "c"], [], sample.generate
    codes = generate(model, labels.repeat(2), cfg_scale=2.0, seeds=range(6))
    data.save_grid(sample.to_pixels(tokenizer, codes), tmp_path / "expected.png", 3, titles * 2)

    def recorder(shown, labels, **settings):
        assert shown.norm.weight.data_ptr() == model.norm.weight.data_ptr()
        batches.append(labels.tolist())
        return generate(shown, labels, **settings)

    monkeypatch.setattr(sample, "generate", recorder)
    cpu = torch.device("cpu")
    examples = types.SimpleNamespace(examples=lambda: (titles, [labels]))
    train_gpt.picture(config, model.state_dict(), tokenizer, examples, cpu, tmp_path / "got.png")
    assert batches == [[0, 1, 2, 0], [1, 2]]
    assert (tmp_path / "got.png").read_bytes() == (tmp_path / "expected.png").read_bytes()


def test_every_step_takes_other_images_and_crops(codes, tmp_path, monkeypatch):
    """Over two epochs every image comes twice, and both of its crops are used somewhere."""
    taken, load = [], data.load_codes

    class Recorder:
        def __init__(self, array):
            self.array, self.shape, self.dtype, self.base = (
                array,
                array.shape,
                array.dtype,
                array.base,
            )

        def __len__(self):
            return len(self.array)

        def __getitem__(self, key):
            taken.extend(zip(*(k.tolist() for k in key)))
            return self.array[key]

    monkeypatch.setattr(
        data, "load_codes", lambda folder: (Recorder(load(folder)[0]), *load(folder)[1:])
    )
    train(monkeypatch, codes, tmp_path / "run", "--epochs", 2)
    assert sorted(i for i, _ in taken) == sorted(2 * list(range(60)))
    assert {crop for _, crop in taken} == {0, 1}


@pytest.mark.skipif(
    not Path("/proc/self/smaps").exists(), reason="asks Linux for the memory and what was read"
)
def test_codes_of_imagenets_size_are_neither_read_nor_held(tmp_path):
    """13 GB of codes, in a process of its own: it peaks less than 0.7 GB above what its imports
    take (which is more with a CUDA build), reads less than 1 GB by any read(), and of the memory
    map gets only the pages of the 16 rows it trained on, not megabytes around each."""
    (tmp_path / "codes").mkdir()
    imagenet_codes(tmp_path / "codes")
    script = """if True:
        import train_gpt
        from nanollamagen import data
        load, kept = data.load_codes, []
        imports = open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]
        data.load_codes = lambda folder: kept.append(load(folder)) or kept[0]  # the map stays
        train_gpt.main()
        print("FACTS")
        print("imports:", imports)
        print(open("/proc/self/status").read(), open("/proc/self/io").read(), sep="")
        print(open("/proc/self/smaps").read().partition("codes.npy")[2].partition("Shared_Clean")[0])
        """
    flags = flags_for(tmp_path / "codes", tmp_path / "run", "--micro-batch", 2, "--max-steps", 2)
    result = subprocess.run(
        [sys.executable, "-c", script, *flags], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    facts = dict(
        line.split(":") for line in result.stdout.partition("FACTS\n")[2].splitlines() if line
    )
    peak, imports = (int(facts[name].split()[0]) * 1024 for name in ("VmHWM", "imports"))
    assert peak - imports < 0.7e9  # of all that is resident, mapped files included
    assert int(facts["rchar"]) < 1e9
    assert 0 < int(facts["Rss"].split()[0]) <= 16 * 2 * 4  # kB; a row may lie across two pages


WHOLE = words("--batch-size --micro-batch --max-steps --val-every --log-every --save-every")
FROM_0 = words("--warmup-steps --val-images --keep --seed")
ABOVE_0 = ["--epochs", "--lr"]
FRACTIONS = words("--dropout --class-dropout --ema-decay")
HUGE = str(10**30)
MISTAKES = [
    *((flag, value, "not a whole number from 1 to") for flag in WHOLE for value in ("0", "-1")),
    *((flag, "-1", "not a whole number from 0 to") for flag in FROM_0),
    *((f, value, "not a whole number from") for f in WHOLE + FROM_0 for value in ("nan", HUGE)),
    *((flag, value, "not a number from") for flag in ABOVE_0 for value in ("0", "-1", "nan")),
    *((flag, value, "from 0 to 1") for flag in FRACTIONS for value in ("-0.1", "nan", "1.1")),
    *(("--weight-decay", value, "not a number from 0") for value in ("-1", "nan", "inf")),
    ("--dropout", "1.0", "--dropout 1.0: nothing would be left"),
    ("--micro-batch", "3", "--micro-batch 3 does not divide the 8 images"),
    ("--val-images", "60", "--val-images 60: the folder has 60 images"),
    ("--device", "cuda", "argument --device: cuda: torch sees 0 GPUs here"),
    ("--device", "mps", "argument --device: mps: torch sees 0 GPUs here for mps"),
    ("--device", "tpu2", "argument --device: tpu2 is none of cuda, mps, cpu"),
    ("--codes", "NOWHERE", "make it with: python vq.py encode"),
    ("--codes", "FOLDER", "make it with: python vq.py encode"),
    ("--codes", "FILE", "make it with: python vq.py encode"),
    ("--out", "FILE", "empty: no folder can be made there"),
    ("--out", "/proc/run", "--out /proc/run: no folder can be made there"),
    *(
        ("--out", place, "ckpt.pt is not a training script's; choose another --out")
        for place in ("OTHER", "LIST")
    ),
    *(
        (flag, place, sentence)
        for flag in ("--vq", "--init")
        for place, sentence in (
            ("NOWHERE", "nowhere: No such file or directory"),
            ("FOLDER", "folder: Is a directory"),
            ("FILE", "empty is truncated, or not a PyTorch checkpoint"),
            ("README.md", "not a PyTorch checkpoint"),
        )
    ),
]


@pytest.mark.parametrize(
    "flag, value, sentence", MISTAKES, ids=[f"{flag}={value}" for flag, value, _ in MISTAKES]
)
def test_a_mistake_gets_one_sentence(codes, tmp_path, monkeypatch, capsys, flag, value, sentence):
    """NOWHERE, FOLDER, FILE, OTHER and LIST stand for a path that is missing, an empty folder, an
    empty file, and the runs of other programs; --device cuda is for machines without."""
    if flag == "--device" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    places = {
        name: tmp_path / name.lower() for name in ("NOWHERE", "FOLDER", "FILE", "OTHER", "LIST")
    }
    places["FOLDER"].mkdir()
    places["FILE"] = tmp_path / "empty"
    places["FILE"].touch()
    for name, content in (("OTHER", {"model": {}}), ("LIST", [1, 2])):
        places[name].mkdir()
        torch.save(content, places[name] / "ckpt.pt")
    with pytest.raises(SystemExit) as stop:
        train(
            monkeypatch, codes, tmp_path / "run", "--max-steps", 1, flag, places.get(value, value)
        )
    errors = capsys.readouterr().err
    assert stop.value.code == 2 and sentence in errors and "Traceback" not in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name, content",
    [("meta.json", "{"), ("meta.json", "{}"), ("codes.npy", ""), ("labels.npy", "x")],
)
def test_codes_that_are_damaged_get_one_sentence(
    codes, tmp_path, monkeypatch, capsys, name, content
):
    shutil.copytree(codes, tmp_path / "codes")
    (tmp_path / "codes" / name).write_text(content)
    with pytest.raises(SystemExit) as stop:
        train(monkeypatch, tmp_path / "codes", tmp_path / "run", "--max-steps", 1)
    assert stop.value.code == 2 and "codes is damaged (" in capsys.readouterr().err


def test_going_on_without_a_run_gets_one_sentence(codes, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        train(monkeypatch, codes, tmp_path / "run", "--resume")
    assert stop.value.code == 2 and "has no ckpt.pt" in capsys.readouterr().err


def test_the_run_of_a_tokenizer_is_not_gone_on_with(codes, tmp_path, monkeypatch, capsys):
    """It has a step, an optimizer and a config, too."""
    import test_train_vq

    test_train_vq.train(monkeypatch, "shapes:8", tmp_path / "vq", "--max-steps", 1)
    before = sorted(path.read_bytes() for path in (tmp_path / "vq").iterdir())
    with pytest.raises(SystemExit) as stop:
        train(monkeypatch, codes, tmp_path / "vq", "--max-steps", 2, "--resume")
    assert (
        stop.value.code == 2
        and "vq/ckpt.pt was written by another script; choose" in capsys.readouterr().err
    )
    assert sorted(path.read_bytes() for path in (tmp_path / "vq").iterdir()) == before


def test_a_run_is_neither_overwritten_nor_continued_as_another(
    codes, tmp_path, monkeypatch, capsys
):
    train(monkeypatch, codes, tmp_path / "run", "--max-steps", 1)
    for flags, sentence in (
        (["--max-steps", "2"], "add --resume to continue it"),
        (["--resume", "--model", "B"], "is of another model or other data"),
    ):
        with pytest.raises(SystemExit) as stop:
            train(monkeypatch, codes, tmp_path / "run", *flags)
        assert stop.value.code == 2 and sentence in capsys.readouterr().err


def test_codes_that_changed_since_the_checkpoint_are_refused(codes, tmp_path, monkeypatch, capsys):
    train(monkeypatch, codes, tmp_path / "run", "--max-steps", 1)
    changed = tmp_path / "codes"
    changed.mkdir()
    meta = json.loads((codes / "meta.json").read_text())
    for n, news, sentence in (
        (59, {}, "images was 60, is 59"),
        (60, {"tokenizer": "1"}, "tokenizer was 0, is 1"),
        (60, {"crops": "ten"}, "crops was None, is ten"),
    ):
        for name in ("codes.npy", "labels.npy"):
            np.save(changed / name, np.load(codes / name)[:n])
        (changed / "meta.json").write_text(json.dumps({**meta, **news}))
        with pytest.raises(SystemExit) as stop:
            train(monkeypatch, changed, tmp_path / "run", "--max-steps", 2, "--resume")
        error = capsys.readouterr().err
        assert (
            stop.value.code == 2
            and f"ckpt.pt is of another model or other data ({sentence}); use the" in error
        )


def test_the_log_of_a_run_that_died_before_its_first_checkpoint_starts_again(
    codes, tmp_path, monkeypatch
):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text('{"step": 1, "loss": 9.0}\n{"step": 2, "lo')
    train(monkeypatch, codes, tmp_path / "run", "--max-steps", 2)
    assert [r["step"] for r in log(tmp_path / "run")] == [1, 2] and losses(tmp_path / "run")[0] < 4


def test_another_tokenizers_pictures_are_refused(codes, tmp_path, monkeypatch, capsys):
    model = vq.VQModel(
        vq.VQConfig(ch=32, ch_mult=(1, 1), res_blocks=1, z_channels=32, codebook_size=20)
    )
    torch.save({"model": model.state_dict(), "config": asdict(model.config)}, tmp_path / "vq.pt")
    with pytest.raises(SystemExit) as stop:
        train(monkeypatch, codes, tmp_path / "run", "--vq", tmp_path / "vq.pt")
    assert stop.value.code == 2 and "is not the tokenizer that made" in capsys.readouterr().err


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="needs an Apple GPU")
def test_an_apple_gpu_trains_and_samples_as_a_cpu_does(codes, tmp_path, monkeypatch):
    flags = words("--dropout 0 --class-dropout 0 --val-images 6 --val-every 5")
    train(monkeypatch, codes, tmp_path / "first", "--max-steps", 20)
    flags += ["--init", tmp_path / "first" / "ckpt.pt", "--max-steps", 5]
    for device in ("cpu", "mps"):
        train(monkeypatch, codes, tmp_path / device, *flags, "--device", device)
    assert losses(tmp_path / "mps") == pytest.approx(losses(tmp_path / "cpu"), abs=1e-3)
    val = [log(tmp_path / device)[-1]["val_loss"] for device in ("cpu", "mps")]
    assert val[1] == pytest.approx(val[0], abs=1e-3)
    images = {}
    for device in ("cpu", "mps"):
        model = gpt.load_gpt(tmp_path / "cpu" / "ckpt.pt", device)
        labels = torch.arange(3, device=device)
        images[device] = sample.generate(model, labels, cfg_scale=2.0, seeds=range(3)).cpu()
    assert (images["cpu"] == images["mps"]).float().mean() > 0.9  # the last digits may differ


def test_a_trained_model_adapts_to_other_classes(codes, tmp_path, monkeypatch, capsys):
    """With --init, all weights are the trained model's except its table of classes: that one starts
    over with the new number of classes. A short run then learns what the new classes tell."""
    flags = words("--max-steps 40 --dropout 0")
    train(monkeypatch, codes, tmp_path / "three", *flags)
    four = shutil.copytree(codes, tmp_path / "codes")
    meta = json.loads((four / "meta.json").read_text())
    (four / "meta.json").write_text(json.dumps({**meta, "classes": ["a", "b", "c", "d"]}))
    labels = np.arange(60, dtype=np.int32) % 4
    np.save(four / "labels.npy", labels)
    eight = np.random.RandomState(1).randint(0, 8, (60, 2, 16))
    np.save(four / "codes.npy", ((labels[:, None, None] * 5 + eight) % 20).astype(np.uint16))

    first, copy = {}, runs.copy_weights

    def recorder(model, weights):
        copy(model, weights)
        first.update({name: value.clone() for name, value in model.state_dict().items()})

    capsys.readouterr()
    monkeypatch.setattr(runs, "copy_weights", recorder)
    init = tmp_path / "three" / "ckpt.pt"
    flags = words("--max-steps 60 --dropout 0 --lr 2e-3")
    train(monkeypatch, four, tmp_path / "four", *flags, "--init", init)
    assert "it has 3 classes: the table of classes starts over\n" in capsys.readouterr().out
    trained = files.read_checkpoint(init)["model"]
    table = "cls_embedding.embedding_table.weight"
    assert {name for name in trained if not torch.equal(trained[name], first[name])} == {table}
    assert first[table].shape == (4 + 1, 128) and first[table].std() < 0.03  # untrained: 0.02
    assert losses(tmp_path / "four")[-1] < losses(tmp_path / "four")[0] - 0.5
    assert gpt.load_gpt(tmp_path / "four" / "ckpt.pt").classes == ["a", "b", "c", "d"]


def test_another_size_is_not_adapted(codes, tmp_path, monkeypatch, capsys):
    config = gpt.GPTConfig(dim=64, n_layer=1, n_head=2, vocab_size=20, grid=4, num_classes=7)
    weights = gpt.GPT(config).state_dict()
    torch.save({"model": weights, "config": asdict(config)}, tmp_path / "init.pt")
    with pytest.raises(SystemExit) as stop:
        train(monkeypatch, codes, tmp_path / "run", "--init", tmp_path / "init.pt")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "init.pt does not fit --model demo and" in error
    assert "dim 64 there, 128 here" in error and "num_classes" not in error


def test_a_batch_that_does_not_split_says_which_would(codes, tmp_path):
    result = torchrun(3, codes, tmp_path / "run", "--max-steps", 1)
    sentence = "--batch-size 8 does not split over 3 processes; try --batch-size 6"
    assert result.returncode != 0 and sentence in result.stderr


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    codes, tmp_path, monkeypatch, capsys
):
    train(monkeypatch, codes, tmp_path / "run", "--max-steps", 2)
    good = (tmp_path / "run" / "ckpt.pt").read_bytes()
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: torch.tensor(float("nan")))
    with pytest.raises(SystemExit) as stop:
        train(monkeypatch, codes, tmp_path / "run", "--max-steps", 4, "--resume")
    assert stop.value.code == 2 and "from the last checkpoint) at step 3" in capsys.readouterr().err
    assert (tmp_path / "run" / "ckpt.pt").read_bytes() == good


def test_a_full_disk_ends_the_run_with_one_sentence(codes, tmp_path, monkeypatch):
    """It ends where the log cannot be written; a checkpoint that cannot be is
    tests/test_data.py's."""

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs.Log, "write", full)
    monkeypatch.setattr(
        sys, "argv", ["train_gpt.py", *flags_for(codes, tmp_path / "run", "--max-steps", 1)]
    )
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "train_gpt.py"), run_name="__main__")
    assert (
        stop.value.code
        == "train_gpt.py: [Errno 28] No space left on device; the last checkpoint is untouched"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_and_its_gradient_are_those_of_torch(dtype, reduction):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 30, generator=generator).to(dtype)
    targets = torch.randint(30, (200,), generator=generator)
    theirs, ours = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(theirs.float(), targets, reduction=reduction)
    expected.backward()
    loss = cross_entropy(ours * 1, targets, reduction)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-5
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-6, rtol=rounding)


@pytest.mark.parametrize("first", [True, False])
def test_a_second_loss_on_the_same_logits_gets_its_gradient_or_an_error(first):
    """The lean loss overwrites the logits in its backward, which torch must notice."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 30, generator=generator)
    targets = torch.randint(30, (40,), generator=generator)

    def total(loss):
        leaf = x.clone().requires_grad_()
        logits = leaf * 1
        if first:
            main = loss(logits, targets)
            extra = logits.logsumexp(1).square().mean()
        else:
            extra = logits.logsumexp(1).square().mean()
            main = loss(logits, targets)
        right = (logits.argmax(1) == targets).float().mean()  # the forward pass changes nothing
        (main + extra).backward()
        return leaf.grad, right

    expected, accuracy = total(torch.nn.functional.cross_entropy)
    try:
        gradient, right = total(cross_entropy)
    except RuntimeError as error:
        assert not first and "modified by an inplace operation" in str(error)
    else:
        assert right == accuracy and torch.allclose(gradient, expected, atol=1e-7)


def test_weights_of_a_seed_are_the_same_whole_or_drawn_in_parts():
    torch.manual_seed(3)
    model = gpt.GPT(gpt.GPTConfig(dim=64, n_layer=2, n_head=4, vocab_size=100, grid=4))
    with torch.device("meta"):
        names = gpt.GPT(model.config).state_dict().keys()
    first, again = dict(model.initial_weights(1)), dict(model.initial_weights(1))
    assert first.keys() == names and all(torch.equal(first[k], again[k]) for k in first)
    wqkv = [v for k, v in first.items() if k.endswith("wqkv.weight")]
    other = dict(model.initial_weights(2))["layers.0.attention.wqkv.weight"]
    assert not torch.equal(*wqkv) and not torch.equal(wqkv[0], other)
    assert (
        float(wqkv[0].std()) == pytest.approx(0.02, rel=0.05) and not first["output.weight"].any()
    )


def test_flops_are_those_that_torch_counts():
    """The closed form behind MFU, against torch's counter (which counts the whole square of
    attention, not half)."""
    from torch.utils.flop_counter import FlopCounterMode

    config = gpt.GPTConfig(dim=64, n_layer=2, n_head=4, vocab_size=100, grid=4, dropout=0.0)
    model = gpt.GPT(config)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 15, dtype=torch.long), torch.tensor([0])).sum().backward()
    matrices = gpt.flops_per_image(config) - 6 * config.n_layer * config.dim * 16**2
    attention = counter.get_total_flops() - matrices
    assert 0 <= attention <= 2.5 * 6 * config.n_layer * config.dim * 16**2
