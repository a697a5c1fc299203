"""What sample.py promises: the reference's tokens and filters, and pictures that follow from their
seeds alone."""

import contextlib
import math
import sys
import threading
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import compiles, fill, golden, run_script, words
from PIL import Image
from test_gpt import TINY, random_model
from torch.fx.experimental.proxy_tensor import make_fx

import gpt
import sample
import vq
from nanollamagen import captions, classes, fast, noise, runs

SLOW = [("gpt_3b_head", 4), ("gpt_b_c2i", 16)]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]


@pytest.mark.parametrize("name, grid", [("gpt_b_c2i", 4), *SLOW])
def test_greedy_tokens_are_the_reference_ones(name, grid):
    """Cached decoding at guidance 1 and 4, and with an interval, gives the released code's
    tokens."""
    expected, meta = golden(name)
    c = meta["config"]
    config = gpt.GPTConfig(dim=c["dim"], n_layer=c["n_layer"], n_head=c["n_head"], grid=grid)
    model = fill(gpt.GPT(config)).eval()
    for case in meta["generations"]:
        if case["grid"] == grid:
            codes = sample.generate(
                model,
                torch.tensor(case["classes"]),
                cfg_scale=case["cfg_scale"],
                cfg_interval=case["cfg_interval"],
                top_k=1,
            )
            assert torch.equal(codes.int(), expected[case["key"]]), case["key"]


def probabilities(logits, temperature, top_k=0, top_p=1.0):
    """What sample.draw samples from: float32 (..., V). A temperature below 1e-5 counts as 1e-5."""
    return sample.filter_logits(logits.float() / max(temperature, 1e-5), top_k, top_p).softmax(-1)


def test_filters_keep_what_the_reference_keeps():
    expected, meta = golden("sampling")
    for combo in meta["combos"]:
        kept = sample.filter_logits(expected["logits"], combo["top_k"], combo["top_p"]) > -torch.inf
        stored = np.unpackbits(expected[combo["key"]].numpy(), axis=-1)
        assert np.array_equal(kept.numpy(), stored), combo
    for k in (1, 7, 40):
        kept = sample.filter_logits(expected["tied_logits"], k) > -torch.inf
        stored = np.unpackbits(expected[f"tied_keep_k{k}"].numpy(), axis=-1)
        assert np.array_equal(kept.numpy(), stored), k
    for run in meta["temps"]:
        p = probabilities(expected["logits"], run["temperature"], run["top_k"], run["top_p"])
        assert torch.allclose(p, expected[run["key"]], atol=1e-6), run
        best = expected[run["key"].replace("probs", "best")]
        assert torch.equal(p.argmax(-1, keepdim=True).int(), best)


def test_noise_is_splitmix64_of_seed_position_and_code():
    """The integers against Python's own arithmetic, and from them the noise, up to both ends of the
    range."""

    def mix(x):
        x = x + 0x9E3779B97F4A7C15 & 2**64 - 1
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & 2**64 - 1
        x = (x ^ x >> 27) * 0x94D049BB133111EB & 2**64 - 1
        return x ^ x >> 31

    seeds, positions = [0, 1, 2**63 - 1], [0, 5, 575]
    rows, columns = torch.tensor(seeds)[:, None], torch.tensor(positions)
    uniform = noise.uniform(noise.state(rows, columns), 40)
    gumbel = sample.gumbel_noise(rows, columns, 40)
    for i, seed in enumerate(seeds):
        for j, position in enumerate(positions):
            for code in (0, 1, 39):
                state = mix(mix(seed) + position)
                number = ((mix(state + code * 0x9E3779B97F4A7C15) >> 24) + 0.5) / 2**40
                expected = -math.log(-math.log1p(-number))
                assert uniform[i, j, code].item() == pytest.approx(number, rel=1e-6)
                assert gumbel[i, j, code].item() == pytest.approx(expected, abs=1e-5)
    ends = torch.tensor([0, 2**40 - 1]).float().add_(0.5).mul_(2.0**-40).clamp_(max=1 - 2.0**-24)
    assert (-(-(-ends).log1p()).log()).isfinite().all()


def test_noise_is_gumbel_and_neighbours_are_independent():
    """Moments of four million draws (mean 0.57722, variance pi^2 / 6), and no correlation along any
    axis."""
    gumbel = sample.gumbel_noise(torch.arange(16)[:, None], torch.arange(16), 16384).double()
    assert gumbel.isfinite().all()
    assert abs(gumbel.mean() - 0.57722) < 0.004 and abs(gumbel.var() - math.pi**2 / 6) < 0.01
    for axis in range(3):
        n = gumbel.shape[axis] - 1
        pairs = torch.stack([gumbel.narrow(axis, first, n).flatten() for first in (0, 1)])
        assert abs(torch.corrcoef(pairs)[0, 1]) < 0.003


def test_draws_follow_the_distribution():
    """Chi-square of 4,000 first codes against the softmax of the first logits."""
    model, labels = random_model(), torch.full((4000,), 1)
    with torch.no_grad():
        logits = model(torch.zeros(1, 0, dtype=torch.long), labels[:1])[0, 0]
    p = probabilities(logits, 0.8, top_k=20)
    codes = sample.generate(model, labels, temperature=0.8, top_k=20, seeds=range(4000))[:, 0]
    counts = torch.bincount(codes, minlength=40).double()
    assert counts[p == 0].sum() == 0
    expected = 4000 * p[p > 0].double()
    chi_square = ((counts[p > 0] - expected) ** 2 / expected).sum()
    assert chi_square < 60  # 19 degrees of freedom: above 60 once in 1e5


@torch.no_grad()
def test_guidance_is_computed_in_float32(monkeypatch):
    """In bfloat16 the difference of the halves is rounded to a grid on which many codes tie, and
    top-k keeps more."""
    model, arrived, draw = random_model().bfloat16(), [], sample.draw

    def watch(logits, gumbel, **how):
        arrived.append(logits)
        return draw(logits, gumbel, **how)

    monkeypatch.setattr(sample, "draw", watch)
    sample.generate(model, torch.tensor([1, 2]), cfg_scale=1.7, seeds=[0, 1])
    logits = model.extend(model.cls_embedding(torch.tensor([1, 2, 5, 5])), 0, model.new_cache(4))
    cond, uncond = logits[:, 0].float().chunk(2)
    assert torch.equal(arrived[0], uncond + (cond - uncond) * 1.7)
    assert not torch.equal(arrived[0], arrived[0].bfloat16().float())


def test_an_image_follows_from_its_seed_whatever_its_batch():
    model, labels = random_model(), torch.tensor([0, 1, 2, 3, 4])
    together = sample.generate(model, labels, cfg_scale=3.0, top_k=20, seeds=[7, 8, 9, 10, 11])
    alone = sample.generate(model, labels[3:4], cfg_scale=3.0, top_k=20, seeds=[10])
    assert torch.equal(together[3:4], alone)
    assert len(torch.unique(together, dim=0)) == 5


def test_guidance_scale_one_is_no_guidance():
    model, labels = random_model(), torch.tensor([0, 1])
    plain = sample.generate(model, labels, seeds=[0, 1])
    assert torch.equal(plain, sample.generate(model, labels, cfg_scale=1.0, seeds=[0, 1]))
    assert not torch.equal(plain, sample.generate(model, labels, cfg_scale=3.0, seeds=[0, 1]))


# ---- decoding: the codes are those of one full forward pass per code ---------------------------
SETTINGS = [
    dict(),
    dict(cfg_scale=3.0),
    dict(cfg_scale=3.0, cfg_interval=30),
    dict(cfg_scale=2.0, temperature=0.0),
]


@torch.no_grad()
def plainly(model, cond, mask=None, *, seeds, cfg_scale=1.0, cfg_interval=-1, **how):
    """What generate promises, without a cache."""
    codes, none = torch.zeros(len(cond), 0, dtype=torch.int64), model.cls_embedding.uncond(cond)
    for i in range(model.config.grid**2):
        logits = model(codes, cond, mask)[:, -1]
        if cfg_scale > 1 and not 0 <= cfg_interval < i - 1:
            uncond = model(codes, none, mask)[:, -1]
            logits = uncond + (logits - uncond) * cfg_scale
        gumbel = sample.gumbel_noise(torch.tensor(seeds), torch.tensor(i), logits.shape[-1])
        codes = torch.cat([codes, sample.draw(logits, gumbel, **how)[:, None]], 1)
    return codes


def captions_for(model, lengths):
    """Features and mask of captions of so many tokens."""
    c = model.config.cond_tokens
    features = torch.randn(len(lengths), c, model.config.caption_dim)
    mask = torch.arange(c) >= c - torch.tensor(lengths)[:, None]
    return features * mask[..., None], mask


CONFIGS = {
    "heads of 64": replace(TINY, grid=9, dim=128, n_head=2),
    "heads of 100": replace(TINY, grid=9, dim=200, n_head=2),
    "captions": replace(TINY, grid=8, num_classes=0, cond_tokens=20, caption_dim=7),
}


def three_conditions(model):
    """Conditions of three images, as generate takes them."""
    if model.config.caption_dim:
        return captions_for(model, [3, 20, 11])
    return [torch.tensor([0, 3, 3])]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_cached_steps_give_the_codes_of_full_forward_passes(config):
    """With a cache that grows, and guidance that ends half-way."""
    model = random_model(config)
    cond = three_conditions(model)
    for settings in SETTINGS:
        how = {"seeds": [7, 8, 9], "top_k": 20, **settings}
        assert torch.equal(sample.generate(model, *cond, **how), plainly(model, *cond, **how)), how
    assert model.new_cache(1)[0].shape[-1] % 8 == 0


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_recorded_step_gives_the_same_codes(config, monkeypatch):
    """It is recorded at the start, when the cache grows and when guidance ends. A traced step is
    like a CUDA graph: it repeats operations on the same tensors, whatever Python does meanwhile.
    Unlike a CUDA graph it runs once while it is traced; that is undone."""

    def record(run, device):
        touched = [run.__self__.state, *run.__self__.cache]
        before = [tensor.clone() for tensor in touched]
        graphs.append(make_fx(lambda _: run())(torch.zeros(())))
        for tensor, old in zip(touched, before):
            tensor.copy_(old)
        return lambda: graphs[-1](torch.zeros(()))

    model, graphs = random_model(config), []
    cond = three_conditions(model)
    settings = dict(cfg_scale=3.0, cfg_interval=30, top_k=20, seeds=[7, 8, 9])
    right = sample.generate(model, *cond, **settings)
    monkeypatch.setattr(fast, "record", record)
    assert torch.equal(sample.generate(model, *cond, **settings), right)
    assert len(graphs) == 3


@compiles
@pytest.mark.slow
def test_a_compiled_step_draws_the_same():
    """As one graph without breaks, while the cache grows and guidance ends."""
    if not runs.can_compile(True, torch.device("cpu")):
        pytest.skip("torch.compile finds no compiler")
    model, labels = random_model(replace(TINY, grid=9)), torch.tensor([0, 3])
    settings = dict(cfg_scale=3.0, cfg_interval=70, top_k=20, seeds=[1, 2])
    right = sample.generate(model, labels, **settings)
    assert torch.equal(right, sample.generate(model, labels, compiled=True, **settings))


def test_packed_layers_draw_the_same_and_replace_the_plain_ones():
    model, plain = random_model(), random_model()
    fast.pack(model)
    assert not any(isinstance(module, torch.nn.Linear) for module in model.modules())
    # or interrupted samples would not know their model
    assert vq.weights_hash(model) == vq.weights_hash(plain)
    labels, settings = torch.arange(5), dict(cfg_scale=3.0, top_k=20, seeds=range(5))
    codes = sample.generate(model, labels, **settings)
    assert torch.equal(codes, sample.generate(plain, labels, **settings))


def test_what_cannot_be_packed_or_recorded_is_run_as_it_is(monkeypatch, capsys):
    def missing(*_, **__):
        raise NotImplementedError("no such operator")

    monkeypatch.setattr(fast, "PackedLinear", missing)
    assert isinstance(fast.pack(random_model()).output, torch.nn.Linear)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "graph", missing)
    assert fast.record(missing, torch.device("cuda", 0)) is missing
    assert "not recorded as a CUDA graph (no such operator)" in capsys.readouterr().err


def test_pictures_are_decoded_a_few_at_a_time_in_order():
    """40 images of 256 pixels: three groups, or the decoder's tensors of a large batch would not
    fit into a GPU."""
    groups = []

    def decode(codes):
        groups.append(len(codes))
        return (codes[:, :1, :1] / 255 * 2 - 1)[:, None].expand(-1, 3, 256, 256).float()

    tokenizer = SimpleNamespace(config=SimpleNamespace(downsample=16), decode=decode)
    pixels = sample.to_pixels(tokenizer, torch.arange(40)[:, None].expand(40, 256))
    assert groups == [16, 16, 8] and pixels[:, 0, 0, 0].tolist() == list(range(40))


def test_class_names_are_found_or_explained():
    names = classes.imagenet_classes()
    assert len(names) == 1000
    assert classes.find_class("207", names) == 207 == classes.find_class("Golden Retriever", names)
    assert classes.find_class("red fox", names) == 277
    with pytest.raises(ValueError, match="134 crane; 517 crane"):
        classes.find_class("crane", names)
    with pytest.raises(ValueError, match="golden retriever"):
        classes.find_class("goldn retriver", names)
    for number in ("1000", "-5"):
        with pytest.raises(
            ValueError, match=f"class {number} is out of range: ids go from 0 to 999"
        ):
            classes.find_class(number, names)
    for text in ("²", "٣", "--5", "5-"):  # digits to some of Python's functions
        with pytest.raises(ValueError, match=f"^class '{text}' is no class's name"):
            classes.find_class(text, names)


# ---- the command line, on tiny models ----------------------------------------------------------
@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Checkpoints of a tiny tokenizer and a tiny GPT that belong together."""
    folder = tmp_path_factory.mktemp("pair")
    torch.manual_seed(0)
    config = vq.VQConfig(ch=32, ch_mult=(1, 1, 1), res_blocks=1, z_channels=32, codebook_size=40)
    tokenizer = vq.VQModel(config)
    model = random_model(replace(TINY, num_classes=3))
    torch.save(
        {"model": tokenizer.state_dict(), "config": asdict(config), "image_size": 16},
        folder / "vq.pt",
    )
    torch.save(
        {
            "model": model.state_dict(),
            "config": asdict(model.config),
            "classes": ["cat", "dog", "catfish"],
            "tokenizer": vq.weights_hash(tokenizer),
        },
        folder / "gpt.pt",
    )
    return folder


@pytest.mark.parametrize("count", ["--count", "--per-class"])  # the flag, and its old name
def test_a_grid_of_classes_is_drawn(pair, tmp_path, count):
    models, out = ["--vq", pair / "vq.pt", "--gpt", pair / "gpt.pt"], tmp_path / "a.png"
    result = run_script("sample.py", *models, "--classes", "1,catfish", count, 3, "--out", out)
    assert result.returncode == 0, result.stderr
    with Image.open(out) as image:  # 16 pixels six times as large, and titles
        assert image.size == (3 * 100 + 4, 2 * (96 + 16 + 4) + 4)


def test_settings_come_from_one_table(monkeypatch, capsys):
    """Defaults for classes and captions, and the paper's; a new filter is one row, one function."""

    def settings(words, captioned=False):
        monkeypatch.setattr(sys, "argv", ["sample.py", *words.split()])
        args = sample.parse()[1]
        return sample.choose_settings(args, captioned, args.paper)

    chosen = settings("--top-k 7")
    assert chosen["top_k"] == 7 and chosen["cfg_scale"] == 4.0
    assert settings("--temperature 0", captioned=True)["cfg_scale"] == 7.5
    paper = settings("--paper --pretrained L-256 --top-p 0.5")
    assert (paper["cfg_scale"], paper["top_k"], paper["top_p"]) == (1.75, 0, 0.5)
    assert settings("--paper --cfg-scale 3")["cfg_scale"] == 3

    filter_logits = sample.filter_logits

    def with_min_p(logits, min_p=0.0, **filters):
        p = logits.softmax(-1)
        unlikely = p < min_p * p.amax(-1, keepdim=True)
        return filter_logits(logits.masked_fill(unlikely, -torch.inf), **filters)

    monkeypatch.setitem(sample.SETTINGS, "min_p", (0.0, 0.0, 0, 1, "least share of the likeliest"))
    monkeypatch.setattr(sample, "filter_logits", with_min_p)
    model, labels = random_model(), torch.tensor([1, 2])
    codes = sample.generate(model, labels, seeds=[0, 1], **settings("--min-p 1"))
    greedy = sample.generate(model, labels, **settings("--temperature 0"))
    assert torch.equal(codes, greedy)
    with pytest.raises(SystemExit):
        settings("--min-p 2")
    assert "--min-p: 2 is not a number from 0 to 1" in capsys.readouterr().err


def test_a_caption_of_two_lines_is_drawn_as_one(pair, tmp_path, monkeypatch):
    c = captions.CAPTION_TOKENS
    model = random_model(replace(TINY, num_classes=0, cond_tokens=c, caption_dim=64))
    saved = {"model": model.state_dict(), "config": asdict(model.config)}
    saved["text"] = captions.CaptionEncoder("words").about
    torch.save(saved, tmp_path / "gpt.pt")
    command = ["sample.py", "--vq", str(pair / "vq.pt"), "--gpt", str(tmp_path / "gpt.pt")]
    for name, prompt in ("one", "a red star"), ("two", "a red\r\nstar\n"):
        out = str(tmp_path / f"{name}.png")
        monkeypatch.setattr(sys, "argv", [*command, "--prompt", prompt, "--out", out])
        sample.main()
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--classes", "7"], "class 7 is out of range: ids go from 0 to 2"),
        (["--classes", "bird"], "class 'bird' is no class's name"),
        (["--gpt", "missing.pt"], "missing.pt"),
        (["--vq", "GPT"], "is not a tokenizer checkpoint"),
        (["--out", "a.jpg"], "give a name that ends in .png"),
        (["--pretrained", "B-256"], "give --vq and --gpt, or --pretrained"),
        (["--image-size", "256"], "makes 16 x 16 pixels"),
        (["--num-samples", "5", "--classes", "1", "--out", "a.npz"], "leave out --classes"),
        (["--top-p", "0"], "argument --top-p: 0 is not"),
        (["--seed", str(2**63)], "argument --seed: 9223372036854775808 is not"),
    ],
)
def test_a_mistake_gets_one_sentence(pair, flags, sentence):
    flags = [str(pair / "gpt.pt") if f == "GPT" else f for f in flags]
    result = run_script("sample.py", "--vq", pair / "vq.pt", "--gpt", pair / "gpt.pt", *flags)
    assert result.returncode == 2 and sentence in result.stderr and "Traceback" not in result.stderr


def test_another_tokenizer_is_refused(pair, tmp_path):
    other = torch.load(pair / "vq.pt", weights_only=True)
    other["model"]["decoder.conv_in.bias"] += 1
    torch.save(other, tmp_path / "vq.pt")
    result = run_script("sample.py", "--vq", tmp_path / "vq.pt", "--gpt", pair / "gpt.pt")
    assert result.returncode == 2 and "another tokenizer" in result.stderr


@pytest.mark.slow
def test_npz_is_balanced_and_the_same_for_any_number_of_processes_and_after_a_stop(
    pair, tmp_path, monkeypatch
):
    flags = [
        "--vq",
        pair / "vq.pt",
        "--gpt",
        pair / "gpt.pt",
        "--num-samples",
        600,
        "--cfg-scale",
        2,
        "--batch-size",
        128,
    ]
    for name, procs in (("one", 0), ("two", 2)):
        result = run_script("sample.py", *flags, "--out", tmp_path / f"{name}.npz", processes=procs)
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    with np.load(tmp_path / "one.npz", allow_pickle=False) as f:
        assert f["arr_0"].shape == (600, 16, 16, 3) and f["arr_0"].dtype == np.uint8
        assert f["labels"].dtype == np.int64 and np.bincount(f["labels"]).tolist() == [
            200,
            200,
            200,
        ]

    model, tokenizer = gpt.load_gpt(pair / "gpt.pt"), vq.load_vq(pair / "vq.pt")
    settings = dict(cfg_scale=2.0, cfg_interval=-1, temperature=1.0, top_k=2000, top_p=1.0)
    calls, generate = [], sample.generate

    def stops_at_the_fourth_batch(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    monkeypatch.setattr(sample, "generate", stops_at_the_fourth_batch)
    for _ in range(2):
        try:
            sample.write_npz(
                tmp_path / "three.npz", model, tokenizer, 600, batch_size=128, **settings
            )
        except KeyboardInterrupt:
            assert not (tmp_path / "three.npz").exists()
    assert (
        len(calls) == 3 + 1 + 3
    )  # two batches of the first chunk were kept, the others were made again
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "three.npz").read_bytes()


@pytest.mark.slow
def test_pretrained_fetches_the_released_files_once_and_samples_from_them(tmp_path):
    """Files of the released names, shapes and form, served from this machine in place of Hugging
    Face."""
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    files = tmp_path / "FoundationVision" / "LlamaGen" / "resolve" / "main"
    files.mkdir(parents=True)
    torch.save(
        {"model": vq.VQModel(vq.VQ_CONFIGS["VQ-16"]).half().state_dict()}, files / "vq_ds16_c2i.pt"
    )
    torch.save({"model": gpt.GPT(gpt.GPT_CONFIGS["B"]).half().state_dict()}, files / "c2i_B_256.pt")
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path)
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "NANOLLAMAGEN_CACHE": str(tmp_path / "cache"),
    }
    command = words("sample.py --pretrained B-256 --paper")
    command += ["--classes", "red fox"]
    first = run_script(*command, "--out", tmp_path / "a.png", env=env)
    server.shutdown()
    assert first.returncode == 0, first.stderr
    assert "cfg_scale 2.0" in first.stdout and "top_k 0" in first.stdout
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (256 + 8, 256 + 16 + 8)
    offline = run_script(*command, "--out", tmp_path / "b.png", env=env)
    assert offline.returncode == 0, offline.stderr  # the server is gone; the files are here
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    (tmp_path / "cache" / "c2i_B_256.pt").unlink()
    missing = run_script(*command, env=env)
    assert missing.returncode == 2 and "fetch it elsewhere and put it at" in missing.stderr
