"""Exercise 5: what guidance, the filters and Gumbel's rule do to probabilities."""

import torch

import sample

PROBS = torch.tensor([[0.05, 0.5, 0.15, 0.3], [0.1, 0.2, 0.3, 0.4]])  # not in order of size


def random_logits(rows=6, V=12):
    """Logits (rows, V)."""
    return 2 * torch.randn(rows, V, generator=torch.Generator().manual_seed(1))


def uniform(rows, V, seed=2):
    """Random numbers between 0 and 1, both excluded."""
    return torch.rand(rows, V, generator=torch.Generator().manual_seed(seed)).clamp(1e-7, 1 - 1e-7)


def kept(logits):
    """The codes of each row that can still be sampled."""
    return [row.nonzero().flatten().tolist() for row in logits.isfinite()]


def shares(exercise, logits, temperature=1.0, n=100_000):
    """How often each code comes, (V,), for logits (V,)."""
    codes = exercise.draw(logits.expand(n, -1), uniform(n, len(logits)), temperature)
    assert codes.shape == (n,) and codes.dtype == torch.int64, "codes are not int64 (B,)"
    return codes.bincount(minlength=len(logits)) / n


def test_guidance(exercise):
    """Scale 0 has no class, 1 has the class, and more goes further in the same direction."""
    cond, uncond = random_logits(2).unsqueeze(1)
    none, plain, double = (exercise.guide(cond, uncond, scale) for scale in (0, 1, 2))
    assert torch.allclose(none, uncond, atol=1e-5), "scale 0 does not give the logits without class"
    assert torch.allclose(plain, cond, atol=1e-5), "scale 1 does not give the logits of the class"
    further = (double > cond) == (cond > uncond)
    assert further.all(), "a code that the class makes likelier is not made likelier still"
    assert torch.allclose(double - plain, plain - none, atol=1e-5), (
        "the logits do not move evenly with the scale"
    )


def test_top_k(exercise):
    """Top-k leaves the k largest logits of each row, unchanged."""
    logits = random_logits()
    result = exercise.filter_logits(logits, top_k=3)
    left = result.isfinite()
    assert (left.sum(-1) == 3).all(), "top-k 3 does not set all but 3 logits to -inf"
    assert torch.equal(result[left], logits[left]), "a logit that is kept changed"
    removed_below = logits.masked_fill(left, -torch.inf).amax(-1) < result.topk(3).values[:, -1]
    assert removed_below.all(), "a code was removed that is likelier than one that was kept"


def test_no_filter(exercise):
    """Top-k 0, top-k above V and top-p 1 leave everything."""
    logits = random_logits()
    logits[:, 0] = -40  # so unlikely that the sum of all others rounds to 1
    for words in ({}, {"top_k": 0}, {"top_k": 100}, {"top_k": 12}, {"top_p": 1.0}):
        result = exercise.filter_logits(logits, **words)
        assert torch.equal(result, logits), "a setting that keeps all codes removed some"


def test_top_p(exercise):
    """Top-p leaves the likeliest codes up to and including the one that crosses p."""
    filtered = exercise.filter_logits(PROBS.log(), top_p=0.6)
    result = kept(filtered)
    assert len(result[0]) > 1, "the code that crosses p is missing"
    assert result[0] == [1, 3], "other codes are left than the likeliest ones that sum to p"
    assert result[1] == [2, 3], "rows of a batch are not filtered each by its own probabilities"
    same = torch.equal(filtered[filtered.isfinite()], PROBS.log()[filtered.isfinite()])
    assert same, "a logit that is kept changed"
    all_but_one = kept(exercise.filter_logits(PROBS.log(), top_p=0.9))
    assert all_but_one[0] == [1, 2, 3], "top-p 0.9 of 0.5, 0.3, 0.15, 0.05 does not leave three"


def test_top_p_leaves_one(exercise):
    """The likeliest code always stays, however small p is."""
    result = kept(exercise.filter_logits(PROBS.log(), top_p=0.01))
    assert all(result), "a small p leaves no code at all"
    assert result == [[1], [3]], "a small p leaves other codes than the likeliest"


def test_top_k_then_top_p(exercise):
    """Top-p counts probabilities over the codes that top-k has left."""
    # Of 0.5 and 0.3 the first is 0.625 of what is left: enough for p = 0.6, not for 0.65.
    one = kept(exercise.filter_logits(PROBS.log(), top_k=2, top_p=0.6))[0]
    assert one == [1], "top-p counts the probability of codes that top-k has removed"
    two = kept(exercise.filter_logits(PROBS.log(), top_k=2, top_p=0.65))[0]
    assert two == [1, 3], "top-p after top-k does not keep the code that crosses p"


def test_gumbel(exercise):
    """Codes come as often as the softmax says."""
    logits = random_logits(1, 6)[0]
    p = logits.softmax(-1)
    error = 5 * (p * (1 - p) / 100_000).sqrt()  # five standard errors
    right = (shares(exercise, logits) - p).abs() <= error
    assert right.all(), "codes do not come as often as the softmax of the logits says"


def test_largest_number(exercise):
    """Of codes that are equally likely, the one with the largest random number comes."""
    numbers = uniform(100, 6)
    codes = exercise.draw(torch.zeros(100, 6), numbers)
    right = (codes == numbers.argmax(-1)).all()
    assert right, "of equally likely codes, one with a smaller random number came"


def test_temperature(exercise):
    """Temperature divides the logits, and only those."""
    logits = random_logits(1, 6)[0]
    for temperature in (0.5, 2.0):
        p = (logits / temperature).softmax(-1)
        error = 5 * (p * (1 - p) / 100_000).sqrt()
        right = (shares(exercise, logits, temperature) - p).abs() <= error
        assert right.all(), "codes do not come as often as softmax(logits / temperature) says"


def test_removed_codes(exercise):
    """A code with logit -inf never comes, and the same numbers give the same codes."""
    logits = random_logits(1, 6)[0]
    logits[2] = -torch.inf
    assert shares(exercise, logits)[2] == 0, "a code with logit -inf was sampled"
    rows, numbers = logits.expand(100, -1), uniform(100, 6)
    again = torch.equal(exercise.draw(rows, numbers), exercise.draw(rows, numbers))
    assert again, "the same random numbers gave another code"


def test_project_guide(exercise):
    """Guided logits are those of sample.py."""
    cond, uncond = random_logits(8).chunk(2)
    expected = sample.guide(torch.cat([cond, uncond]), 2.5)
    same = torch.allclose(exercise.guide(cond, uncond, 2.5), expected, atol=1e-5)
    assert same, "sample.guide gives other logits"


def test_project_filter(exercise):
    """Filtered logits are those of sample.py."""
    logits = random_logits(8)
    filtered = exercise.filter_logits(logits, top_k=8, top_p=0.9)
    theirs = sample.filter_logits(logits, top_k=8, top_p=0.9)
    assert torch.equal(filtered, theirs), "sample.filter_logits gives other logits"


def test_project_draw(exercise):
    """The codes that are sampled are those of sample.py."""
    logits, numbers = random_logits(8), uniform(8, 12)
    codes = exercise.draw(logits, numbers, 0.8)
    expected = sample.draw(logits, -(-numbers.log()).log(), 0.8)
    assert torch.equal(codes, expected), "sample.draw takes other codes"
