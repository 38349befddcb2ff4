import random

import numpy as np
import torch

from util.random_state import seed_everything


def test_seeding_repeats_all_generators():
    def draw():
        seed_everything(2**40)
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    assert draw() == draw()
