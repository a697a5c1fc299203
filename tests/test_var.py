"""What extras/var.py promises: VAR's official arithmetic to the last code, and pictures that follow
from their seeds."""

import copy
import json
import math
import os
import runpy
import subprocess
import sys
import zlib
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    GOLDEN,
    ROOT,
    SUMS,
    VAR,
    VAR_GRADIENT,
    VQ,
    VQ_GRADIENT,
    difference,
    golden,
    rounding,
    with_epsilon,
    with_swapped_kernels,
)

import gpt
import sample
import train_gpt
import vq
from nanollamagen import data, files, runs, shapes

sys.path.insert(0, str(ROOT / "extras"))
import train_var
import var
import var_model
import var_vq

KEYS = json.loads((GOLDEN / "var" / "var_state_dict_keys.json").read_text())
ZEROS = ("ema_vocab_hit_SV", "zero_k_bias")


def weight(name, shape):
    """An official tensor by the rule of golden/var/README.md."""
    r = np.random.RandomState(zlib.crc32(("golden:" + name).encode()) & 0xFFFFFFFF)
    r = torch.from_numpy(r.standard_normal(tuple(shape)).astype(np.float32))
    half = (
        "quantize.embedding.weight",
        "class_emb.weight",
        "lvl_embed.weight",
        "pos_start",
        "pos_1LC",
    )
    if name.endswith(ZEROS):
        return torch.zeros_like(r)
    if name.endswith("scale_mul_1H11"):
        r = math.log(4) + 0.5 * r
        if name.startswith("blocks.0."):
            r[0, 0, 0, 0] = 5.0
        return r
    if name.endswith((".q_bias", ".v_bias")):
        return 0.2 * r
    if name.endswith(".bias"):
        return 0.02 * r
    if r.dim() == 1:
        return 1 + 0.1 * r
    if name in half or name.endswith("ada_gss"):
        return (0.5 if name in half else 0.3) * r
    if name == "head.weight" or "ada_lin" in name:
        return 2 / shape[1] ** 0.5 * r
    return r / math.prod(shape[1:]) ** 0.5


def official_tokenizer(meta):
    """(our config, {official name: golden weight}) of a tokenizer with meta's sizes; our shapes
    under their names."""
    config = replace(
        var_vq.TOKENIZERS["VAR-256"],
        ch=meta["ch"],
        z_channels=meta["Cvae"],
        codebook_size=meta["V"],
        code_dim=meta["Cvae"],
        scales=tuple(meta["patch_nums"]),
    )
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in var_vq.ScaleVQ(config).state_dict().items()}
    state = {}
    for name in KEYS["vae_ch160v4096z32.pth"]["keys"]:
        ours = var_vq.our_name(name)
        shape = shapes[ours.replace("qkv", "q")]
        state[name] = weight(name, (3 * shape[0], *shape[1:]) if "qkv" in name else shape)
    return config, state


def tokenizer(meta):
    """Our tokenizer with the golden weights."""
    config, state = official_tokenizer(meta)
    model = var_vq.ScaleVQ(config)
    model.load_state_dict(var_vq.ScaleVQ.released(state)[1])
    return model.eval()


def transformer(meta):
    """Our transformer with the golden weights."""
    model = var_model.VAR(
        var_model.VARConfig(
            meta["depth"],
            tuple(meta["patch_nums"]),
            meta["V"],
            meta["Cvae"],
            meta["num_classes"],
            meta["shared_aln"],
        )
    )
    keep = ("lvl_1L", "attn_bias_for_masking")
    model.load_state_dict(
        {k: v if k in keep else weight(k, v.shape) for k, v in model.state_dict().items()}
    )
    return model.eval()


def thin(images, like):
    """Every n-th pixel, n as in the stored picture."""
    step = round(images.shape[-1] / like.shape[-1])
    return images[..., ::step, ::step]


# ---- tokenizer ---------------------------------------------------------------------------------
def test_the_tokenizer_encodes_decodes_and_learns_as_the_official_one():
    g, meta = golden("var/var_tok_small")
    model = tokenizer(meta)
    q = model.quantize
    with torch.no_grad():
        f = model.latents(g["image"])
        assert difference(f, g["f"]) < VQ
        codes = model.encode(g["image"])
        assert torch.equal(codes.int(), g["codes"])
        sums = list(q.sums(codes))
        assert difference(torch.stack(sums), g["f_hat"]) < SUMS
        assert difference(model.decode(codes), g["recon"]) < VQ
        parts = torch.stack([thin(model.to_images(f_hat), g["recon_part"]) for f_hat in sums])
        assert difference(parts, g["recon_part"]) < VQ
        assert difference(q.teacher_input(codes), g["var_input"]) < SUMS
        random_codes = g["given_codes"].long()
        f_hat = list(q.sums(random_codes))[-1]
        assert difference(f_hat, g["given_f_hat"]) < SUMS
        assert difference(model.decoder(model.post_quant_conv(f_hat)), g["given_decoded"]) < VQ
        assert difference(q.teacher_input(random_codes), g["given_var_input"]) < SUMS

    model.train()
    decoded, losses = model(g["image"])
    assert difference(thin(decoded, g["train_decoded_part"]), g["train_decoded_part"]) < VQ
    assert difference(losses["vq"], g["vq_loss_beta0"]) < SUMS
    assert difference(losses["vq"] + losses["commit"], g["vq_loss"]) < SUMS
    assert difference(q.ema_vocab_hit_SV, g["hits_after_1"]) < rounding(8)
    assert difference(100 * q.used().float().mean(1), g["usages_percent"]) < rounding(8)
    with torch.no_grad():
        model(g["image"])
    assert difference(q.ema_vocab_hit_SV, g["hits_after_2"]) < rounding(8)

    loss = (decoded - g["image"]).abs().mean() + losses["vq"] + losses["commit"]
    assert difference(loss, g["grad_loss"]) < VQ
    latents = model.latents(g["image"]).detach().requires_grad_()
    model.latents = lambda images: latents
    decoded, losses = model(g["image"])
    ((decoded - g["image"]).abs().mean() + losses["vq"] + losses["commit"]).backward()
    assert difference(latents.grad, g["grad_f"]) < VQ_GRADIENT
    first = q.embedding.weight.grad[codes[0, 0]]
    assert difference(first, g["grad_codebook_first_code"]) < VQ_GRADIENT
    model.zero_grad()
    loss.backward()
    parameters = dict(model.named_parameters())
    names = [var_vq.our_name(k) for k in g["grad_keys"].tolist()]
    grads = [
        [parameters[k.replace("qkv", part)].grad for part in ("qkv" if "qkv" in k else "q")]
        for k in names
    ]
    norms = torch.stack(
        [torch.cat([x.flatten() for x in group]).double().norm() for group in grads]
    )
    assert difference(norms, g["grad_norms"]) < VQ_GRADIENT


@torch.no_grad()
def test_the_bounds_tell_wrong_epsilons_and_swapped_axes(monkeypatch):
    g, meta = golden("var/var_tok_small")
    for plant in (lambda m: with_epsilon(m, torch.nn.GroupNorm, 1e-5), with_swapped_kernels):
        assert difference(plant(tokenizer(meta)).latents(g["image"]), g["f"]) > 3 * VQ

    g, meta = golden("var/var_d2")
    model, q = transformer(meta), tokenizer(meta).quantize

    def off(codes):
        logits = model(q.teacher_input(codes), g["labels"].long())
        return difference(logits[:, g["pos"].long()][..., g["vocab_sel"].long()], g["logits"])

    codes = g["codes"].long()
    assert off(codes) < VAR
    grids = [x.unflatten(1, (p, p)).mT for p, x in zip((1, 2, 3, 4), codes.split((1, 4, 9, 16), 1))]
    assert off(torch.cat([x.flatten(1) for x in grids], 1)) > 100 * VAR
    norm = F.layer_norm
    monkeypatch.setattr(F, "layer_norm", lambda *a, eps: norm(*a, eps=1e-5))
    assert off(codes) > VAR


@pytest.fixture(scope="module")
def full():
    """The released size, 109M parameters, with the golden weights."""
    g, meta = golden("var/var_tok_full")
    return tokenizer(meta), g, meta


def test_the_released_size_gives_the_official_codes_at_256_and_512_pixels(full):
    model, g, meta = full
    q = model.quantize
    assert sum(p.numel() for p in model.parameters()) == KEYS["vae_ch160v4096z32.pth"]["parameters"]
    with torch.no_grad():
        f_hat, losses, codes = q(g["f"])
        assert torch.equal(codes.int(), g["codes"])
        assert difference(losses["vq"] + losses["commit"], g["vq_loss"]) < SUMS
        assert difference(f_hat, g["f_hat_last"]) < SUMS
        sums = torch.stack(list(q.sums(codes)))
        assert difference(sums[:, :, ::8], g["f_hat_part"]) < SUMS
        assert difference(sums.double().square().mean((1, 2, 3, 4)).sqrt(), g["f_hat_rms"]) < SUMS
        inputs = q.teacher_input(codes)
        assert difference(inputs[:, g["var_input_rows"].long()], g["var_input_part"]) < SUMS
        assert difference(inputs.square().mean().sqrt(), g["var_input_rms"]) < SUMS
        decoded = model.decoder(model.post_quant_conv(sums[-1]))
        assert difference(decoded[:, :, 3::16, 5::16], g["decoded_unclamped_part"]) < VQ
        recon = model.decode(codes)
        assert difference(thin(recon, g["recon_part"]), g["recon_part"]) < VQ
        assert difference(recon.square().mean().sqrt(), g["recon_rms"]) < VQ

        q.use(meta["q512"]["patch_nums"])
        f = (
            np.random.RandomState(meta["q512"]["seed"])
            .standard_normal((1, 32, 11, 11))
            .astype(np.float32)
        )
        f = F.interpolate(torch.from_numpy(f), size=(32, 32), mode="bilinear", align_corners=False)
        codes = q(f)[2]
        sums = torch.stack(list(q.sums(codes)))
        q.use(meta["patch_nums"])
    assert torch.equal(codes.int(), g["q512_codes"])
    assert difference(sums[-1][:, ::8], g["q512_f_hat_last_part"]) < SUMS
    assert difference(sums.double().square().mean((1, 2, 3, 4)).sqrt(), g["q512_f_hat_rms"]) < SUMS


def test_which_convolution_a_scale_takes_follows_float64_where_two_ticks_tie(full):
    g, _ = golden("var/var_parts")
    q = var_vq.ScaleQuantizer(var_vq.TOKENIZERS["VAR-demo"])
    for count in (4, 5, 7, 10, 14):
        q.use(range(1, count + 1))
        assert q.phi == g[f"phi_of_scale_K4_S{count}"].tolist()
    ticks, places = torch.linspace(1 / 12, 11 / 12, 4), torch.arange(10) / 9
    assert (places[:, None] - ticks).abs().argmin(1).tolist() != g[
        "phi_of_scale_K4_S10"
    ].tolist()  # the trap: float32

    model, g, _ = full  # one tie decided the other way changes many codes
    phi = model.quantize.phi
    model.quantize.phi = phi[:2] + [0] + phi[3:]
    with torch.no_grad():
        codes = model.quantize(g["f"])[2]
    model.quantize.phi = phi
    assert (codes != g["codes"]).float().mean() > 0.2


# ---- transformer -------------------------------------------------------------------------------
@pytest.mark.parametrize("size", ["d16", "d20", "d24", "d30", "d36"])
def test_names_shapes_and_parameter_counts_are_those_of_the_released_checkpoints(size):
    released = KEYS[f"var_{size}.pth"]
    with torch.device("meta"):
        model = var_model.VAR(var_model.VAR_CONFIGS[size])
    expected = {}
    for name, shape in released["keys"].items():
        for i in range(released["n_layer"] if "{i}" in name else 1):
            expected[name.replace("{i}", str(i))] = shape
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == expected
    assert sum(p.numel() for p in model.parameters()) == released["parameters"]
    assert model.blocks[-1].drop == pytest.approx(released["config"]["drop_path_rate"])


@pytest.fixture(
    scope="module", params=["var_d2", "var_shared", pytest.param("var_d4", marks=pytest.mark.slow)]
)
def pair(request):
    """A transformer and a tokenizer with the golden weights, and what the official code computed
    with them."""
    g, meta = golden(f"var/{request.param}")
    return transformer(meta), tokenizer(meta), g, meta


def test_teacher_forced_logits_losses_and_gradients_are_the_official_ones(pair):
    model, tok, g, meta = pair
    codes, labels, scales = g["codes"].long(), g["labels"].long(), meta["patch_nums"]
    stream = []
    hooks = [
        block.register_forward_hook(lambda block, args, x: stream.append(x))
        for block in model.blocks
    ]
    hooks.append(
        model.blocks[0].register_forward_pre_hook(lambda block, args: stream.append(args[0]))
    )
    logits = model(tok.quantize.teacher_input(codes), labels)
    for hook in hooks:
        hook.remove()
    rms = torch.stack([x.double().square().mean().sqrt() for x in stream])
    assert difference(rms, g["resid_rms"]) < VAR
    pos = g["pos"].long()
    assert difference(torch.stack([x[:, pos[:12], :8] for x in stream]), g["resid_part"]) < VAR
    assert difference(logits[:, pos][..., g["vocab_sel"].long()], g["logits"]) < VAR
    assert difference(logits.logsumexp(-1)[:, pos], g["lse"]) < VAR
    assert torch.equal(logits.argmax(-1)[:, pos].int(), g["argmax"])

    each = F.cross_entropy(logits.transpose(1, 2), codes, reduction="none")
    loss = each.mean()
    assert difference(loss, g["loss"]) < VAR
    of_scale = torch.stack([part.mean() for part in each.split([p * p for p in scales], 1)])
    assert difference(of_scale, g["loss_of_scale"]) < VAR
    assert difference(of_scale[-1], g["loss_tail"]) < VAR
    smoothed = F.cross_entropy(logits.transpose(1, 2), codes, label_smoothing=0.1)
    assert difference(smoothed, g["loss_smoothing_0p1"]) < VAR
    model.zero_grad()
    loss.backward()
    parameters = dict(model.named_parameters())
    norms = torch.stack([parameters[k].grad.double().norm() for k in g["grad_keys"].tolist()])
    assert difference(norms, g["grad_norms"]) < VAR_GRADIENT
    assert (
        difference(parameters["blocks.0.attn.scale_mul_1H11"].grad.flatten(), g["grad_scale_mul"])
        < VAR_GRADIENT
    )
    total = torch.stack([q.grad.double().norm() for q in parameters.values()]).norm()
    assert difference(total, g["grad_total_norm"]) < VAR_GRADIENT


def sampled(model, quantizer, g, run):
    """The codes (B, L) of one of meta's runs, and the sums after each scale (S, B, D, h, w)."""
    labels, edit = torch.tensor(run["labels"]), {}
    if "box_y0x0y1x1" in run:
        kept = var.kept_codes(run["box_y0x0y1x1"], model.config.scales, not run["inpainting"])
        assert torch.equal(kept.byte(), g[f"{run['key']}_kept"])
        edit = {"photo_codes": g["image_codes"].long(), "kept": kept}
    steps = var.sample_scales(
        model,
        quantizer,
        labels,
        torch.zeros_like(labels),
        var_cfg=run["cfg"],
        top_k=run["top_k"],
        top_p=run["top_p"] or 1.0,
        more_smooth=run["more_smooth"],
        **edit,
    )
    codes, sums = zip(*steps)
    return torch.cat(codes, 1), torch.stack(sums)


@torch.no_grad()
def test_sampled_codes_sums_and_pictures_are_the_official_ones(pair, monkeypatch):
    model, tok, g, meta = pair
    exact, quantizer = copy.deepcopy(model).double(), copy.deepcopy(tok.quantize).double()
    small = meta["ch"] < 160
    decoder = copy.deepcopy(tok).double() if small else tok  # the released size would take a minute
    monkeypatch.setattr(
        sample,
        "gumbel_noise",
        lambda seeds, positions, V: torch.zeros(len(seeds), positions.shape[-1], V),
    )
    for run in meta["runs"]:
        key = run["key"]
        codes, _ = sampled(model, tok.quantize, g, run)
        if f"{key}_codes" in g:
            assert torch.equal(codes.int(), g[f"{key}_codes"]), key

        # In float64 only the official float32 rounding is left, the same on every machine: 2^-24
        # in each of some 100 layers; mixing multiplies the logits' by (1 + 2 cfg) * 2 / 0.0135.
        bound = rounding(84, gain=10 if run["more_smooth"] else 1)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "float", lambda x: x)
            _, sums = sampled(exact, quantizer, g, run)
        last, part = g[f"{key}_f_hat_last"], g[f"{key}_image_part"]
        assert difference(sums[-1][:, :: sums.shape[2] // last.shape[1]], last) < bound, key
        rms = sums.square().mean((1, 2, 3, 4)).sqrt()
        assert difference(rms, g[f"{key}_f_hat_rms"]) < bound, key
        images = decoder.to_images(sums[-1].to(decoder.quantize.embedding.weight))
        assert difference((thin(images, part) + 1) / 2, part) < (bound if small else VQ), key


def test_evaluation_drops_no_classes_and_training_does():
    """The official code drops them in both."""
    torch.manual_seed(0)
    model = var_model.VAR(
        replace(
            var_model.VAR_CONFIGS["demo"],
            scales=(1, 2),
            code_dim=4,
            vocab_size=16,
            class_dropout=1.0,
        )
    )
    var_model.init_weights(model, gate=1.0)
    for block in model.blocks:
        block.drop = 0
    inputs, labels = torch.randn(2, 4, 4), torch.tensor([3, 4])
    none = torch.full_like(labels, 1000)
    assert not torch.equal(model.eval()(inputs, labels), model(inputs, none))
    assert torch.equal(model.train()(inputs, labels), model.eval()(inputs, none))


def test_an_untrained_model_has_the_official_spread_of_weights():
    g, meta = golden("var/var_parts")
    for kind in ("plain", "shared"):
        official = meta[f"init_{kind}"]
        torch.manual_seed(0)
        config = var_model.VARConfig(
            official["depth"],
            (1, 2, 3, 4),
            official["V"],
            official["Cvae"],
            shared_adaln=official["shared_aln"],
        )
        model = var_model.VAR(config)
        var_model.init_weights(model, official["init_adaln_gamma"])
        parameters = dict(model.named_parameters())
        decayed = {id(q) for q in train_var.weight_groups(model)[0]}
        assert [block.drop for block in model.blocks] == pytest.approx(
            g[f"init_{kind}_drop_path"].tolist(), abs=1e-7
        )
        found = set()
        stats = zip(g[f"init_{kind}_names"].tolist(), g[f"init_{kind}_stats"].tolist())
        for name, (numel, mean, std, _, decay) in stats:
            base, _, part = name.partition("[")
            q = parameters[base]
            found.add(base)
            assert (id(q) in decayed) == bool(decay), name
            if part:  # gates apart from scales and shifts
                halves = q.detach().view(6, -1)
                q = halves[:2] if part.endswith(":2]") or part == ":2C]" else halves[2:]
            assert q.numel() == numel, name
            if std == 0:
                assert float(q.detach().std()) < 1e-6, name
                assert float(q.detach().mean()) == pytest.approx(mean, abs=1e-6), name
            else:
                assert float(q.detach().std()) == pytest.approx(std, rel=8 / numel**0.5), name
        assert found == set(parameters)


def test_learning_rate_and_weight_decay_follow_the_official_schedule():
    g, meta = golden("var/var_parts")
    for run in meta["recipes"]:
        got = [
            train_var.schedule(int(step), run["max_it"], run["wpe"], run["wd_end"])
            for step in g["lr_steps"]
        ]
        expected = g[run["key"]]
        assert [lr * run["lr"] for lr, _ in got] == pytest.approx(expected[:, 0].tolist(), rel=1e-9)
        assert [decay for _, decay in got] == pytest.approx(expected[:, 1].tolist(), rel=1e-9)


def test_the_mask_the_filters_and_soft_entries_are_the_official_ones():
    g, meta = golden("var/var_parts")
    for name, scales in (
        ("P1234", (1, 2, 3, 4)),
        ("P256", var_vq.SCALES_256),
        ("P512", var_vq.SCALES_512),
    ):
        visible = (
            var_model.VAR(var_model.VARConfig(1, scales, 8, 4, 2)).attn_bias_for_masking[0, 0] == 0
        )
        packed = np.packbits(visible.numpy(), axis=1)
        assert zlib.crc32(packed.tobytes()) == int(g[f"mask_{name}_crc32"])
        assert torch.equal(visible.sum(1).int(), g[f"mask_{name}_visible_of_row"])
        if f"mask_{name}_packed" in g:
            assert np.array_equal(packed, g[f"mask_{name}_packed"].numpy())
    for combo in meta["combos"]:
        keep = (
            sample.filter_logits(g["filter_logits"], combo["top_k"], combo["top_p"] or 1.0)
            > -torch.inf
        )
        assert np.array_equal(np.packbits(keep.numpy(), axis=-1), g[combo["key"]].numpy()), combo
    for run in meta["smooth"]:
        soft = var.soft_entries(
            g["smooth_logits"] * (1 + run["ratio"]),
            g[run["key"].replace("_h", "_gumbel")],
            run["tau"],
            g["smooth_codebook"],
        )
        assert difference(soft, g[run["key"]]) < rounding(84, gain=10)
    for box in meta["boxes"]:
        keep = var.kept_codes(box["box_y0x0y1x1"], tuple(box["patch_nums"]), not box["inpainting"])
        side = box["patch_nums"][-1]
        assert torch.equal(keep.byte(), g[f"{box['key']}_kept"])
        assert torch.equal(keep[-side * side :].view(side, side).byte(), g[f"{box['key']}_mask"])


# ---- scripts -----------------------------------------------------------------------------------
def call(monkeypatch, module, *words):
    """Run a script's main in this process. Each of `words` is a path, or words with spaces between
    them."""
    words = " ".join(map(str, words)).split()
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *words])
    module.train_tokenizer() if words[0] == "tokenizer" else module.main()


def refused(monkeypatch, capsys, module, *words):
    """What a script prints when it refuses to run: a message, with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, module, *words)
    assert stop.value.code == 2
    return capsys.readouterr().err


def stopped_after_a_checkpoint(module, *words):
    """Run a script until it has saved its first checkpoint."""
    save = files.save_checkpoint

    def save_and_stop(*args):
        save(*args)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "save_checkpoint", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            call(patch, module, *words)


def log_of(run, name):
    """What log.jsonl of a run folder says under a name, a number for each line."""
    return [json.loads(line)[name] for line in (run / "log.jsonl").read_text().splitlines()]


TOKENIZER = "tokenizer --model VAR-demo --image-size 24 --lpips-weight 0"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a tokenizer of three steps (vq), codes of 40 drawings (codes) and a transformer
    of six steps (run) that was also stopped after its third and resumed (cut)."""
    folder = tmp_path_factory.mktemp("var")
    vq_flags = "--data shapes:40 --batch-size 8 --disc-start 2 --max-steps 3 --ema-decay 0.9"
    flags = f"--vq {folder}/vq/ckpt.pt --codes {folder}/codes --model demo --batch-size 4"
    flags += " --max-steps 6 --save-every 3 --log-every 1"
    with pytest.MonkeyPatch.context() as patch:
        call(patch, train_var, TOKENIZER, vq_flags, "--out", folder / "vq")
        encode = f"encode --vq {folder}/vq/ckpt.pt --data shapes:40 --workers 0"
        call(patch, var, encode, "--out", folder / "codes")
        call(patch, train_var, flags, "--out", folder / "run")
        stopped_after_a_checkpoint(train_var, flags, "--out", folder / "cut")
        call(patch, train_var, flags, "--resume --out", folder / "cut")
    return folder


def pair_flags(folder):
    return f"--vq {folder}/vq/ckpt.pt --var {folder}/run/ckpt.pt"


def codes_flags(folder):
    return f"--vq {folder}/vq/ckpt.pt --codes {folder}/codes --model demo --batch-size 4"


def load_pair(folder):
    """The transformer and the tokenizer of pair_flags."""
    tokenizer = var_vq.load_tokenizer(folder / "vq" / "ckpt.pt")
    return var_model.load_var(folder / "run" / "ckpt.pt"), tokenizer


def test_train_vqs_own_loop_trains_the_tokenizer_with_average_and_discriminator(trained):
    saved = files.read_checkpoint(trained / "vq" / "ckpt.pt")
    assert saved["config"]["scales"] == (1, 2, 3, 4, 6) and saved["ema"] and saved["step"] == 3
    last = json.loads((trained / "vq" / "log.jsonl").read_text().splitlines()[-1])
    assert {"rec", "vq", "commit", "adv", "disc", "usage"} <= last.keys()
    assert (trained / "vq" / "recon_000003.png").exists()


def test_codes_on_disk_are_those_of_the_tokenizer(trained):
    codes, labels, meta = data.load_codes(trained / "codes")
    assert codes.shape == (40, 2, 66) and codes.dtype == np.uint16
    assert meta["codes"] == 66 and len(labels) == 40
    model = var_vq.load_tokenizer(trained / "vq" / "ckpt.pt")
    crop = data.center_crop(data.open_images("shapes:40").load(7), 24)
    encoded = model.encode(vq.to_tensor(crop)[None])[0]
    assert encoded.tolist() == codes[7, 0].tolist()


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_last_bit(trained):
    whole, cut = (files.read_checkpoint(trained / name / "ckpt.pt") for name in ("run", "cut"))
    assert all(torch.equal(value, cut["model"][name]) for name, value in whole["model"].items())
    losses = log_of(trained / "run", "loss")
    assert len(losses) == 6 and losses == log_of(trained / "cut", "loss")
    assert abs(losses[0] - math.log(256)) < 0.1
    assert (trained / "run" / "samples_000006.png").exists()


def test_a_resumed_tokenizer_equals_an_uninterrupted_one_after_a_hundred_visits(
    tmp_path, monkeypatch
):
    """Weights, hits and the usage that follows from them. Fewer than 100 visits of scales, here 20
    steps of five, would not do: how fast the hits move follows from the number of visits, which is
    not kept."""
    words = f"{TOKENIZER} --data shapes:8 --disc-weight 0 --batch-size 2 --max-steps 23"
    words += " --save-every 21 --log-every 1 --out"
    call(monkeypatch, train_var, words, tmp_path / "whole")
    stopped_after_a_checkpoint(train_var, words, tmp_path / "cut")
    assert files.read_checkpoint(tmp_path / "cut" / "ckpt.pt")["step"] == 21
    call(monkeypatch, train_var, words, tmp_path / "cut", "--resume")
    whole, cut = (
        files.read_checkpoint(tmp_path / name / "ckpt.pt")["model"] for name in ("whole", "cut")
    )
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())
    usage = log_of(tmp_path / "whole", "usage")
    assert usage == log_of(tmp_path / "cut", "usage")
    assert len(usage) == 23 and 0 < usage[-1] < 1


# today's default rates, from the time when a flag's rate was for 256 images: base * batch / 256
@pytest.mark.parametrize(
    "size, base, batch, printed",
    [
        ("d16", 1e-4, 768, "3.0e-04"),
        ("d20", 1e-4, 768, "3.0e-04"),
        ("d24", 8e-5, 768, "2.4e-04"),
        ("d30", 8e-5, 1024, "3.2e-04"),
        ("d36", 8e-5, 768, "2.4e-04"),
        ("demo", 4e-3, 128, "2.0e-03"),
    ],
)
def test_the_rate_is_the_optimizers_own_and_that_of_the_recipe(
    size, base, batch, printed, monkeypatch, capsys
):
    config, codes = var_model.VAR_CONFIGS[size], np.zeros((10, 2, 4))
    for words, rate in (
        ("", f"learning rate {printed}\n"),
        ("--lr 5e-4", "learning rate 5.0e-04\n"),
        (
            f"--batch-size {2 * batch}",
            f"learning rate {printed}; the paper's, scaled to this batch",
        ),
    ):
        monkeypatch.setattr(sys, "argv", f"train_var.py --vq x --model {size} {words}".split())
        _, args = train_var.parse()
        train_var.describe(args, codes, config, step=0, max_steps=5)
        assert rate in capsys.readouterr().out
        if not words:
            assert args.lr == pytest.approx(base * batch / 256, rel=1e-12)
            assert args.batch_size == batch


def test_the_first_step_takes_its_rate_from_the_warm_up(trained):
    """2e-3 is the demo's own rate; of six steps the first is warm-up, the last a tenth."""
    rates = log_of(trained / "run", "lr")
    assert rates[0] == pytest.approx(0.005 * 2e-3) and rates[-1] == pytest.approx(
        2e-3 * (0.1 + 0 / 0.95)
    )


@pytest.mark.slow
def test_two_processes_train_as_one_even_where_a_convolution_is_idle(trained, tmp_path):
    """Of two scales the first takes φ 0, the last φ 3; DDP would wait for the others' gradients."""
    script = tmp_path / "run.py"
    script.write_text(f"""import sys
sys.path[:0] = {[str(ROOT / "extras"), str(ROOT)]!r}
from dataclasses import replace
import train_vq, var_vq
train_vq.main(var_vq.ScaleVQ, {{"two": replace(var_vq.TOKENIZERS["VAR-demo"], scales=(3, 6))}})
""")
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]

    def run(start, path, words):
        command = [*start, path, *words.split()]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    words = "--data shapes:40 --image-size 24 --lpips-weight 0 --disc-weight 0 --batch-size 8"
    words += f" --max-steps 2 --log-every 1 --out {tmp_path}"
    run([sys.executable], script, f"{words}/one")
    run(torchrun, script, f"{words}/two")
    one, two = log_of(tmp_path / "one", "rec"), log_of(tmp_path / "two", "rec")
    assert one == pytest.approx(two, abs=1e-5)

    words = f"{codes_flags(trained)} --max-steps 2 --micro-batch 1 --log-every 1 --out {tmp_path}"
    run([sys.executable], "extras/train_var.py", f"{words}/var1")
    run(torchrun, "extras/train_var.py", f"{words}/var2")
    first = [log_of(tmp_path / name, "loss")[0] for name in ("var1", "var2")]
    assert first[0] == pytest.approx(first[1], abs=0.1)  # they drop other classes
    assert (tmp_path / "var2" / "ckpt.pt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["tokenizer", "transformer"])
def test_a_queues_signal_saves_and_exits_0(trained, tmp_path, stage):
    words = f"{TOKENIZER} --data shapes:40" if stage == "tokenizer" else codes_flags(trained)
    words += f" --batch-size 2 --max-steps 100000 --log-every 1 --out {tmp_path}/run"
    command = [sys.executable, "extras/train_var.py", *words.split()]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while "step 000002" not in process.stdout.readline():
        assert process.poll() is None
    process.terminate()
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "--resume continues" in printed
    assert files.read_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] >= 2


def test_an_image_follows_from_its_seed_whatever_the_batch_and_sampling_continues_after_a_stop(
    trained, tmp_path, monkeypatch
):
    words = f"sample {pair_flags(trained)} --num-samples 7 --seed 5 --out {tmp_path}"
    call(monkeypatch, var, f"{words}/a.npz --batch-size 7")
    model, tokenizer = load_pair(trained)
    alone = var.sample_pixels(model, tokenizer, [torch.tensor([3])], [5 + 3])
    monkeypatch.setattr(sample, "CHUNK", 3)
    with monkeypatch.context() as patch:
        real = np.savez
        patch.setattr(
            np, "savez", lambda f, **k: real(f, **k) if "000000000" in f.name else sys.exit(9)
        )
        with pytest.raises(SystemExit):
            call(patch, var, f"{words}/b.npz --batch-size 2")
    call(monkeypatch, var, f"{words}/b.npz --batch-size 2")
    with (
        np.load(tmp_path / "a.npz", allow_pickle=False) as a,
        np.load(tmp_path / "b.npz", allow_pickle=False) as b,
    ):
        assert a["arr_0"].shape == (7, 24, 24, 3) and a["labels"].tolist() == list(range(7))
        assert np.abs(a["arr_0"].astype(int) - b["arr_0"]).max() <= 1  # rounding of the decoder
        assert np.abs(a["arr_0"][3].astype(int) - alone[0]).max() <= 1
        assert len(np.unique(a["arr_0"].reshape(7, -1), axis=0)) == 7


def test_an_edit_keeps_what_is_to_be_kept_and_pictures_are_written(trained, tmp_path, monkeypatch):
    model, tokenizer = load_pair(trained)
    codes, zero = torch.randint(256, (1, 66)), torch.tensor([0])
    kept = torch.ones(66, dtype=torch.bool)
    *_, (_, f_hat) = var.sample_scales(
        model, tokenizer.quantize, zero, zero, photo_codes=codes, kept=kept, more_smooth=True
    )
    assert torch.allclose(f_hat, list(tokenizer.quantize.sums(codes))[-1], atol=1e-6)
    data.center_crop(shapes.draw_shape((3, 3)), 24).save(tmp_path / "star.png")
    edit = f"edit {pair_flags(trained)} --out {tmp_path}/edit.png {tmp_path}/star.png"
    for words in ("--box 0.5,0,1,1", "--box 0.25,0.25,0.75,0.75 --outside --classes 3 --count 2"):
        call(monkeypatch, var, edit, words)
        assert data.open_image(tmp_path / "edit.png").width > 300
    words = f"reconstruct --vq {trained}/vq/ckpt.pt --out {tmp_path}/scales.png {tmp_path}/star.png"
    call(monkeypatch, var, words)
    words = f"sample {pair_flags(trained)} --classes star,0 --count 2 --out {tmp_path}/s.png"
    call(monkeypatch, var, words)
    assert (tmp_path / "scales.png").exists() and (tmp_path / "s.png").exists()


def test_the_old_name_of_guidance_is_the_same_flag(trained, tmp_path, monkeypatch):
    for name in ("var-cfg", "cfg-scale"):
        words = f"sample {pair_flags(trained)} --{name} 0.5 --classes 3 --out {tmp_path}/{name}.png"
        call(monkeypatch, var, words)
    one, two = (data.open_image(tmp_path / f"{name}.png") for name in ("var-cfg", "cfg-scale"))
    assert np.array_equal(one, two)


def test_released_files_load_in_every_wrapper_and_their_size_is_recognised(tmp_path, monkeypatch):
    config = var_model.VARConfig(1, var_vq.SCALES_256, 12, 32, 7, shared_adaln=True)
    state = var_model.VAR(config).state_dict()
    for checkpoint in (state, {"trainer": {"var_wo_ddp": state}, "epoch": 3}):
        torch.save(checkpoint, tmp_path / "var.pth")
        assert var_model.load_var(tmp_path / "var.pth").config == config
    meta = {"ch": 32, "Cvae": 32, "V": 16, "patch_nums": var_vq.SCALES_256}
    small, state = official_tokenizer(meta)
    torch.save(state, tmp_path / "vae.pth")
    monkeypatch.setattr(var_vq.ScaleVQ, "released_config", small)
    model = var_vq.load_tokenizer(tmp_path / "vae.pth", scales=var_vq.SCALES_512)
    assert model.codes_per_image(512) == 2240 and not model.training
    with pytest.raises(ValueError, match="do not belong together"):
        var_vq.load_tokenizer(tmp_path / "vae.pth", scales=(1, 2, 16))


def save_llamagens_tokenizer(path):
    config = vq.VQ_CONFIGS["VQ-demo"]
    torch.save({"model": vq.VQModel(config).state_dict(), "config": asdict(config)}, path)


def test_checkpoints_of_the_two_projects_are_told_apart(trained, tmp_path):
    """LlamaGen's where VAR's is meant, and the reverse."""
    save_llamagens_tokenizer(tmp_path / "vq.pt")
    torch.save({"tok_embeddings.weight": torch.zeros(4, 4)}, tmp_path / "gpt.pt")
    mine, theirs = trained / "vq" / "ckpt.pt", trained / "run" / "ckpt.pt"
    for load, path, sentence in (
        (var_vq.load_tokenizer, tmp_path / "vq.pt", "is a tokenizer of LlamaGen"),
        (vq.load_vq, mine, "is a tokenizer of VAR"),
        (var_model.load_var, tmp_path / "gpt.pt", "is LlamaGen's GPT"),
        (var_model.load_var, mine, "no pos_1LC"),
        (var_vq.load_tokenizer, theirs, "is not a tokenizer checkpoint"),
        (gpt.load_gpt, theirs, "is it VAR"),
    ):
        with pytest.raises(ValueError, match=sentence):
            load(path)


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("edit --box 0.5,0.5,1.5,1 star.png", "as fractions of the image"),
        ("edit --box 0.5,0.5,0.2,1 star.png", "as fractions of the image"),
        ("edit --box 0.5,0.5,0.51,1 star.png", "is empty"),
        ("edit --box 0.5,0.5 star.png", "four numbers"),
        ("edit --box 0,0,1,1 --classes star,ring star.png", "2 classes for 1 pictures"),
        ("edit --box 0,0,1,0.5 star.png", "has 64 x 64 pixels; the model edits images of 24 x 24"),
        ("sample --classes stare", "class 'stare' is"),
        ("sample --top-p 0", "--top-p: 0 is not a number from"),
        ("sample --out x.jpg", "ends in .png"),
        ("encode --data shapes:4 --image-size 32", "do not end at 8"),
    ],
)
def test_a_mistake_gets_one_sentence(trained, tmp_path, monkeypatch, capsys, words, sentence):
    monkeypatch.chdir(tmp_path)
    shapes.draw_shape((0, 0)).save("star.png")
    flags = pair_flags(trained)
    if words.startswith("encode"):
        flags = f"--vq {trained}/vq/ckpt.pt"
    assert sentence in refused(monkeypatch, capsys, var, words, flags)


def test_training_refuses_in_one_sentence(trained, tmp_path, monkeypatch, capsys):
    save_llamagens_tokenizer(tmp_path / "vq.pt")
    flags = codes_flags(trained)
    for words, sentence in (
        (f"{TOKENIZER} --data shapes --image-size 32", "do not end at 8"),
        (f"{flags} --out {trained}/run", "add --resume"),
        (f"{flags} --out {trained}/run --resume --model d16", "is of another model"),
        (f"{flags} --micro-batch 3", "does not divide"),
        (f"{flags} --lr -1", "--lr: -1 is not a number from"),
        (f"{flags} --out {trained}/vq --resume", "was written by another script"),
        (f"{flags} --out {tmp_path} --resume", "has no ckpt.pt"),
        (f"{flags} --vq {tmp_path}/vq.pt", "is a tokenizer of LlamaGen"),
    ):
        assert sentence in refused(monkeypatch, capsys, train_var, words)
    words = f"--codes {trained}/codes --model demo --out {tmp_path}/gpt"
    message = refused(monkeypatch, capsys, train_gpt, words)
    assert "codes of several grids are for train_var.py" in message


def test_a_full_disk_ends_the_run_with_one_sentence(trained, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs.Log, "write", full)
    words = f"train_var.py {codes_flags(trained)} --max-steps 1 --out {tmp_path}/run"
    monkeypatch.setattr(sys, "argv", words.split())
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "extras" / "train_var.py"), run_name="__main__")
    assert stop.value.code == (
        "train_var.py: [Errno 28] No space left on device; the last checkpoint is untouched"
    )
