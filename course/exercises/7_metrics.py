"""Exercise 7: two numbers for a set of images.

Sitting 7 reads `frechet_distance` and `inception_score` in evaluate.py. Close that file before you
start.
$ python course/exercises/7_metrics.py     # what your functions return
$ pytest course -q -k test_7               # what is right and what is not
"""

# Shapes:  N, M images   D features   K classes
import torch


def frechet_distance(x, y):
    """How far two sets of features are apart, if each were a normal distribution.

    x         (N, D) float64, features of real images
    y         (M, D) float64, features of generated ones
    returns   a float

    It is |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)), with the mean and the covariance of
    each set. Covariances divide by N - 1, as torch.cov does. The trace of the root needs no root:
    it is the sum of the square roots of the eigenvalues of S1 S2. These are real and not negative,
    except for rounding, so take the real part and replace what is below 0 by 0.
    """
    raise NotImplementedError  # about 5 lines; torch.linalg.eigvals helps


def inception_score(probs):
    """exp of the mean over images of KL(p, mean p): high if a classifier is sure of each image and
    sees many classes.

    probs     (N, K) float64, the probabilities of the classes for each image; each row sums to 1
    returns   a float

    KL(p, q) is the sum over classes of p log(p / q). A class with p = 0 adds 0, not NaN.
    """
    raise NotImplementedError  # about 3 lines; torch.xlogy(p, q) is p log q, and 0 where p is 0


if __name__ == "__main__":
    x = torch.randn(1000, 4, dtype=torch.float64)
    print("the same set", frechet_distance(x, x))
    print("moved by 1 in one dimension", frechet_distance(x, x + torch.eye(4)[0]))
    print("ten classes, all sure", inception_score(torch.eye(10, dtype=torch.float64)))
