"""Content of checkpoints as a run writes it, made without a run."""

import torch

from util.checkpoint.schema import HISTORY
from util.random_state import rng_state
from util.training.accelerator import Accelerator
from util.training.metrics import EpochMetrics
from util.training.optim import build_optimizer
from util.training.resume import Progress, snapshot


def make_state(*, epoch=2, step=None, batches=0, best_epoch=0, **changes):
    """Return the state after `epoch` epochs of `step` steps in all and `batches` of the next."""
    model = torch.nn.Linear(3, 2)
    optimizer = build_optimizer("SGD", model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    step = 5 * epoch if step is None else step
    best = {"best_epoch": best_epoch, "best_top1": 10.0 * best_epoch}
    done, meters = Progress(epoch, step, 4 * step, **best if best_epoch else {}), EpochMetrics()
    for _ in range(batches):
        meters.add(torch.tensor([4.0, 2.0, 1.0, 3.0], dtype=torch.float64), lr=0.1)
    past = {"epoch": list(range(1, epoch + 1)), "step": [step] * epoch}
    return {
        **snapshot(done, meters, model, optimizer, Accelerator(torch.device("cpu"))),
        "config": {"arch": "vgg11", "deconv": True, "milestone": (1, 2), "epochs": 1000},
        "spec": {
            "name": "digits",
            "in_channels": 1,
            "image_size": 32,
            "classes": ("0", "1"),
            "mean": (0.5,),
            "std": (0.5,),
        },
        "rng": [rng_state()],
        "own_buffers": [{}],
        "images": {"number of images": 20},
        "skipped": [],
        "history": dict.fromkeys(HISTORY, [float("nan")] * epoch) | past,
        **changes,
    }
