"""Exercise 7: what a distance of sets of features, and a score of probabilities, must be like."""

import math

import torch

import evaluate


def features(n=400, seed=1):
    """Features (n, 3) that go together: each has a part of the ones before it."""
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.cumsum(1)


def probabilities():
    """Rows (60, 5) that sum to 1, some of them with zeros."""
    generator = torch.Generator().manual_seed(3)
    probs = torch.randn(60, 5, generator=generator, dtype=torch.float64).mul(2).softmax(-1)
    probs[:10, 1:] = 0
    probs[:10, 0] = 1
    return probs


def test_same_set(exercise):
    """A set is at distance 0 from itself, in any order."""
    x = features()
    assert abs(exercise.frechet_distance(x, x)) < 1e-6, "a set has a distance from itself"
    assert abs(exercise.frechet_distance(x, x.flip(0))) < 1e-6, "the order of images matters"


def test_moved(exercise):
    """Moving a set adds the square of how far it moved."""
    x, y = features(), features(seed=2)
    far = torch.tensor([3.0, 0, 4.0], dtype=torch.float64)
    got = exercise.frechet_distance(x, x + far)
    assert math.isclose(got, 25, rel_tol=1e-6), "a set moved by 5 is not at distance 25"
    both = exercise.frechet_distance(x + far, y + far)
    assert math.isclose(both, exercise.frechet_distance(x, y), rel_tol=1e-6, abs_tol=1e-6), (
        "moving both sets changed their distance"
    )


def test_wider(exercise):
    """A set stretched by a factor is at the distance of the spreads: (s - 1)^2 tr(S)."""
    x = features() - features().mean(0)
    got, spread = exercise.frechet_distance(x, 3 * x), torch.cov(x.T).trace().item()
    assert math.isclose(got, 4 * spread, rel_tol=1e-6), (
        "a set stretched by 3 is not at 4 times its spread"
    )


def test_together(exercise):
    """Two sets that differ only in which features go together are apart."""
    x = features()
    y = torch.stack([x[:, 0], x[:, 1].roll(7), x[:, 2].roll(31)], 1)  # the same columns, unlinked
    got = exercise.frechet_distance(x, y)
    assert got > 0.3, "which features go together does not matter: are covariances used?"


def test_symmetric(exercise):
    """The distance is the same both ways, and the same after turning all features."""
    x, y = features(), features(300, seed=2) * torch.tensor([1.0, 2.0, 0.5])
    one, other = exercise.frechet_distance(x, y), exercise.frechet_distance(y, x)
    assert math.isclose(one, other, rel_tol=1e-6), "the distance is another one the other way round"
    turn = torch.linalg.qr(features(3)).Q
    turned = exercise.frechet_distance(x @ turn, y @ turn)
    assert math.isclose(one, turned, rel_tol=1e-6), "turning all features changed the distance"


def test_unsure(exercise):
    """A classifier that says the same of every image gives 1."""
    same = probabilities()[20:21].expand(30, -1)
    got = exercise.inception_score(same)
    assert math.isclose(got, 1, rel_tol=1e-6), "the same probabilities for all images do not give 1"


def test_sure(exercise):
    """K classes, each image in one of them for sure, give K."""
    for K in (2, 10):
        sure = torch.eye(K, dtype=torch.float64).repeat(6, 1)
        got = exercise.inception_score(sure)
        assert not math.isnan(got), "probabilities of 0 give NaN"
        assert math.isclose(got, K, rel_tol=1e-6), "K sure classes do not give K"
    one = torch.eye(10, dtype=torch.float64)[:1].repeat(6, 1)
    got = exercise.inception_score(one)
    assert math.isclose(got, 1, rel_tol=1e-6), "one sure class for all images does not give 1"


def test_bounds(exercise):
    """The score lies between 1 and K, and does not depend on the order or number of copies."""
    probs = probabilities()
    got = exercise.inception_score(probs)
    assert 1 < got < 5, "the score is not between 1 and the number of classes"
    twice = exercise.inception_score(probs.flip(0).repeat(2, 1))
    assert math.isclose(got, twice, rel_tol=1e-6), "the order of images or a copy of all matters"


def test_project(exercise):
    """Both numbers are those of evaluate.py."""
    x, y = features(), features(300, seed=2) * 1.5
    expected = evaluate.frechet_distance(
        *evaluate.statistics(x.numpy()), *evaluate.statistics(y.numpy())
    )
    got = exercise.frechet_distance(x, y)
    assert math.isclose(got, expected, rel_tol=1e-5), "evaluate.frechet_distance differs"
    got = exercise.inception_score(probabilities())
    expected = evaluate.inception_score(probabilities())
    assert math.isclose(got, expected, rel_tol=1e-6), "evaluate.inception_score differs"
