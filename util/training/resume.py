"""State of a training run: captured into a checkpoint, restored from a checkpoint."""

from __future__ import annotations

import copy
import math
import textwrap
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from util.checkpoint.schema import EMA_VALUES
from util.checkpoint.store import check_compatible, select_weights
from util.data.images import DataSpec
from util.data.loader import ImageLoader, count_images
from util.distributed.world import World
from util.errors import CheckpointError, ContentError, describe
from util.random_state import rng_state, set_rng_state
from util.training.accelerator import Accelerator
from util.training.metrics import EpochMetrics, Metrics


@dataclass(frozen=True)
class Plan:
    """Length of a run.

    Attributes:
        epoch_steps: optimizer steps of one epoch.
        total_steps: optimizer steps of the run; the last epoch may be cut short.
        test_batches: most batches that this rank evaluates after an epoch.
        checkpoint_steps: optimizer steps between checkpoints within an epoch; 0: none.
        micro_batch: most images of a training forward, over all ranks; None: no limit.
    """

    epoch_steps: int
    total_steps: int
    test_batches: int
    checkpoint_steps: int = 0
    micro_batch: int | None = None

    @property
    def epochs(self) -> int:
        """Number of epochs; the last one may be cut short."""
        return math.ceil(self.total_steps / self.epoch_steps)


@dataclass
class Progress:
    """Counts and sums over the finished epochs; accuracy in percent, time in seconds.

    `best_epoch` is 0 until an epoch has a finite test loss. `best_test_top1` is the test accuracy
    at `best_step`, where validation images may have chosen the best.
    """

    epoch: int = 0
    step: int = 0
    images: int = 0
    best_top1: float = -math.inf
    best_epoch: int = 0
    best_step: int = 0
    best_test_top1: float = -math.inf
    train_seconds: float = 0.0
    test_seconds: float = 0.0
    latest: Metrics = field(default_factory=dict)

    def finish_epoch(self, train: Metrics, test: Metrics, val: Metrics | None = None) -> None:
        """Add an epoch, given the metrics of `train_one_epoch` and `evaluate`.

        The metrics `val` of validation images, or else those of the test, choose the best epoch:
        those of the moving average, if there is one.
        """
        self.epoch += 1
        self.step += int(train["steps"])
        self.images += int(train["images"])
        self.train_seconds += train["seconds"]
        tests = {"test": test, **({"val": val} if val else {})}
        self.test_seconds += sum(metrics["seconds"] for metrics in tests.values())
        self.latest = {f"train_{key}": train[key] for key in ("loss", "top1", "top5", "lr")}
        for part, metrics in tests.items():
            known = [key for key in ("loss", "top1", "top5", *EMA_VALUES) if key in metrics]
            self.latest |= {f"{part}_{key}": metrics[key] for key in known}
        loss, top1 = (self._chosen_metric(name) for name in ("loss", "top1"))
        if math.isfinite(loss) and top1 > self.best_top1:
            self.best_top1, self.best_epoch, self.best_step = top1, self.epoch, self.step
            self.best_test_top1 = test.get("ema_top1", test["top1"])

    def _chosen_metric(self, name: str) -> float:
        """Return the latest "loss" or "top1" that chooses the best epoch."""
        names = (f"{part}_{key}{name}" for part in ("val", "test") for key in ("ema_", ""))
        return next(self.latest[known] for known in names if known in self.latest)

    @property
    def is_best(self) -> bool:
        """True if the latest test is the best of all, also if its epoch was tested before."""
        return 0 < self.step == self.best_step

    def summary(self) -> dict[str, float]:
        """Return the metrics for summary.json."""
        return {
            "best_test_top1": self.best_top1,
            "best_epoch": self.best_epoch,
            **self.latest,
            "epochs": self.epoch,
            "steps": self.step,
            "train_seconds": self.train_seconds,
            "test_seconds": self.test_seconds,
            "images_per_second": self.images / self.train_seconds,
        }


@dataclass
class TrainingState:
    """State of a run, and the only place that knows the layout of a checkpoint.

    Attributes:
        config: all flags by name.
        loaders: the training loader, the test loader and, if there is one, the validation loader.
        model: the model that is saved and tested; not its compiled replica.
        accelerator: holds the gradient scaler of fp16.
        progress: the finished epochs.
        metrics: the epoch under way.
        cut: the latest epoch if --max-steps cut it short; else no steps.
        average: moving average of `model`; None: there is none.
    """

    config: dict[str, Any]
    spec: DataSpec
    loaders: tuple[ImageLoader, ...]
    model: nn.Module
    optimizer: Optimizer
    accelerator: Accelerator
    world: World
    progress: Progress = field(default_factory=Progress)
    metrics: EpochMetrics = field(default_factory=EpochMetrics)
    cut: EpochMetrics = field(default_factory=EpochMetrics)
    average: AveragedModel | None = None

    @property
    def step(self) -> int:
        """Optimizer steps since the run began."""
        return self.progress.step + self.metrics.steps

    def capture(self) -> dict[str, Any]:
        """Return a checkpoint without `history`, which the logger keeps; all ranks must call."""
        return {
            "epoch": self.progress.epoch,
            "step": self.step,
            "best_top1": self.progress.best_top1,
            "config": self.config,
            "spec": asdict(self.spec),
            "images": count_images(*self.loaders),
            "progress": asdict(self.progress),
            "meters": self.metrics.state_dict(),
            "cut": self.cut.state_dict(),
            **self._capture_weights(self.model),
            **({"ema": self._capture_weights(self.average.module)} if self.average else {}),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None,  # stateless: the learning rate is a closed form of `step`
            "scaler": self.accelerator.scaler.state_dict(),
            "rng": self.world.gather(rng_state()),
            "skipped": list_skipped(self.world, *self.loaders),
        }

    def restore(self, saved: dict[str, Any], plan: Plan, *, file: str) -> None:
        """Continue from `saved`, the content of the checkpoint `file`.

        Raises:
            CheckpointError: the checkpoint is of another dataset, number of images or model; or
                its steps do not fit its epochs, see `reopen_epoch`.
        """
        check_compatible(saved["images"], count_images(*self.loaders))
        progress, metrics = Progress(**saved["progress"]), EpochMetrics(saved["meters"])
        _check_position(progress, metrics, plan, file)
        _check_spec(saved, self.spec)
        with _fitting(file):
            self._restore_weights(saved, self.model)
            if self.average is not None:
                self._restore_weights(saved["ema"], self.average.module)
                self.average.n_averaged.fill_(saved["step"])
            _check_optimizer_state(saved["optimizer"], self.optimizer)
            # Hyperparameters come from the flags, the learning rate from the step.
            groups = self.optimizer.state_dict()["param_groups"]
            state = saved["optimizer"]["state"]
            self.optimizer.load_state_dict({"state": state, "param_groups": groups})
            _match_layout(self.optimizer)
            if saved["scaler"]:  # only --amp fp16 has one
                self.accelerator.scaler.load_state_dict(saved["scaler"])
        if len(saved["rng"]) == self.world.size:  # one random state per rank
            set_rng_state(saved["rng"][self.world.rank])
        self.loaders[0].skipped.update(saved["skipped"])
        self.progress, self.metrics = progress, metrics

    def _capture_weights(self, model: nn.Module) -> dict[str, Any]:
        """Return the weights of a model, and the running statistics of each rank."""
        own_buffers = self.world.gather_own_buffers(model)
        return {"model": model.state_dict(), "own_buffers": own_buffers}

    def _restore_weights(self, saved: dict[str, Any], model: nn.Module) -> None:
        """Load the result of `_capture_weights`."""
        _load_weights(saved["model"], model)
        buffers = dict(model.named_buffers())
        for rank, own in enumerate(saved["own_buffers"]):
            _check_tensors(f"own_buffers[{rank}]", own, buffers)
        self.world.take_own_buffers(model, saved["own_buffers"])


def list_skipped(world: World, *loaders: ImageLoader) -> list[str]:
    """Return the bad files that any rank has skipped so far, sorted."""
    skipped = set().union(*(loader.skipped for loader in loaders))
    return sorted(set().union(*world.gather(skipped)))


def _check_position(progress: Progress, metrics: EpochMetrics, plan: Plan, file: str) -> None:
    """Raise CheckpointError if a run of this plan cannot continue from this step."""
    whole_epochs = progress.epoch * plan.epoch_steps
    least = min(plan.total_steps, whole_epochs)  # --max-steps may end a run within an epoch
    for name, steps, low, limit in (
        ("progress.step", progress.step, least, whole_epochs),
        ("meters.rows", metrics.steps, 0, plan.epoch_steps),
    ):
        if not low <= steps <= limit:
            raise CheckpointError(
                f"cannot resume: {file}: {name} has {steps} steps, but {progress.epoch} epochs of "
                f"{plan.epoch_steps} have {limit}"
            )


def restore_model(
    saved: dict[str, Any],
    model: nn.Module,
    *,
    file: str,
    spec: DataSpec,
    use_ema: bool | None = None,
) -> None:
    """Load the weights in `saved`, the content of the checkpoint `file`, to test or use a model.

    `use_ema` is as in `select_weights`.

    Raises:
        CheckpointError: the checkpoint is of another dataset than `spec`, or of another model; or
            it has no average with `use_ema`.
    """
    _check_spec(saved, spec)
    weights = select_weights(saved, use_ema)
    with _fitting(file):
        _load_weights(weights, model)


def _check_spec(saved: dict[str, Any], spec: DataSpec) -> None:
    """Raise CheckpointError if the checkpoint is of another dataset."""
    classes = tuple(unicodedata.normalize("NFC", name) for name in saved["spec"]["classes"])
    check_compatible({**saved["spec"], "classes": classes}, asdict(spec))


def _load_weights(state: Mapping[str, Tensor], model: nn.Module) -> None:
    """Load a state_dict; raise ContentError or RuntimeError if it does not fit."""
    _check_tensors("model", state, model.state_dict())  # PyTorch would round dtypes
    model.load_state_dict(state)


def _check_optimizer_state(saved: dict[str, Any], optimizer: Optimizer) -> None:
    """Raise ContentError unless `optimizer` could have reached the saved state."""
    groups = [list(group["params"]) for group in saved["param_groups"]]
    own_groups = [group["params"] for group in optimizer.state_dict()["param_groups"]]
    if groups != own_groups:
        raise ContentError("optimizer.param_groups differ from the model's parameters")
    params = [(group, one) for group in optimizer.param_groups for one in group["params"]]
    for number, state in saved["state"].items():
        if number not in range(len(params)):
            raise ContentError(f"optimizer.state.{number} belongs to no parameter")
        state = {name: value for name, value in state.items() if value is not None}
        expected = _example_state(optimizer, *params[number])
        if state and state.keys() != expected.keys():
            names = " and ".join(f"({', '.join(one)})" for one in (state, expected))
            raise ContentError(f"optimizer.state.{number} differs, of {names} here")
        _check_tensors(f"optimizer.state.{number}", state, expected)


def _match_layout(optimizer: Optimizer) -> None:
    """Store state in the memory format of its parameter, as fused kernels require."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter).copy_(value)


def _example_state(
    optimizer: Optimizer, group: dict[str, Any], parameter: nn.Parameter
) -> dict[str, Tensor]:
    """Return the state that the optimizer holds for a parameter of this group, on "meta"."""
    example = nn.Parameter(torch.zeros_like(parameter, device="meta"))
    example.grad = torch.zeros_like(example)
    twin = copy.copy(optimizer)
    group = {**group, "params": [example], "fused": None}  # no fused kernel runs on "meta"
    twin.state, twin.param_groups = defaultdict(dict), [group]
    twin.step()
    return twin.state[example]


def _check_tensors(path: str, saved: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise ContentError unless all names are expected, with equal shape and dtype."""
    for name, value in saved.items():
        if name not in expected:
            raise ContentError(f"{path}.{name} is not known")
        like = expected[name]
        if (value.shape, value.dtype) != (like.shape, like.dtype):
            raise ContentError(f"{path}.{name} is {describe(value)}, not {describe(like)}")


@contextmanager
def _fitting(file: str) -> Iterator[None]:
    """Turn errors about state that does not fit into a CheckpointError of one line."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        reason = textwrap.shorten(str(error), 200)
        raise CheckpointError(f"cannot resume: {file} does not fit: {reason}") from error
