"""Gradient descent on squared error needs about one step once the input is whitened jointly."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from models import build_model, make_layers
from util.training.optim import build_criterion


@pytest.fixture(scope="module")
def digits():
    """Images N 1 8 8 of mean 0 and variance 1, and their classes."""
    rows, targets = load_digits(return_X_y=True)
    images = torch.tensor(rows, dtype=torch.float32).reshape(-1, 1, 8, 8)
    return (images - images.mean()) / images.std(), torch.tensor(targets)


def least_loss(images, targets):
    """Return the loss of the best linear map: half the squared distance, mean over the images."""
    rows = F.pad(images.flatten(1), (0, 1), value=1.0).double()
    wanted = F.one_hot(targets, 10).double()
    solution = torch.linalg.lstsq(rows, wanted, driver="gelsd").solution
    return ((rows @ solution - wanted).square().sum() / (2 * len(rows))).item()


def descend(digits, method, lr, steps, **options):
    """Return the training loss before each step of full-batch gradient descent."""
    torch.manual_seed(0)
    layers = make_layers(deconv=method != 1, **options)
    model = build_model("simple_v1", layers, in_channels=1, image_size=8, method=method)
    optimizer, criterion = torch.optim.SGD(model.parameters(), lr=lr), build_criterion("L2", 10)
    losses = []
    for _ in range(steps + 1):
        optimizer.zero_grad()
        loss = criterion(model(digits[0]), digits[1])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_one_step_on_whitened_input_removes_99_percent_of_the_excess_loss(digits):
    least = least_loss(*digits)
    before, after, *later = descend(digits, method=3, lr=1.0, steps=10, eps=1e-5, n_iter=15)
    assert after - least < 0.01 * (before - least)
    assert later[-1] - least < 0.001 * (before - least)


def test_fifty_steps_without_whitening_remove_less(digits):
    """Descend just below the highest stable rate, 2 over the largest curvature."""
    rows = F.pad(digits[0].flatten(1), (0, 1), value=1.0)
    curvature = torch.linalg.matrix_norm(rows, 2).square().item() / len(rows)
    least = least_loss(*digits)
    before, *_, after = descend(digits, method=1, lr=1.9 / curvature, steps=50)
    assert 0.02 * (before - least) < after - least < before - least
