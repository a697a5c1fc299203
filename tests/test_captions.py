"""What the files promise about captions: the released text model to the last digit, and one way
from text to pictures.

FLAN-T5 and CLIP are tiny here and randomly initialised, but saved to disk and loaded by the package
transformers as the real ones are; where it is missing, the tests that need it skip."""

import argparse
import json
import os
import sys
from dataclasses import asdict, replace
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    GPT,
    GPT_GRADIENT,
    SHALLOW,
    difference,
    fill,
    golden,
    released_keys,
    run_script,
)
from PIL import Image
from test_gpt import wrong_norm

import evaluate
import gpt
import sample
import train_gpt
import vq
from nanollamagen import captions, cleaning, files

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here asks a server
TINY = gpt.GPTConfig(
    dim=64,
    n_layer=2,
    n_head=4,
    vocab_size=40,
    grid=4,
    num_classes=0,
    cond_tokens=120,
    caption_dim=24,
)


# ---- the model ---------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def released():
    """The golden text model, its three captions of 7, 33 and 120 tokens, their mask, and what the
    reference computed."""
    expected, meta = golden("gpt_t2i")
    c, rule = meta["config"], meta["caption_rule"]
    model = fill(
        gpt.GPT(
            gpt.GPTConfig(
                dim=c["dim"],
                n_layer=c["n_layer"],
                n_head=c["n_head"],
                grid=8,
                num_classes=0,
                cond_tokens=120,
                caption_dim=2048,
                dropout=0,
                class_dropout=0,
            )
        )
    )
    features = np.zeros((len(rule["lengths"]), 120, 2048), np.float32)
    for i, n in enumerate(rule["lengths"]):
        noise = (
            np.random.RandomState(rule["seed"] + i).standard_normal((n, 2048)).astype(np.float32)
        )
        features[i, 120 - n :] = np.float32(rule["scale"]) * noise
    features, expected = (
        torch.from_numpy(features),
        {k.removeprefix("g8_"): v for k, v in expected.items()},
    )
    assert torch.equal(features[:, -2:, :8], expected["caption_probe"])
    return model.eval(), features, expected["emb_masks"].bool(), expected, meta


def random_model(config=TINY):
    """A small model whose output layer is not zero, so that predictions differ."""
    torch.manual_seed(0)
    model = gpt.GPT(config)
    torch.nn.init.normal_(model.output.weight, std=0.2)
    for q in model.cls_embedding.parameters():
        torch.nn.init.normal_(q, std=0.3)
    return model.eval()


def some_captions(*lengths, seed=0):
    """Features and mask of captions with so many tokens."""
    generator = torch.Generator().manual_seed(seed)
    return captions.pad_left(
        [torch.randn(n, TINY.caption_dim, generator=generator) for n in lengths]
    )


@torch.no_grad()
def test_teacher_forced_logits_are_the_reference_ones(released):
    """With the mask; and after "no caption" without one."""
    model, features, mask, expected, _ = released
    pos = expected["pos"].long() - 119  # ours begin where the first code is predicted
    after, pos, words = pos >= 0, pos[pos >= 0], expected["vocab_sel"].long()
    logits = model(expected["idx"].long(), features, mask)[:, pos]
    assert difference(logits[..., words], expected["logits"][:, after]) < GPT
    assert difference(logits.logsumexp(-1), expected["lse"][:, after]) < GPT
    assert torch.equal(logits.argmax(-1).int(), expected["argmax"][:, after])
    logits = model(expected["idx"][:1].long(), model.cls_embedding.uncond(features[:1]))[:, pos]
    assert difference(logits[..., words], expected["uncond_logits"][:, after]) < GPT
    assert difference(logits.logsumexp(-1), expected["uncond_lse"][:, after]) < GPT


@torch.no_grad()
def test_the_bound_tells_a_wrong_epsilon_and_swapped_axes(released, monkeypatch):
    """Most of all without a caption, whose embeddings are small."""
    model, features, mask, expected, _ = released
    pos = expected["pos"].long() - 119
    after, pos, words = pos >= 0, pos[pos >= 0], expected["vocab_sel"].long()

    def off():
        logits = model(expected["idx"].long(), features, mask)[:, pos][..., words]
        none = model(expected["idx"][:1].long(), model.cls_embedding.uncond(features[:1]))
        return (
            difference(logits, expected["logits"][:, after]),
            difference(none[:, pos][..., words], expected["uncond_logits"][:, after]),
        )

    rope = model.rope
    swapped = rope[120:].view(8, 8, -1, 2).transpose(0, 1).flatten(0, 1)
    monkeypatch.setattr(model, "rope", torch.cat([rope[:120], swapped]))
    assert min(off()) > 100 * GPT
    monkeypatch.setattr(model, "rope", rope)
    wrong_norm(monkeypatch)
    some, none = off()
    assert some > 2 * GPT and none > 100 * GPT


def test_the_mask_and_the_embedding_are_the_reference_ones(released):
    model, features, mask, expected, _ = released
    packed = np.packbits(gpt.who_sees_whom(torch.arange(184), 184, mask)[:, 0].numpy(), axis=-1)
    assert np.array_equal(packed, expected["attn_mask_packed"].numpy())
    embed = model.cls_embedding
    assert difference(embed(features)[:, [0, 60, 118, 119], :32], expected["cond_embed"]) < SHALLOW
    dropped = torch.cat([embed.uncond(features[:1]), features[1:]])
    assert (
        difference(embed(dropped)[:, [0, 60, 119], :8], expected["cond_embed_drop_first"]) < SHALLOW
    )


def test_training_loss_and_gradients_are_the_reference_ones(released):
    """Of the valid samples alone: what train_gpt.py leaves out has weight 0 there."""
    model, features, mask, expected, _ = released
    idx, valid = expected["idx"].long(), expected["valid"].bool()
    assert 0 < valid.sum() < len(valid)

    def nll(rows, mask):
        logits = model(idx[rows, :-1], features[rows], mask)
        return F.cross_entropy(logits.transpose(1, 2), idx[rows], reduction="none")

    try:
        model.train()
        with torch.no_grad():
            assert difference(nll(slice(None), mask), expected["train_nll"]) < GPT
            assert (
                difference(nll(slice(None), mask).mean(), expected["train_loss_unweighted"]) < GPT
            )
            assert difference(nll(slice(None), None).mean(), expected["train_loss_causal"]) < GPT
        loss = nll(valid, mask[valid]).mean()
        assert difference(loss, expected["train_loss"]) < GPT
        loss.backward()
        norms = {k: p.grad.double().norm() for k, p in model.named_parameters()}
        named = torch.stack([norms[k] for k in expected["grad_keys"].tolist()])
        assert difference(named, expected["grad_norms"]) < GPT_GRADIENT
        assert (
            difference(torch.stack(list(norms.values())).norm(), expected["grad_total_norm"])
            < GPT_GRADIENT
        )
    finally:
        model.eval().zero_grad()


def test_greedy_tokens_are_the_reference_ones(released):
    """Cached decoding at guidance 1 and 7.5, with the mask and without."""
    model, features, mask, expected, meta = released
    runs = {(run["cfg_scale"], run["emb_masks"]) for run in meta["generations"]}
    assert runs == {(1, True), (7.5, True), (7.5, False)}
    for run in meta["generations"]:
        codes = sample.generate(
            model,
            features,
            mask if run["emb_masks"] else None,
            cfg_scale=run["cfg_scale"],
            cfg_interval=run["cfg_interval"],
            top_k=1,
        )
        assert torch.equal(codes.int(), expected[run["key"].removeprefix("g8_")]), run["key"]


def test_the_775m_text_model_has_the_released_names_shapes_and_parameter_count():
    keys, parameters = released_keys("GPT-XL t2i")
    with torch.device("meta"):
        model = gpt.GPT(
            replace(gpt.GPT_CONFIGS["XL"], caption_dim=2048, cond_tokens=120, num_classes=0)
        )
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == keys
    assert (
        sum(p.numel() for p in model.parameters()) == parameters
    )  # "no caption" is a buffer: it is not trained


def test_a_released_text_file_is_recognised_by_its_shapes(tmp_path, monkeypatch):
    monkeypatch.setitem(
        gpt.GPT_CONFIGS, "XL", replace(TINY, caption_dim=0, num_classes=1000, cond_tokens=1)
    )
    torch.save({"model": gpt.GPT(TINY).state_dict()}, tmp_path / "t2i.pt")
    model = gpt.load_gpt(tmp_path / "t2i.pt", grid=32)
    assert model.config == replace(TINY, grid=32) and model.text is None


@torch.no_grad()
def test_what_stands_in_the_padding_never_matters():
    model, codes = random_model(), torch.randint(40, (2, 15))
    features, mask = some_captions(5, 120)
    before = model(codes, features, mask)
    features[0, :115] = 100.0
    assert torch.equal(model(codes, features, mask), before)
    assert torch.allclose(
        model(codes[:1], features[:1, 113:], mask[:1, 113:]), before[:1], atol=1e-5
    )  # less of it
    features[0, 117] += 1.0
    assert not torch.equal(
        model(codes, features, mask)[0], before[0]
    )  # so the test is able to fail


@torch.no_grad()
def test_cached_decoding_matches_one_full_forward():
    model, codes = random_model(), torch.randint(40, (3, 15))
    features, mask = some_captions(3, 60, 120)
    full, cache = model(codes, features, mask), model.new_cache(3)
    steps = [model.extend(model.cls_embedding(features), 0, cache, mask)]
    steps += [
        model.extend(model.tok_embeddings(codes[:, i : i + 1]), 120 + i, cache, mask)
        for i in range(15)
    ]
    assert torch.allclose(torch.cat(steps, 1), full, atol=1e-5)


def test_an_image_follows_from_its_seed_and_caption_whatever_its_batch():
    model, (features, mask) = random_model(), some_captions(4, 50, 120)
    for interval in (-1, 3):
        settings = dict(cfg_scale=7.5, cfg_interval=interval, top_k=30)
        together = sample.generate(model, features, mask, seeds=[5, 6, 7], **settings)
        alone = sample.generate(model, features[1:2], mask[1:2], seeds=[6], **settings)
        assert torch.equal(together[1:2], alone) and len(torch.unique(together, dim=0)) == 3
    with pytest.raises(ValueError, match="need all 120"):
        sample.generate(model, features[:, 20:], mask[:, 20:])


def test_captions_are_dropped_in_training_only():
    model = random_model(replace(TINY, dropout=0.0, class_dropout=1.0))
    codes, (features, mask) = torch.zeros(1, 3, dtype=torch.long), some_captions(9)
    none = model.cls_embedding.uncond(features)
    assert not torch.equal(model(codes, features, mask), model(codes, none, mask))
    model.train()
    assert torch.equal(model(codes, features, mask), model(codes, none, mask))


# ---- from text to features ---------------------------------------------------------------------
TEXTS = [
    "A small red star on blue",
    "a large green circle, on white!",
    "the quick brown fox",
    "it jumps over lazy dogs",
]


@pytest.fixture(scope="session")
def t5(tmp_path_factory):
    """A folder with a whole T5 and its tokenizer, as hubs hold them, of 40 features a token."""
    transformers = pytest.importorskip(
        "transformers", reason="needs transformers: pip install transformers"
    )
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("text") / "t5"
    pieces = Tokenizer(models.Unigram())
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces.train_from_iterator(
        [text.lower() for text in TEXTS] * 4,
        trainers.UnigramTrainer(
            vocab_size=80,
            special_tokens=["<pad>", "</s>", "<unk>"],
            unk_token="<unk>",
            show_progress=False,
        ),
    )
    vocab = [tuple(row) for row in json.loads(pieces.to_str())["model"]["vocab"]]
    tokenizer = transformers.T5Tokenizer(vocab=vocab, extra_ids=0)
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(tokenizer),
        d_model=40,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "text, clean",
    [  # what DeepFloyd IF's cleaning, as LlamaGen has it, gives for these
        ("  A Photo of   a CAT\n", "a photo of a cat"),
        ("see https://a.b/c?d=1 or www.x.org &amp; <b>this</b> dog.jpg", "see a. b c?d=1 or this"),
        ("“Best” picture—ever…  ‘really’", "best\" picture-ever… 'really"),
        ("a cat,two dogs (and #12345678 fish) by @someone", "a cat, two dogs and fish by"),
        ("ratio : 3...", "ratio: 3"),
        ("猫 a cat 猫", "a cat"),
        ("***", ""),
        ("says \"let's paint!", "says \"let's paint!"),
        ("“let's paint!”", "let's paint!"),
        ("a house, built in 12345 or 123456", "a house, built in 12345 or"),
        ("#123 #1234 #12345 on it", "1234 on it"),
        ("a 2x2 grid, 20×30 cm, 2.5x3", "a grid, cm, 2."),
        ("this-is-my-cute-cat_photo", "this is my cute cat photo"),
        ("a jack-in-the-box", "a jack-in-the-box"),
        ("1+1 is two+", "1 1 is two"),
        ("hello%20world", "hello world"),
        ("free shipping worldwide! download free", "worldwide!"),
        ("click for more cats, page 12, png images", "cats,"),
        ("ab1234 ab12cd 12ab34 a1b2c3 phone", "phone"),
        ("127.0.0.1 at 12:30 ", "at 12:30"),
        ("R&amp;B &lt;3", "r b <3"),
        ("caf&eacute; &#65;rt &quot;noir&quot;", 'café art "noir"'),
        ("1 < 2 and a <3 for <person>", "1 < 2 and a <3 for person"),
        ('"""AUSVERKAUFT"""', "ausverkauft"),
        (". . .", ". ."),
        (".hidden", ""),
        (".--2x2", "."),
        ("ﬁne ＦＵＬＬ „low” text", 'fine full "low" text'),
        ("-a dash, at the ends:-", "a dash, at the ends"),
        ("two\\nlines\nand\ttabs", "two lines and tabs"),
        ("movie.mp4, mail me@mail.com", "mail me"),
        ("co-op ½ cup © 2020", "co-op cup 2020"),
    ],
)
def test_captions_are_cleaned_as_the_released_models_saw_them(text, clean):
    assert cleaning.clean_caption(text) == clean


def test_no_caption_takes_the_cleaning_down():
    """A served model cleans what strangers send: unfinished markup, or 32,000 characters made to be
    slow."""
    assert cleaning.clean_caption("a <![cat") == "a <! cat"
    assert cleaning.clean_caption("a. " * 10_000) == cleaning.clean_caption("a. " * 1000)


@torch.no_grad()
def test_features_are_those_of_t5_padded_on_the_left(t5):
    from transformers import AutoTokenizer, T5EncoderModel

    features, mask = captions.encode_captions(TEXTS, t5, batch_size=3)
    assert features.shape == (4, 120, 40) and mask.shape == (4, 120) and mask.dtype == torch.bool
    assert not features[~mask].any()
    encoder, tokenizer = T5EncoderModel.from_pretrained(t5), AutoTokenizer.from_pretrained(t5)
    for i, text in enumerate(TEXTS):
        ids = tokenizer(cleaning.clean_caption(text), return_tensors="pt").input_ids
        n = ids.shape[1]
        assert mask[i].tolist() == [False] * (120 - n) + [True] * n
        assert torch.allclose(features[i, 120 - n :], encoder(ids).last_hidden_state[0], atol=1e-5)


def test_a_caption_of_more_than_120_tokens_is_cut_as_t5_cuts_it_and_counted(t5, capsys):
    from transformers import AutoTokenizer, T5EncoderModel

    long = "small red star " * 60
    features, mask = captions.encode_captions([TEXTS[0], long], t5)
    assert mask[1].all() and "warning: 1 of 2 captions cut to 120 tokens" in capsys.readouterr().err
    ids = AutoTokenizer.from_pretrained(t5)(
        long, truncation=True, max_length=120, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        assert torch.allclose(
            features[1], T5EncoderModel.from_pretrained(t5)(ids).last_hidden_state[0], atol=1e-5
        )


def test_the_stand_in_tells_words_apart_and_nothing_else():
    (features, mask), rows = (
        captions.encode_captions(["a red star", "a star, RED"], "words"),
        slice(117, 120),
    )
    assert mask.sum(1).tolist() == [3, 3] and features.shape == (2, 120, 64)
    assert torch.equal(features[0, rows][[0, 2, 1]], features[1, rows])
    assert (features[0, rows] @ features[0, rows].T / 64 - torch.eye(3)).abs().max() < 0.6


def test_missing_weights_or_package_get_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="--t5 anything needs transformers: pip install"):
        captions.encode_captions(["a"], "anything")
    monkeypatch.undo()
    pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
    for name in ("no/such-t5", tmp_path):
        with pytest.raises(OSError, match="cannot be loaded") as error:
            captions.encode_captions(["a"], str(name))
        assert "\n" not in str(error.value)


# ---- features on disk --------------------------------------------------------------------------
WORDS = ["red", "green", "blue"]


def caption_folder(path, grid=4, count=60, long=()):
    """Codes of images whose caption's colour tells which eight of 20 codes occur; some also have a
    short caption. Image 5 has an empty caption, and those in `long` have captions of 200 words."""
    path.mkdir(parents=True)
    rng, colour = np.random.RandomState(0), np.arange(count) % 3
    codes = (colour[:, None, None] * 5 + rng.randint(0, 8, (count, 1, grid**2))) % 20
    np.save(path / "codes.npy", codes.astype(np.uint16))
    meta = {
        "classes": [],
        "captions": True,
        "h": grid,
        "codes": grid * grid,
        "w": grid,
        "codebook_size": 20,
        "image_size": 4 * grid,
        "tokenizer": vq.weights_hash(tiny_tokenizer()),
        "skipped": [],
    }
    (path / "meta.json").write_text(json.dumps(meta))
    with open(path / "captions.jsonl", "w") as f:
        for i in range(count):
            row = {
                "caption": ""
                if i == 5
                else f"a {WORDS[colour[i]]} thing" + " again" * (197 * (i in long))
            }
            f.write(json.dumps(row | ({"short_caption": WORDS[colour[i]]} if i % 2 else {})) + "\n")
    return path


@cache
def tiny_tokenizer():
    """16 pixels <-> 4 x 4 codes of 20."""
    torch.manual_seed(0)
    return vq.VQModel(
        vq.VQConfig(ch=32, ch_mult=(1, 1, 1), res_blocks=1, z_channels=32, codebook_size=20)
    )


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """Its checkpoint."""
    path, model = tmp_path_factory.mktemp("tokenizer") / "vq.pt", tiny_tokenizer()
    torch.save(
        {"model": model.state_dict(), "config": asdict(model.config), "image_size": 16}, path
    )
    return path


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    """Sixty images with captions, read by the stand-in."""
    folder = caption_folder(tmp_path_factory.mktemp("data") / "codes")
    assert (
        run_script("nanollamagen.captions", "encode", "--codes", folder, "--t5", "words").returncode
        == 0
    )
    return folder


def test_features_on_disk_are_those_of_each_caption_without_padding(t5, tmp_path):
    folder = caption_folder(tmp_path / "codes", count=30, long=[7, 9])
    result = run_script("nanollamagen.captions", "encode", "--codes", folder, "--t5", t5)
    assert result.returncode == 0, result.stderr
    assert "1 empty caption, 2 cut to 120 tokens" in result.stdout
    text, spans, about = captions.load_text(folder)
    assert text.dtype == np.float16 and isinstance(text, np.memmap) and isinstance(spans, np.memmap)
    assert about["encoder"] == str(t5) and about["dim"] == 40
    assert (np.diff(spans[5, 0]), np.diff(spans[7, 0]), np.diff(spans[4, 1])) == (0, 120, 0)
    features, mask = captions.encode_captions(["a red thing", "green"], t5)
    for i, (row, keep, which) in enumerate(zip(features, mask, (0, 1))):
        a, b = spans[(6, 7)[i], which]
        assert np.allclose(text[a:b], row[keep], atol=2e-3)
    assert (
        "Nothing to do"
        in run_script("nanollamagen.captions", "encode", "--codes", folder, "--t5", t5).stdout
    )


def test_an_interrupted_run_goes_on_and_two_processes_write_what_one_writes(
    tmp_path, monkeypatch, capsys
):
    folders = [
        caption_folder(tmp_path / name, count=2500, long=[1500]) for name in ("one", "cut", "two")
    ]
    args = [
        argparse.Namespace(codes=str(f), t5="words", batch_size=64, device="cpu") for f in folders
    ]
    captions.encode(args[0])
    calls, encode = [], captions.CaptionEncoder.__call__

    def stops_at_the_second_part(self, *rest):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(self, *rest)

    monkeypatch.setattr(captions.CaptionEncoder, "__call__", stops_at_the_second_part)
    with pytest.raises(KeyboardInterrupt):
        captions.encode(args[1])
    with pytest.raises(
        ValueError, match="make them with: python -m nanollamagen.captions encode --codes"
    ):
        captions.load_text(folders[1])
    captions.encode(args[1])
    assert len(calls) == 1 + 1 + 2  # the first part was kept
    result = run_script(
        "nanollamagen.captions", "encode", "--codes", folders[2], "--t5", "words", processes=2
    )
    assert result.returncode == 0, result.stderr
    assert (
        "1 cut to 120 tokens" in capsys.readouterr().out and "1 cut to 120 tokens" in result.stdout
    )
    names = sorted(p.name for p in folders[0].iterdir())
    assert names == [
        "captions.jsonl",
        "codes.npy",
        "meta.json",
        "text.json",
        "text.npy",
        "text_spans.npy",
    ]
    for folder in folders[1:]:
        assert sorted(p.name for p in folder.iterdir()) == names
        assert all((folder / n).read_bytes() == (folders[0] / n).read_bytes() for n in names)


@pytest.mark.parametrize(
    "line, sentence",
    [
        ('{"text": "a cat"}', 'line 8: expected {"caption": "..."}'),
        ('{"caption": null}', 'line 8: expected {"caption": "..."}'),
        ("a cat", 'line 8: expected {"caption": "..."}'),
        (None, "captions.jsonl has fewer lines than codes.npy has images"),
    ],
)
def test_a_line_without_a_caption_gets_one_sentence(tmp_path, line, sentence):
    folder = caption_folder(tmp_path / "codes")
    lines = (folder / "captions.jsonl").read_text().splitlines()
    (folder / "captions.jsonl").write_text(
        "\n".join(lines[:7] + ([line] + lines[8:] if line else [])) + "\n"
    )
    result = run_script("nanollamagen.captions", "encode", "--codes", folder, "--t5", "words")
    assert result.returncode == 2 and sentence in result.stderr and "Traceback" not in result.stderr


def test_features_of_another_encoder_are_not_mixed(codes, t5):
    result = run_script("nanollamagen.captions", "encode", "--codes", codes, "--t5", t5)
    assert (
        result.returncode == 2
        and "tells of another encoder or other captions (words, 64 features per token)"
        in result.stderr
    )


# ---- training ----------------------------------------------------------------------------------
def flags_for(codes, out, *flags):
    """The flags of a small and quick run."""
    return [
        str(f)
        for f in (
            "--codes",
            codes,
            "--out",
            out,
            "--model",
            "demo",
            "--batch-size",
            8,
            "--lr",
            9.375e-4,  # = 0.03 * 8 / 256
            "--log-every",
            1,
            "--device",
            "cpu",
            *flags,
        )
    ]


def train(monkeypatch, *args):
    """One run within this process."""
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", *flags_for(*args)])
    train_gpt.main()


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out):
    return [record["loss"] for record in log(out)]


def test_training_learns_what_the_caption_tells_and_remembers_the_encoder(
    codes, tokenizer, tmp_path, monkeypatch, capsys
):
    train(
        monkeypatch,
        codes,
        tmp_path / "run",
        "--max-steps",
        60,
        "--val-images",
        6,
        "--val-every",
        60,
        "--vq",
        tokenizer,
    )
    out = capsys.readouterr().out
    assert "captions through words (64 features); left out: 1 image without a caption" in out
    assert "first loss should be ln(20) = 3.00" in out and losses(tmp_path / "run")[
        0
    ] == pytest.approx(np.log(20), abs=1e-5)
    assert losses(tmp_path / "run")[-1] < 2.5  # ln 8 = 2.08 is the best possible
    assert log(tmp_path / "run")[-1]["val_loss"] < 2.6
    model = gpt.load_gpt(tmp_path / "run" / "ckpt.pt")
    assert (
        model.text == {"encoder": "words", "dim": 64, "hash": "words"}
        and model.config.caption_dim == 64
    )
    with Image.open(tmp_path / "run" / "samples_000060.png") as image:
        assert image.size == (10 * 100 + 4, 2 * 116 + 4)  # ten captions, two images each


def test_short_captions_come_in_three_of_ten_and_images_without_a_caption_never(
    codes, tmp_path, monkeypatch
):
    """Counted by the lengths of what is taken: two words too long or one, of those that have
    both."""
    taken, pad = [], captions.pad_left

    def recorder(rows, c):
        taken.extend(len(row) for row in rows)
        return pad(rows, c)

    monkeypatch.setattr(captions, "pad_left", recorder)
    monkeypatch.setitem(gpt.GPT_CONFIGS, "demo", gpt.GPTConfig(dim=32, n_layer=1, n_head=2))
    train(monkeypatch, codes, tmp_path / "run", "--epochs", 20)
    assert len(taken) == 8 * -(-20 * 59 // 8) and set(taken) == {1, 3}
    both = 20 * 29  # 30 odd images, of which image 5 has no caption
    assert abs(taken.count(1) / both - 0.3) < 4 * (0.3 * 0.7 / both) ** 0.5


def test_a_resumed_run_equals_an_uninterrupted_one(codes, tmp_path, monkeypatch):
    flags = ["--ema-decay", 0.99, "--micro-batch", 4]
    train(monkeypatch, codes, tmp_path / "whole", *flags, "--max-steps", 8)
    train(monkeypatch, codes, tmp_path / "cut", *flags, "--max-steps", 5)
    train(monkeypatch, codes, tmp_path / "cut", *flags, "--max-steps", 8, "--resume")
    one, two = (files.read_checkpoint(tmp_path / name / "ckpt.pt") for name in ("whole", "cut"))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert all(
        torch.equal(one[part][k], two[part][k]) for part in ("model", "ema") for k in one[part]
    )
    assert torch.equal(
        one["ema"]["cls_embedding.uncond_embedding"], one["model"]["cls_embedding.uncond_embedding"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--micro-batch", 2], ["--parallel", "fsdp"]])
def test_two_processes_give_the_losses_of_one(codes, tmp_path, monkeypatch, flags):
    still = [
        "--dropout",
        0,
        "--class-dropout",
        0,
        "--max-steps",
        30,
        "--val-images",
        7,
        "--val-every",
        15,
        "--ema-decay",
        0.9,
    ]
    train(monkeypatch, codes, tmp_path / "one", *still)
    result = run_script(
        "train_gpt.py", *flags_for(codes, tmp_path / "two", *still, *flags), processes=2
    )
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    assert log(tmp_path / "two")[-1]["val_loss"] == pytest.approx(
        log(tmp_path / "one")[-1]["val_loss"], abs=1e-4
    )
    assert losses(tmp_path / "one")[-1] < 2.8  # so that there was something to differ
    one, two = (files.read_checkpoint(tmp_path / name / "ckpt.pt") for name in ("one", "two"))
    for part in ("model", "ema"):
        assert max(float((v - one[part][k]).abs().max()) for k, v in two[part].items()) < 1e-3


@pytest.mark.slow
def test_from_captions_to_pictures_in_two_stages_through_t5(t5, tokenizer, tmp_path):
    """Stage I on 4 x 4 codes, stage II from its weights on 8 x 8, samples of three captions: all by
    the command line."""

    def go(*args):
        result = run_script(*args)
        assert result.returncode == 0, result.stderr
        return result.stdout

    for stage, grid, more in (
        (1, 4, ["--max-steps", 60]),
        (2, 8, ["--max-steps", 1, "--init", tmp_path / "1" / "ckpt.pt"]),
    ):
        go(
            "nanollamagen.captions",
            "encode",
            "--codes",
            caption_folder(tmp_path / f"codes{stage}", grid),
            "--t5",
            t5,
        )
        out = go(
            "train_gpt.py",
            *flags_for(tmp_path / f"codes{stage}", tmp_path / str(stage), "--dropout", 0, *more),
        )
        assert ("the first weights are those of" in out) == (stage == 2)
    assert (
        losses(tmp_path / "1")[0] == pytest.approx(3.0, abs=0.01)
        and losses(tmp_path / "2")[0] < 2.9
    )
    model = gpt.load_gpt(tmp_path / "2" / "ckpt.pt")
    assert model.config.grid == 8 and model.text["encoder"] == str(t5)
    out = go(
        "sample.py",
        "--vq",
        tokenizer,
        "--gpt",
        tmp_path / "2" / "ckpt.pt",
        "--prompt",
        "a red thing",
        "--prompt",
        "a blue thing",
        "--out",
        tmp_path / "a.png",
        "--resize",
        96,
    )
    assert "cfg_scale 7.5" in out and "top_k 1000" in out
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (2 * 100 + 4, 96 + 16 + 8)


# ---- samples and scores ------------------------------------------------------------------------
@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Checkpoints of two untrained models for that tokenizer: text.pt for captions read by the
    stand-in, class.pt."""
    folder = tmp_path_factory.mktemp("models")
    for name, config, more in (
        (
            "text",
            replace(TINY, vocab_size=20, caption_dim=64),
            {"text": captions.CaptionEncoder("words").about},
        ),
        (
            "class",
            gpt.GPTConfig(dim=64, n_layer=2, n_head=4, vocab_size=20, grid=4, num_classes=3),
            {},
        ),
    ):
        torch.manual_seed(0)
        model = gpt.GPT(config)
        torch.nn.init.normal_(model.output.weight, std=0.2)
        state = {"model": model.state_dict(), "config": asdict(config), **more}
        torch.save({**state, "tokenizer": vq.weights_hash(tiny_tokenizer())}, folder / f"{name}.pt")
    return folder


@pytest.mark.slow
def test_npz_of_prompts_is_balanced_and_the_same_on_two_processes(models, tokenizer, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red thing\n\na blue thing\ngreen\n")
    for name, procs in (("one", 0), ("two", 2)):
        result = run_script(
            "sample.py",
            "--vq",
            tokenizer,
            "--gpt",
            models / "text.pt",
            "--prompts",
            tmp_path / "prompts.txt",
            "--num-samples",
            300,
            "--batch-size",
            150,
            "--out",
            tmp_path / f"{name}.npz",
            processes=procs,
        )
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    with np.load(tmp_path / "one.npz", allow_pickle=False) as f:
        assert f["arr_0"].shape == (300, 16, 16, 3) and f["labels"].tolist() == [0, 1, 2] * 100


@pytest.mark.parametrize(
    "name, flags, sentence",
    [
        ("text", ["--classes", "1"], "is for captions: give --prompt, not --classes"),
        ("text", [], "is for captions: give --prompt, not --classes"),
        (
            "class",
            ["--prompt", "a cat"],
            "is for classes: give --classes, not --prompt",
        ),
        ("text", ["--prompt", "***"], "the caption '***' has no words"),
        ("text", ["--prompts", "nowhere.txt"], "nowhere.txt"),
        (
            "text",
            ["--prompt", "a cat", "--t5", "T5"],
            "(40 features per token) is not the encoder that the GPT was trained with (words, 64)",
        ),
    ],
)
def test_a_prompt_that_does_not_fit_gets_one_sentence(
    models, tokenizer, name, flags, sentence, request
):
    flags = [request.getfixturevalue("t5") if f == "T5" else f for f in flags]
    result = run_script("sample.py", "--vq", tokenizer, "--gpt", models / f"{name}.pt", *flags)
    assert result.returncode == 2 and sentence in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--init", "class.pt"], "is a model for classes, but"),
        (["--init", "text.pt"], "dim 64 there, 128 here"),
        (["--init", "wide.pt"], "caption_dim 24 there, 64 here"),
        (["--init", "other.pt"], "was trained on captions of another encoder (somebody's)"),
    ],
)
def test_weights_or_codes_that_do_not_fit_get_one_sentence(
    models, codes, tmp_path, monkeypatch, capsys, flags, sentence
):
    demo = gpt.GPTConfig(
        **{
            **asdict(gpt.GPT_CONFIGS["demo"]),
            "vocab_size": 20,
            "cond_tokens": 120,
            "num_classes": 0,
            "grid": 4,
        }
    )
    for name, dim, text in (
        ("wide", 24, None),
        ("other", 64, {"encoder": "somebody's", "dim": 64, "hash": "0"}),
    ):
        model = gpt.GPT(replace(demo, caption_dim=dim))
        torch.save(
            {"model": model.state_dict(), "config": asdict(model.config), "text": text},
            tmp_path / f"{name}.pt",
        )
    found = {f.name: f for folder in (models, tmp_path) for f in folder.glob("*.pt")}
    with pytest.raises(SystemExit) as stop:
        train(
            monkeypatch,
            codes,
            tmp_path / "run",
            "--max-steps",
            1,
            *(found.get(f, f) for f in flags),
        )
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


def test_training_without_features_says_how_to_make_them(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        train(monkeypatch, caption_folder(tmp_path / "codes"), tmp_path / "run", "--max-steps", 1)
    assert (
        stop.value.code == 2
        and "make them with: python -m nanollamagen.captions encode --codes"
        in capsys.readouterr().err
    )


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """A folder with a CLIP and its tokenizer, of 30-pixel images."""
    transformers = pytest.importorskip(
        "transformers", reason="needs transformers: pip install transformers"
    )
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("text") / "clip"
    words = ["<pad>", "<s>", "</s>", "<unk>", "a", "red", "blue", "thing"]
    tokens = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(folder)
    torch.manual_seed(0)
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=dict(
                vocab_size=8,
                max_position_embeddings=20,
                eos_token_id=2,
                bos_token_id=1,
                pad_token_id=0,
                **small,
            ),
            vision_config=dict(image_size=30, patch_size=10, **small),
            projection_dim=16,
        )
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("prefix", [None, ""])
def test_clip_scores_each_image_with_its_own_caption(prefix, clip, tmp_path, monkeypatch, capsys):
    """As if one image at a time went through CLIP's two towers; the caption is the one that the
    label numbers. Before it stand, as in the official evaluation, three words."""
    from transformers import AutoTokenizer, CLIPModel

    prompts, rng = ["a red thing", "blue", "a thing"], np.random.RandomState(0)
    images, labels = rng.randint(0, 256, (7, 30, 30, 3), np.uint8), np.arange(7) % 3
    np.savez(tmp_path / "a.npz", arr_0=images, labels=labels)
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), AutoTokenizer.from_pretrained(clip)
    mean, std = (
        np.array([0.48145466, 0.4578275, 0.40821073]),
        np.array([0.26862954, 0.26130258, 0.27577711]),
    )
    expected = []
    for image, label in zip(images, labels):
        pixels = torch.from_numpy((image / 255 - mean) / std).permute(2, 0, 1)[None].float()
        with torch.no_grad():
            text = ("A photo depicts " if prefix is None else prefix) + prompts[label]
            out = model(**tokenizer(text, return_tensors="pt"), pixel_values=pixels)
        expected.append(float(100 * F.cosine_similarity(out.image_embeds, out.text_embeds)))
    flags = [
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--samples",
        str(tmp_path / "a.npz"),
        "--device",
        "cpu",
        *([] if prefix is None else ["--prefix", prefix]),
    ]
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "evaluate.py",
            "clip",
            *flags,
            "--clip",
            str(clip),
            "--batch-size",
            "4",
            "--json",
            str(tmp_path / "a.json"),
        ],
    )
    evaluate.main()
    assert "CLIP score" in capsys.readouterr().out
    score = json.loads((tmp_path / "a.json").read_text())["metrics"]["CLIP score"]
    assert score == pytest.approx(np.mean(expected), abs=1e-3) and np.std(expected) > 0.1
    for words, sentence in (
        (["--clip", str(tmp_path)], "cannot be loaded"),
        (["--clip", str(clip)], "has 2 captions"),
    ):
        if "2 captions" in sentence:
            (tmp_path / "prompts.txt").write_text("one\ntwo\n")
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "clip", *flags, *words])
        with pytest.raises(SystemExit) as stop:
            evaluate.main()
        assert stop.value.code == 2 and sentence in capsys.readouterr().err
