"""Exercise 4: a step in pieces is a step, and a resumed run is the run."""

import copy

import torch
import torch.nn.functional as F

import gpt

V, T, B = 20, 9, 5


def tiny_model(dropout=0.0):
    """A small GPT with random weights, in training mode. Its classes are never hidden."""
    config = gpt.GPTConfig(dim=32, n_layer=1, n_head=2, vocab_size=V, grid=3, num_classes=3)
    config.dropout, config.class_dropout = dropout, 0.0
    model = gpt.GPT(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.2, generator=generator)
    return model


def batch(number=0):
    """Tokens (B, T) and labels (B,)."""
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(V, (B, T), generator=generator)
    return tokens, torch.randint(3, (B,), generator=generator)


def weights(model):
    """All weights as one vector."""
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def whole_batch_loss(model, tokens, labels):
    """The loss of a batch that is taken at once."""
    logits = model(tokens[:, :-1], labels)
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


class Knows(torch.nn.Module):
    """A model that knows a rule: code 0 is the label, and each code is its predecessor plus 1."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(100.0))

    def forward(self, tokens, labels):
        following = torch.cat([labels[:, None], tokens + 1], dim=1)
        return self.scale * F.one_hot(following, V).float()


def test_every_image_once(exercise):
    """Every epoch shows every image once, also where a batch belongs to two epochs."""
    ids = torch.cat([exercise.batch_ids(step, 10, 4, 0) for step in range(5)])
    assert ids.shape == (20,), "a batch does not have B images"
    for epoch in ids.view(2, 10):
        assert epoch.sort().values.tolist() == list(range(10)), (
            "an image is missing from an epoch, or comes twice"
        )


def test_orders(exercise):
    """Every epoch has an order of its own, and so has every seed."""
    ids = torch.cat([exercise.batch_ids(step, 50, 10, 0) for step in range(10)])
    assert not torch.equal(ids[:50], ids[50:]), "every epoch has the same order"
    assert ids[:50].tolist() != list(range(50)), "the images are not shuffled"
    other = torch.cat([exercise.batch_ids(step, 50, 10, 1) for step in range(5)])
    assert not torch.equal(ids[:50], other), "another seed gives the same order"


def test_no_memory(exercise):
    """A batch follows from step and seed alone."""
    torch.manual_seed(0)
    in_order = [exercise.batch_ids(step, 50, 8, 3).tolist() for step in range(12)]
    torch.manual_seed(1)
    alone = exercise.batch_ids(11, 50, 8, 3).tolist()
    assert alone == in_order[11], "a batch depends on what was asked for before it"


def test_targets(exercise):
    """Logits i predict code i: a model that knows every next code has no loss."""
    labels = torch.arange(3)
    tokens = labels[:, None] + torch.arange(T)
    model = Knows()
    optimizer = torch.optim.SGD(model.parameters(), lr=0)
    loss = exercise.train_step(model, optimizer, tokens, labels, 3, 0)
    assert loss < 1e-3, "a model that knows every next code has a loss: the targets are shifted"


def test_pieces(exercise):
    """The update does not depend on the size of the pieces, also if the last one is smaller."""
    after = []
    for micro in (5, 1, 2, 3):
        model = tiny_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        exercise.train_step(model, optimizer, *batch(), micro, 0)
        after.append(weights(model))
    assert not torch.equal(after[0], weights(tiny_model())), "the weights do not change"
    assert torch.allclose(after[0], after[1], atol=1e-5), (
        "the update depends on the size of the micro-batches"
    )
    assert torch.allclose(after[0], after[2], atol=1e-5), (
        "a last micro-batch that is smaller has the wrong weight"
    )
    assert torch.allclose(after[0], after[3], atol=1e-5), (
        "a last micro-batch that is smaller has the wrong weight"
    )


def test_two_steps(exercise):
    """Two steps are two plain steps on whole batches, each from its own gradient."""
    model, plain = tiny_model(), tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        exercise.train_step(model, optimizer, *batch(step), 5, step)
        gradients = torch.autograd.grad(whole_batch_loss(plain, *batch(step)), plain.parameters())
        with torch.no_grad():
            for weight, gradient in zip(plain.parameters(), gradients):
                weight -= 0.1 * gradient
        same = torch.allclose(weights(model), weights(plain), atol=1e-5)
        if step == 0:
            assert same, "the first step is not a plain step on the whole batch"
        else:
            assert same, "gradients of the step before still count in the next one"


def test_one_update(exercise):
    """The optimizer takes one step per batch, and the loss is the mean over the batch."""
    model, updates = tiny_model(), []
    expected = whole_batch_loss(model, *batch()).item()
    optimizer = torch.optim.SGD(model.parameters(), lr=0)
    optimizer.register_step_post_hook(lambda *_: updates.append(1))
    loss = exercise.train_step(model, optimizer, *batch(), 2, 0)
    assert len(updates) == 1, "the optimizer does not take exactly one step per batch"
    assert abs(loss - expected) < 1e-4, "the returned loss is not the mean over the batch"


def test_dropout(exercise):
    """Dropout hides other channels in another step, and the same ones in the same step."""
    model = tiny_model(dropout=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0)
    first, second, again = (
        exercise.train_step(model, optimizer, *batch(), 5, step) for step in (0, 1, 0)
    )
    assert first != second, "dropout hides the same channels in every step"
    assert first == again, "the same step with the same weights gives another loss"


def test_resume(exercise):
    """A run that was stopped and resumed ends with the same weights, to the last bit."""

    def run(model, optimizer, steps):
        for step in steps:
            ids = exercise.batch_ids(step, B, 4, 0)
            tokens, labels = batch()
            exercise.train_step(model, optimizer, tokens[ids], labels[ids], 2, step)

    model = tiny_model(dropout=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    run(model, optimizer, range(3))
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    run(model, optimizer, range(3, 6))

    resumed = tiny_model(dropout=0.5)
    optimizer = torch.optim.AdamW(resumed.parameters(), lr=0.01)
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    torch.manual_seed(12345)  # the process is another one
    run(resumed, optimizer, range(3, 6))
    assert torch.equal(weights(model), weights(resumed)), (
        "a resumed run ends with other weights than one that was never stopped"
    )
