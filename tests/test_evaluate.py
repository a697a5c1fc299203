"""What evaluate.py promises: ADM's numbers and LlamaGen's, and one clear sentence for every
mistake."""

import json
import sys
import tracemalloc
import urllib.error

import numpy as np
import pytest
import torch
from conftest import (
    GOLDEN,
    INCEPTION,
    SHALLOW,
    difference,
    pictures,
    run_script,
    save_npz,
)
from PIL import Image

import evaluate
import vq
from nanollamagen import data, image_sets, inception

METRICS = GOLDEN / "metrics"


def arrays(name):
    """One golden file: its arrays, and the figures next to them."""
    with np.load(METRICS / f"{name}.npz", allow_pickle=False) as file:
        loaded = {k: file[k] for k in file.files}
    figures = METRICS / f"{name}.json"
    return loaded, json.loads(figures.read_text()) if figures.exists() else {}


@pytest.fixture(scope="session")
def net(weights):
    return inception.load(weights)


@pytest.fixture(scope="session")
def e2e(net):
    """The golden batches of 64 images, measured once for all tests."""
    paths = (METRICS / f"e2e_{side}.npz" for side in ("ref", "samples"))
    return tuple(evaluate.measure(image_sets.open_npz(path), net, 16) for path in paths)


@pytest.fixture
def run(monkeypatch, capsys):
    """run(words) calls the command line and returns (exit code, what it printed)."""

    def call(words):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *words.split()])
        code = 0
        try:
            evaluate.main()
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return call


# ---- Inception ---------------------------------------------------------------------------------
@pytest.mark.parametrize("case", ["s64", "s256", "s384", "s120x200"])
def test_images_are_resized_as_tensorflow_1_does(case):
    golden, figures = arrays("resize_tf1")
    x = torch.from_numpy(golden[f"{case}_input"]).permute(2, 0, 1)[None].float()
    x = inception.resize_tf1(x)[0].permute(1, 2, 0)
    part = x[golden[f"{case}_rows"]][:, golden[f"{case}_cols"]]
    assert np.abs(part.numpy() - golden[f"{case}_output"]).max() < 1e-3
    assert abs(x.double().mean() - figures[case]["mean"]) < 1e-3
    assert abs(x.double().std(correction=0) - figures[case]["std"]) < 1e-3


def test_an_image_of_the_networks_own_size_passes_unchanged():
    x = torch.rand(1, 3, 299, 299) * 255
    assert torch.equal(inception.resize_tf1(x), x)


def test_features_are_those_of_the_tensorflow_graph(net):
    golden, _ = arrays("inception")
    pool, spatial = inception.features(net, torch.from_numpy(golden["input"]))
    for name, got in (
        ("pool3", pool),
        ("spatial", spatial),
        ("evaluator_pool3", pool),
        ("evaluator_spatial", spatial),
        ("logits", pool @ net["fc.weight"].T),
    ):
        assert difference(got, golden[name]) < INCEPTION, name


def test_the_bound_tells_a_wrong_epsilon_and_swapped_axes(net, monkeypatch):
    golden, _ = arrays("inception")
    images = torch.from_numpy(golden["input"])
    wrong = {k: v.transpose(2, 3) if k.endswith("conv.weight") else v for k, v in net.items()}
    assert difference(inception.features(wrong, images)[0], golden["pool3"]) > 100 * INCEPTION
    norm = inception.F.batch_norm
    monkeypatch.setattr(inception.F, "batch_norm", lambda *a, eps: norm(*a, eps=1e-5))
    assert difference(inception.features(net, images)[0], golden["pool3"]) > 3 * INCEPTION


def test_float32_is_full_within_inception_and_as_it_was_elsewhere(net, weights, monkeypatch):
    """On a GPU TF32 would move FID; switched off for the whole process, it would change what a
    sweep decodes."""
    seen, convolve = set(), inception.F.conv2d
    monkeypatch.setattr(
        inception.F, "conv2d", lambda *a: seen.add(torch.backends.cudnn.allow_tf32) or convolve(*a)
    )
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    inception.load(weights)
    inception.features(net, torch.from_numpy(pictures(1)))
    assert seen == {False} and torch.backends.cudnn.allow_tf32


def test_the_classifiers_bias_and_the_counters_of_batch_norm_are_not_used(weights, net, tmp_path):
    state = torch.load(weights, weights_only=True)
    state["fc.bias"] += torch.randn(1008)
    state |= {
        k: torch.tensor(7)
        for k in json.loads((METRICS / "inception_keys.json").read_text())["int64_scalars"]
    }
    torch.save(state, tmp_path / "other.pth")
    other = inception.load(tmp_path / "other.pth")
    image = torch.from_numpy(pictures(1))
    assert other["sha256"] != net["sha256"] and not torch.equal(other["fc.bias"], net["fc.bias"])
    assert all(
        torch.equal(a, b)
        for a, b in zip(inception.features(other, image), inception.features(net, image))
    )
    sides = [
        {
            "pool": np.random.default_rng(i).random((9, 2048), np.float32),
            "mu": np.zeros(2),
            "sigma": np.eye(2),
            "mu_s": np.zeros(2),
            "sigma_s": np.eye(2),
        }
        for i in range(2)
    ]
    assert evaluate.score(*sides, other) == evaluate.score(*sides, net)


def test_torchvisions_inception_and_broken_weights_are_refused(weights, tmp_path):
    state = torch.load(weights, weights_only=True)
    torchvision = {
        **state,
        "fc.weight": state["fc.weight"][:1000],
        "fc.bias": state["fc.bias"][:1000],
    }
    nan = {**state, "fc.weight": state["fc.weight"] * torch.nan}
    for i, broken in enumerate((torchvision, nan, {"a": torch.ones(1)}, torch.ones(3))):
        torch.save(broken, tmp_path / f"{i}.pth")
        with pytest.raises(ValueError, match="not the Inception of 2015-12-05"):
            inception.load(tmp_path / f"{i}.pth")


def test_without_network_one_sentence_says_which_file_to_put_where(monkeypatch, tmp_path, run):
    def offline(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("NANOLLAMAGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("urllib.request.urlopen", offline)
    code, text = run(f"{METRICS}/e2e_ref.npz {METRICS}/e2e_samples.npz")
    assert code == 2 and str(tmp_path / "cache" / "pt_inception-2015-12-05-6726825d.pth") in text
    assert "releases/download/fid_weights" in text and "Traceback" not in text


# ---- the metrics -------------------------------------------------------------------------------
@pytest.mark.parametrize("case", ["gauss64", "same64", "fewer_than_dims", "dead_channels"])
def test_frechet_distances_are_adms(case):
    golden, figures = arrays("frechet")
    sides = [evaluate.statistics(golden[f"{case}_{side}"]) for side in ("ref", "sample")]
    for (mu, sigma), side in zip(sides, ("ref", "sample")):
        assert mu.dtype == np.float32 and np.allclose(
            mu, golden[f"{case}_mu_{side}"], rtol=0, atol=1e-6
        )
        assert sigma.dtype == np.float64
        assert np.allclose(np.diag(sigma), golden[f"{case}_var_{side}"], rtol=1e-9, atol=1e-12)
        assert sigma.sum() == pytest.approx(figures[case][f"sigma_sum_{side}"], rel=1e-9)
    got = evaluate.frechet_distance(*sides[0], *sides[1])
    assert got == pytest.approx(
        figures[case]["frechet"], rel=1e-5, abs=1e-3 if case == "same64" else 0
    )
    assert got == pytest.approx(evaluate.frechet_distance(*sides[1], *sides[0]), rel=1e-5, abs=1e-3)


def test_the_frechet_distance_of_diagonal_covariances_has_a_closed_form():
    golden, figures = arrays("frechet")
    sides = [
        x
        for side in ("ref", "sample")
        for x in (golden[f"diag32_mu_{side}"], np.diag(golden[f"diag32_var_{side}"]))
    ]
    assert evaluate.frechet_distance(*sides) == pytest.approx(
        figures["diag32"]["closed_form"], rel=1e-10
    )


def test_a_set_is_at_distance_zero_from_itself_even_when_singular(e2e):
    mu, sigma = e2e[0]["mu"], e2e[0]["sigma"]  # 64 images, 2048 features
    assert evaluate.frechet_distance(mu, sigma, mu, sigma) < 1e-3


def test_statistics_that_are_not_finite_or_do_not_match_are_refused():
    mu, sigma = np.zeros(3), np.eye(3)
    with pytest.raises(ValueError, match="NaN"):
        evaluate.frechet_distance(mu, sigma, mu + np.nan, sigma)
    with pytest.raises(ValueError, match="do not match"):
        evaluate.frechet_distance(mu, sigma, np.zeros(4), np.eye(4))


@pytest.mark.parametrize("split", [5000, 1300, 500, 400, 1])
def test_inception_scores_are_adms(split):
    golden, figures = arrays("inception_score")
    probs = torch.from_numpy(golden["acts"] @ golden["weight"]).softmax(-1)
    assert difference(probs[:64], golden["preds_head"]) < SHALLOW
    assert evaluate.inception_score(probs, split) == pytest.approx(
        figures["score"][f"split_{split}"], rel=1e-5
    )


def test_a_probability_of_zero_is_harmless():
    golden, figures = arrays("inception_score")
    probs = torch.from_numpy(golden["acts"] @ golden["weight"] * 200).softmax(-1)
    assert figures["reference_with_acts_x200"] == "nan" and (probs == 0).any()
    assert 1 < evaluate.inception_score(probs) <= 24


def manifolds():
    """Golden features of precision and recall by case; two cases are derived from the first."""
    golden, figures = arrays("precision_recall")
    features = {
        case: (golden[f"{case}_ref"], golden[f"{case}_sample"]) for case in ("plain", "integer")
    }
    features["overflow"] = tuple(x * 64 for x in features["plain"])
    features["identical_sets"] = (features["plain"][0][:200],) * 2
    return features, golden, figures["cases"]


@pytest.mark.parametrize("case", ["plain", "overflow", "integer", "identical_sets"])
@pytest.mark.parametrize("block", [10_000, 64])
def test_precision_and_recall_are_adms_in_float32(case, block):
    features, golden, figures = manifolds()
    ref, gen = (torch.from_numpy(x) for x in features[case])
    assert evaluate.precision_recall(ref, gen, block=block) == (
        figures[case]["precision_float32"],
        figures[case]["recall_float32"],
    )
    radii = [evaluate.radii(x, block=block) for x in (ref, gen)]
    for got, side in zip(radii, ("ref", "sample")):
        assert np.allclose(got, golden[f"{case}_radii_{side}"], rtol=1e-4, atol=0)
    d = evaluate.distances(ref, gen)
    assert np.array_equal((d <= radii[0][:, None]).any(0), golden[f"{case}_sample_in"])
    assert np.array_equal((d <= radii[1]).any(1), golden[f"{case}_ref_in"])


@pytest.mark.parametrize("case", ["plain", "overflow", "integer", "identical_sets"])
def test_half_precision_gives_the_published_rounding(case):
    features, golden, figures = manifolds()
    got = evaluate.precision_recall(*features[case], half=True)
    expected = figures[case]["half_restated"] or {
        k: figures[case][f"{k}_float32"] for k in ("precision", "recall")
    }
    assert got == (expected["precision"], expected["recall"])
    assert got == pytest.approx(
        (figures[case]["precision_evaluator"], figures[case]["recall_evaluator"]), abs=0.02
    )
    if case == "plain":
        assert got != evaluate.precision_recall(*features[case])


def test_precision_and_recall_need_more_images_than_neighbours():
    with pytest.raises(ValueError, match="more than 3 images"):
        evaluate.precision_recall(np.zeros((3, 8), np.float32), np.zeros((9, 8), np.float32))


def tensor(*images):
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    "case", ["noise", "shift_contrast", "blur", "nonsquare", "unrelated", "flat", "identical"]
)
def test_psnr_and_ssim_are_scikit_images(case):
    golden, figures = arrays("psnr_ssim")
    a, b, want = tensor(golden[f"{case}_a"]), tensor(golden[f"{case}_b"]), figures[case]
    got = evaluate.psnr(a.double() / 255, b.double() / 255).item()
    assert got == float("inf") if want["psnr"] == "inf" else abs(got - want["psnr"]) < 1e-4
    gaussian = evaluate.ssim(a, b, 255, gaussian=True).mean((0, 2, 3))
    assert np.abs(gaussian.numpy() - want["ssim_gaussian_per_channel"]).max() < 1e-6
    assert abs(gaussian.mean() - want["ssim_gaussian"]) < 1e-6
    assert abs(evaluate.ssim(a, b, 255).mean() - want["ssim_default"]) < 1e-6
    for data_range in (1, 2):
        got = evaluate.ssim(a / 255, b / 255, data_range).mean()
        assert abs(got - want[f"ssim_default_float_range{data_range}"]) < 1e-5


def test_ssim_maps_agree_everywhere():
    golden, _ = arrays("psnr_ssim")
    a, b = tensor(golden["noise_a"]), tensor(golden["noise_b"])
    for name, gaussian in (("default", False), ("gaussian", True)):
        got = evaluate.ssim(a, b, 255, gaussian)[0].permute(1, 2, 0)
        assert np.abs(got.numpy() - golden[f"noise_ssim_{name}_map"]).max() < 1e-5


def test_a_tokenizers_psnr_and_ssim_are_llamagens():
    golden, figures = arrays("psnr_ssim")
    restored = vq.to_uint8(torch.from_numpy(golden["llamagen_decoder_output"]).permute(0, 3, 1, 2))
    assert np.array_equal(restored, golden["llamagen_quantised"])
    x = torch.stack([vq.to_tensor(Image.fromarray(image)) for image in golden["llamagen_gt"]])
    x, y = (x + 1) / 2, tensor(*restored) / 255
    assert np.abs(evaluate.psnr(x, y).numpy() - figures["llamagen"]["psnr"]).max() < 1e-4
    assert (
        np.abs(evaluate.ssim(x, y, 2.0).mean((1, 2, 3)).numpy() - figures["llamagen"]["ssim"]).max()
        < 1e-5
    )
    assert (
        abs(evaluate.ssim(x, y, 1.0).mean() - figures["llamagen"]["ssim_mean_if_data_range_1"])
        < 1e-5
    )


def test_code_usage_counts_entries_and_their_evenness():
    codes = np.array([[0, 1], [0, 2], [0, 3], [0, 4]])
    assert evaluate.code_usage(codes, 8) == {
        "usage": 5 / 8,
        "usage_queue": 5 / 8,
        "perplexity": pytest.approx(np.exp(0.5 * np.log(2) + 0.5 * np.log(8))),
    }
    assert (
        evaluate.code_usage(codes, 8, queue=4)["usage_queue"] == 3 / 8
    )  # two images, whichever they are
    every = np.arange(512).repeat(512).reshape(512, 512)  # each image has a code of its own
    assert (
        evaluate.code_usage(every, 512)["usage"] == 1
        and evaluate.code_usage(every, 512)["usage_queue"] == 128 / 512
    )


# ---- end to end --------------------------------------------------------------------------------
def test_measured_features_are_the_recorded_ones(e2e):
    golden, _ = arrays("e2e_features")
    for side, measured in zip(("ref", "sample"), e2e):
        assert difference(measured["pool"][:4], golden[f"{side}_pool_head"]) < INCEPTION
        assert difference(measured["mu"], golden[f"{side}_pool_mean"]) < INCEPTION
        radii = evaluate.radii(torch.from_numpy(measured["pool"]))
        # 0.5, the small difference of squared norms of 200 in float32
        assert np.allclose(radii, golden[f"radii_{side}"], rtol=0, atol=200 * SHALLOW)
    assert difference(e2e[0]["mu_s"], golden["ref_spatial_mean"]) < INCEPTION


def test_the_five_numbers_are_what_adms_command_printed(e2e, net):
    figures = json.loads((METRICS / "e2e.json").read_text())
    got = evaluate.score(*e2e, net)
    assert list(got) == [
        "IS",
        "FID",
        "sFID",
        "precision",
        "recall",
    ]  # IS first: it tells a wrong reference
    assert got["IS"] == pytest.approx(figures["inception_score"], abs=1e-5)
    assert got["FID"] == pytest.approx(figures["fid_nuclear_norm"], rel=1e-3)
    assert got["sFID"] == pytest.approx(figures["sfid_nuclear_norm"], rel=1e-3)
    assert (got["precision"], got["recall"]) == (
        figures["precision_float32"],
        figures["recall_float32"],
    )
    half = evaluate.precision_recall(*(side["pool"] for side in e2e), half=True)
    assert half == pytest.approx(
        (figures["precision_evaluator"], figures["recall_evaluator"]), abs=0.07
    )
    assert half == pytest.approx(tuple(figures["half_restated"].values()), abs=1.01 / 64)
    probs = (16 * torch.from_numpy(e2e[1]["pool"]) @ net["fc.weight"].T).softmax(-1)
    assert evaluate.inception_score(probs) == pytest.approx(
        figures["inception_score_logits_x16"], abs=1e-5
    )
    want = figures["inception_score_logits_x16_split_24"]
    assert evaluate.inception_score(probs, 24) == pytest.approx(want, abs=1e-5)


def test_statistics_in_a_reference_are_used_as_they_are(monkeypatch):
    golden, figures = (
        arrays("ref_with_stats_acts")[0],
        json.loads((METRICS / "ref_with_stats.json").read_text()),
    )
    shapes = {"mu": (24,), "sigma": (24, 24), "mu_s": (12,), "sigma_s": (12, 12)}
    monkeypatch.setattr(image_sets, "STATISTICS", shapes)
    ref = image_sets.open_npz(METRICS / "ref_with_stats.npz").stored
    for metric, end, kind in (("fid", "", "pool"), ("sfid", "_s", "spatial")):
        sample = evaluate.statistics(golden[f"sample_{kind}"])
        stored = evaluate.frechet_distance(ref[f"mu{end}"], ref[f"sigma{end}"], *sample)
        computed = evaluate.statistics(golden[f"ref_{kind}"])
        assert stored == pytest.approx(figures[f"{metric}_with_stats"], rel=1e-5)
        assert evaluate.frechet_distance(*computed, *sample) == pytest.approx(
            figures[f"{metric}_without_stats"], rel=1e-5
        )


# ---- sets of images ----------------------------------------------------------------------------
def test_an_npz_is_read_in_place_whether_compressed_or_not(tmp_path):
    images = pictures(2000, 32)  # 6 MB
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", arr_0=images, labels=np.arange(2000))
        opened = image_sets.open_npz(tmp_path / "a.npz")
        assert (opened.count, opened.shape, opened.labels[7]) == (2000, (32, 32, 3), 7)
        tracemalloc.start()
        for i in range(0, 2000, 100):
            assert np.array_equal(np.stack(opened.read(range(i, i + 100))), images[i : i + 100])
        assert tracemalloc.get_traced_memory()[1] < 1e6
        tracemalloc.stop()
        wanted = [3, 700, 701, 1999]
        assert np.array_equal(np.stack(opened.read(wanted)), images[wanted])


def test_a_folder_and_an_npz_of_the_same_images_are_the_same_set(tmp_path):
    images = pictures(5)
    for i, image in enumerate(images):
        (tmp_path / "all" / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "all" / f"class{i % 2}" / f"{i}.png")
    opened = image_sets.open_set(tmp_path / "all")
    assert opened.count == 5 and np.array_equal(
        np.stack(opened.read(range(5))), images[[0, 2, 4, 1, 3]]
    )
    small = image_sets.open_set(tmp_path / "all", size=8)
    assert small.shape == (8, 8, 3)
    assert np.array_equal(small.read([4])[0], data.center_crop(Image.fromarray(images[3]), 8))


def test_a_folder_named_like_the_drawn_data_set_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes").mkdir()
    Image.fromarray(pictures(1)[0]).save(tmp_path / "shapes" / "0.png")
    assert image_sets.open_set("shapes").count == 1


def test_batches_do_not_change_features(net, tmp_path):
    images = image_sets.open_npz(save_npz(tmp_path / "a.npz", arr_0=pictures(5)))
    one, all_ = (evaluate.measure(images, net, size) for size in (2, 5))
    assert (
        difference(one["pool"], all_["pool"]) < INCEPTION
        and difference(one["sigma_s"], all_["sigma_s"]) < INCEPTION
    )


# ---- mistakes ----------------------------------------------------------------------------------
def broken_batches(folder):
    """Files that are no sample batch, each with words that its complaint must hold."""
    good = pictures(8)
    yield save_npz(folder / "float.npz", arr_0=good / 255), "float64 (8, 16, 16, 3)"
    yield save_npz(folder / "wide.npz", arr_0=good.astype(np.int64) * 9), "int64"
    yield save_npz(folder / "grey.npz", arr_0=good[..., :1]), "must be uint8 (N, H, W, 3)"
    yield save_npz(folder / "empty.npz", arr_0=good[:0]), "must be uint8"
    yield save_npz(folder / "key.npz", samples=good), "it holds samples, but no images under arr_0"
    yield save_npz(folder / "pickled.npz", arr_0=np.array([{}, good], dtype=object)), "object"
    yield (
        save_npz(folder / "mu.npz", arr_0=good, mu=np.zeros(1024), sigma=np.eye(1024)),
        "mu is (1024,), not (2048,)",
    )
    yield (
        save_npz(folder / "lone.npz", arr_0=good, mu=np.zeros(2048)),
        "sigma is (0,), not (2048, 2048)",
    )
    whole = save_npz(folder / "whole.npz", arr_0=good).read_bytes()
    (folder / "cut.npz").write_bytes(whole[:-100])
    yield folder / "cut.npz", "damaged"
    (folder / "rotten.npz").write_bytes(whole[:2000] + bytes(100) + whole[2100:])
    yield folder / "rotten.npz", "damaged: image"
    (folder / "text.npz").write_text("not an archive")
    yield folder / "text.npz", "damaged"
    (folder / "none").mkdir()
    yield folder / "none", "none holds 0 images"
    for name, size in (("a", 16), ("b", 20)):
        (folder / "mixed").mkdir(exist_ok=True)
        Image.fromarray(pictures(1, size)[0]).save(folder / "mixed" / f"{name}.png")
    yield folder / "mixed", "mixes images of (16, 16, 3) and (20, 20, 3); --size N"
    (folder / "torn").mkdir()
    (folder / "torn" / "a.png").write_bytes((folder / "mixed" / "a.png").read_bytes()[:200])
    yield folder / "torn", "a.png"
    yield folder / "nowhere.npz", "does not exist"
    yield folder / "VIRTUAL_imagenet256_labeled.npz", "it is at https://openaipublic"
    yield save_npz(folder / "three.npz", arr_0=good[:3]), "more than 3 images per side, got 4 and 3"
    yield save_npz(folder / "one.npz", arr_0=good[:1]), "needs at least two"


def test_every_broken_batch_gets_one_clear_sentence(weights, tmp_path, run):
    ref = save_npz(tmp_path / "ref.npz", arr_0=pictures(4))
    for path, words in broken_batches(tmp_path):
        code, text = run(f"{ref} {path} --inception {weights}")
        errors = [line for line in text.splitlines() if "error:" in line]
        assert code == 2 and len(errors) == 1 and words in errors[0] and "Traceback" not in text, (
            path.name,
            text,
        )


def test_nan_statistics_and_missing_arguments_are_named(weights, tmp_path, run):
    stored = {
        "mu": np.full(2048, np.nan),
        "sigma": np.eye(2048),
        "mu_s": np.zeros(2023),
        "sigma_s": np.eye(2023),
    }
    ref = save_npz(tmp_path / "ref.npz", arr_0=pictures(4), **stored)
    gen = save_npz(tmp_path / "gen.npz", arr_0=pictures(4))
    code, text = run(f"{ref} {gen} --inception {weights}")
    assert code == 2 and "NaN" in text.splitlines()[-1]
    for words in ("", ref, "recon", f"recon --vq {ref} --data {tmp_path}/gone"):
        code, text = run(f"{words} --inception {weights}" if words else "")
        assert code == 2 and "error:" in text.splitlines()[-1] and "Traceback" not in text


def image_set(name, count=50_000, stored=None, sha256="", side=256, labels=None):
    return image_sets.ImageSet(
        image_sets.Path(name), count, (side, side, 3), None, sha256, stored or {}, labels
    )


ADM = image_set(image_sets.ADM_URL.split("/")[-1], 10_000, {"mu": 0}, image_sets.ADM_SHA256)
SAMPLES = image_set("samples.npz", labels=np.arange(50_000) % 1000)
PUBLISHED = {"sha256": inception.SHA256}


def test_the_papers_comparisons_need_no_warning():
    assert evaluate.cautions(ADM, SAMPLES, PUBLISHED) == []
    assert evaluate.cautions(image_set("eval_ref.npz", 10_000, {"mu": 0}), SAMPLES, PUBLISHED) == []


@pytest.mark.parametrize(
    "ref, gen, words",
    [
        (image_set("fifty_thousand.npz"), SAMPLES, "training-set statistics"),
        (SAMPLES._replace(count=10_000), ADM._replace(count=50_000), "swapped"),
        (ADM, SAMPLES._replace(shape=(384, 384, 3)), "384-pixel samples against 256"),
        (ADM, SAMPLES._replace(labels=np.sort(SAMPLES.labels)), "sorted by class"),
        (ADM, SAMPLES._replace(count=9_999), "only 9,999 samples"),
        (ADM._replace(count=500), SAMPLES, "only 500 reference images"),
    ],
)
def test_mixed_up_sets_are_warned_about(ref, gen, words):
    found = evaluate.cautions(ref, gen, PUBLISHED)
    assert len(found) == 1 and words in found[0]


def test_unpublished_inception_weights_are_warned_about():
    assert "unpublished Inception weights" in evaluate.cautions(ADM, SAMPLES, {"sha256": "0"})[0]


# ---- commands ----------------------------------------------------------------------------------
def test_a_reference_of_ones_own_images_scores_them_perfectly(weights, tmp_path, run):
    for i, image in enumerate(pictures(8, 20)):
        (tmp_path / "own").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "own" / f"{i}.png")
    own = tmp_path / "own"
    code, text = run(f"stats {own} --size 16 --keep 6 --out {own}.npz --inception {weights}")
    assert code == 0 and "8 images of 16x16 pixels" in text and "6 of them" in text
    with np.load(tmp_path / "own.npz", allow_pickle=False) as file:
        assert file["arr_0"].shape == (6, 16, 16, 3) and file["sigma_s"].shape == (2023, 2023)
    code, text = run(f"{own}.npz {own} --size 16 --inception {weights} --json {tmp_path}/s.json")
    said = json.loads((tmp_path / "s.json").read_text())
    assert code == 0 and said["metrics"]["FID"] < 1e-3 and said["metrics"]["sFID"] < 1e-3
    assert said["metrics"]["precision"] > 0 and said["metrics"]["recall"] == 1
    assert (
        "with stored statistics of 8 images of 16x16 pixels" in text
        and "only 8 samples: papers use 50,000" in text
    )
    assert said["torch"] == torch.__version__ and len(said["warnings"]) == 3
    assert said["command"][1:3] == [f"{own}.npz", str(own)]


def test_recon_measures_what_the_tokenizer_does(tokenizer, weights, net, tmp_path, run):
    model, path = tokenizer
    code, text = run(
        f"recon --vq {path} --data shapes:6 --image-size 32 --batch-size 4 --inception {weights} "
        f"--out {tmp_path}/recon.png --json {tmp_path}/recon.json"
    )
    assert code == 0 and "only 6 images" in text, text
    got = json.loads((tmp_path / "recon.json").read_text())["metrics"]
    images = data.open_images("shapes:6")
    x = torch.stack([vq.to_tensor(data.center_crop(images.load(i), 32)) for i in range(6)])
    codes = model.encode(x)
    truth, restored = (
        torch.from_numpy(vq.to_uint8(x)),
        torch.from_numpy(vq.to_uint8(model.decode(codes))),
    )
    y = restored.permute(0, 3, 1, 2) / 255
    assert got["PSNR"] == pytest.approx(evaluate.psnr((x + 1) / 2, y).mean().item(), rel=1e-6)
    assert got["SSIM"] == pytest.approx(evaluate.ssim((x + 1) / 2, y, 2.0).mean().item(), rel=1e-6)
    assert got["rFID"] == pytest.approx(
        evaluate.frechet_distance(
            *evaluate.statistics(inception.features(net, truth)[0].numpy()),
            *evaluate.statistics(inception.features(net, restored)[0].numpy()),
        ),
        rel=1e-4,
    )
    assert got["usage"] == len(codes.unique()) / 64 and 1 <= got["perplexity"] <= len(
        codes.unique()
    )
    assert Image.open(tmp_path / "recon.png").width > 4 * 64


def test_recon_can_measure_at_another_size(tokenizer, weights, tmp_path, run):
    code, text = run(
        f"recon --vq {tokenizer[1]} --data shapes:2 --image-size 48 --eval-size 32 "
        f"--inception {weights} --out {tmp_path}/recon.png --json {tmp_path}/recon.json"
    )
    got = json.loads((tmp_path / "recon.json").read_text())["metrics"]
    assert code == 0, text
    model, images = tokenizer[0], data.open_images("shapes:2")
    x = torch.stack([vq.to_tensor(data.center_crop(images.load(i), 48)) for i in range(2)])
    x, y = (
        evaluate.F.interpolate(z, (32, 32), mode="bicubic")
        for z in (x, model.decode(model.encode(x)))
    )
    y = torch.from_numpy(vq.to_uint8(y)).permute(0, 3, 1, 2) / 255
    assert got["PSNR"] == pytest.approx(evaluate.psnr((x + 1) / 2, y).mean().item(), rel=1e-6)


def test_processes_wait_for_the_slowest_for_days(monkeypatch, tmp_path, run):
    """By default gloo would end an evaluation after half an hour of waiting at its only meeting
    point."""

    def meet(backend, timeout):
        raise ValueError(f"{backend} waits {timeout.days} days")

    monkeypatch.setattr(evaluate, "WORLD", 2)
    monkeypatch.setattr(evaluate.dist, "init_process_group", meet)
    code, text = run(f"{tmp_path} {tmp_path}")
    assert code == 2 and "gloo waits 7 days" in text


@pytest.mark.slow
@pytest.mark.parametrize("command", ["compare", "recon"])
def test_two_processes_give_one_processs_numbers(command, tokenizer, weights, tmp_path):
    ref, gen = (save_npz(tmp_path / f"{n}.npz", arr_0=pictures(n, seed=n)) for n in (6, 7))
    words = f"{ref} {gen}"
    if command == "recon":
        words = f"recon --vq {tokenizer[1]} --data shapes:7 --image-size 32 --out {tmp_path}/a.png"
    metrics = []
    for processes in (0, 2):
        path = tmp_path / f"{processes}.json"
        flags = ["--inception", weights, "--batch-size", 2, "--json", path]
        done = run_script("evaluate.py", *words.split(), *flags, processes=processes)
        assert done.returncode == 0, done.stderr
        metrics.append(json.loads(path.read_text())["metrics"])
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4, abs=1e-5)
