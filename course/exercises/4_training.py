"""Exercise 4: a step in pieces, and a run that can be stopped and resumed exactly.

Sitting 4 reads the loop of train_gpt.py. Close that file before you start.
$ python course/exercises/4_training.py     # what your functions return
$ pytest course -q -k test_4                # what is right and what is not
"""

# Shapes:  B images in a batch   T codes per image   V codebook entries   N images
import torch

import gpt


def batch_ids(step, N, B, seed):
    """Which images the batch of a step holds.

    step      number of the step, from 0
    N, B      images of the data set, and of a batch (B <= N)
    seed      of the run
    returns   (B,) int64, each in [0, N)

    The batches of all steps, one after the other, run through the data set again and again. Each
    time every image comes once, in another random order. N need not be a multiple of B: then a
    batch holds the last images of one epoch and the first of the next.

    The result follows from the arguments alone. So a run that resumes at step 1000 continues with
    the right images, without having stored anything.
    """
    raise NotImplementedError  # about 6 lines; torch.randperm takes a torch.Generator


def train_step(model, optimizer, tokens, labels, micro, step):
    """One update of the weights, from a batch that is too large to be taken at once.

    model      model(tokens (b, m), labels (b,)) -> logits (b, m + 1, V). logits[:, i] predicts
               code i from the label and the codes before it, so the last code is not fed.
    tokens     (B, T) int64, and labels (B,) int64
    micro      images to take at once; B need not be a multiple of it
    step       number of the step: the random numbers of dropout follow from it alone
    returns    the loss as a float: the mean of the cross-entropy over all B * T codes

    The result is that of one backward pass over the whole batch (without dropout, which hides other
    channels), and `optimizer` takes one step. Gradients left over from before do not count.
    """
    raise NotImplementedError  # ~12 lines; torch.manual_seed, torch.nn.functional.cross_entropy


if __name__ == "__main__":
    print("batches", [batch_ids(step, N=10, B=4, seed=0).tolist() for step in range(5)])
    model = gpt.GPT(gpt.GPTConfig(dim=32, n_layer=1, n_head=2, vocab_size=20, grid=3))
    optimizer = torch.optim.AdamW(model.parameters())
    tokens, labels = torch.randint(20, (5, 9)), torch.randint(3, (5,))
    losses = [train_step(model, optimizer, tokens, labels, micro=2, step=i) for i in range(5)]
    print("losses, the first should be ln(20) = 3.00:", losses)
