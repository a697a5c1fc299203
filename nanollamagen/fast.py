"""What makes cached decoding fast and changes no code.

fast.pack(model)                              # a CPU's weights, laid out for products with few rows
fast.grow(cache, 65, most=256)                # room for 65 of at most 256 positions
step = fast.Recorded(next_code, cache)        # a GPU starts each step with one launch
code = step(code, i)                          # code i - 1 -> code i
"""

import sys

import torch
import torch.nn.functional as F


def grow(cache, needed, most):
    """Make room for `needed` positions in each layer (2, B, n, positions, d) of a cache, in place.
    Attention reads the whole cache, filled or not: it grows in at most four steps up to
    `most`. At each of them a GPU records its step again."""
    room = cache[0].shape[3]
    if needed > room:
        block = max(64, -(-most // 256) * 64)
        blocks = -(-needed // block)
        more = min(blocks * block, most) - room
        for i, layer in enumerate(cache):  # one after the other: there is no second cache in memory
            cache[i] = F.pad(layer, (0, 0, 0, more))


class Recorded:
    """A step(state, number) -> state of the same shape, such as code i - 1 and i -> code i. A GPU
    records it as a CUDA graph and replays it: one launch instead of a thousand. A graph keeps
    shapes and addresses: `number` is a tensor, and a grown cache makes it record again."""

    def __init__(self, step, cache):
        self.step, self.cache = step, cache
        self.layer = None  # the cache's first layer when the step was recorded
        self.state = None

    def __call__(self, state, number):
        """The next state; the following call overwrites it."""
        if self.state is None:
            self.state = torch.empty_like(state)
            self.number = torch.empty((), dtype=torch.int64, device=state.device)
        self.state.copy_(state)
        self.number.fill_(number)  # on a GPU without waiting for it
        if self.layer is self.cache[0]:
            self.replay()
        else:
            self.layer = self.cache[0]
            self.replay = None  # frees the old graph's memory
            self.run()  # as it is, which warms up all that it calls
            self.replay = record(self.run, state.device)
        return self.state

    def run(self):
        """One step, from and to the same addresses."""
        self.state.copy_(self.step(self.state, self.number))


def record(run, device):
    """A function that replays run() as a CUDA graph; without one, run itself."""
    if device.type != "cuda":
        return run
    graph = torch.cuda.CUDAGraph()
    try:
        # torch records on the current device; other threads may pin memory meanwhile
        with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            run()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        print(f"warning: steps are not recorded as a CUDA graph ({reason})", file=sys.stderr)
        return run
    return graph.replay


def compiled(extend):
    """torch.compile for the cached decoding of a model, as one graph for each shape."""
    # one for each length of the cache, guided or not, and for the last batch's size
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(extend, dynamic=False, fullgraph=True)


class PackedLinear(torch.nn.Module):
    """A linear layer with weights laid out by oneDNN for few rows, two to three times as fast."""

    def __init__(self, linear):
        super().__init__()
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.weight = torch.nn.Parameter(packed, requires_grad=False)

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")


def pack(model):
    """Make the linear layers of a GPT faster on a CPU, in place; afterwards it can only sample.
    Where torch lacks these operators nothing changes."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, torch.nn.Linear) and child.weight.device.type == "cpu":
                try:
                    setattr(parent, name, PackedLinear(child))
                except (AttributeError, RuntimeError):  # a build without oneDNN
                    return model
    return model
