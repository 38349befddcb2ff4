"""One epoch after the other: train, test, keep; and how that ends before its time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from util.data.images import DataSpec
from util.data.loader import ImageLoader, count_images
from util.distributed.world import World
from util.errors import DataError, Stopped, TrainingDiverged
from util.random_state import rng_state
from util.training.accelerator import Accelerator
from util.training.engine import evaluate, first_input, train_one_epoch
from util.training.hooks import ModelHooks
from util.training.metrics import EpochMetrics, Metrics
from util.training.nonfinite import name_bad_place
from util.training.optim import Criterion
from util.training.recorder import NullRecorder, Recorder
from util.training.resume import Progress, snapshot
from util.training.signals import StopRequest


@dataclass
class Trainer:
    """What a run trains, how far it has come, and where it is kept.

    Attributes:
        config: all settings, for the checkpoints.
        model: what is saved, and tested as `hooks` settle it; `replica` is what is trained.
        done, meters: the finished epochs, and the one under way.
        epoch_steps, total_steps: optimizer steps.
        test_batches: of this process, in a test.
        save_every: optimizer steps between checkpoints within an epoch, 0: none.
        stop_request: to stop.
        hooks: how the network wants to be run.
        own_buffers: of a checkpoint, see `World.gather_own_buffers`.
    """

    config: dict[str, Any]
    spec: DataSpec
    world: World
    accelerator: Accelerator
    model: nn.Module
    criterion: Criterion
    optimizer: Optimizer
    scheduler: LRScheduler
    train_loader: ImageLoader
    test_loader: ImageLoader
    recorder: Recorder | NullRecorder
    done: Progress
    meters: EpochMetrics
    epoch_steps: int
    total_steps: int
    epochs: int
    test_batches: int
    save_every: int
    stop_request: StopRequest
    hooks: ModelHooks
    own_buffers: Sequence[Mapping[str, Tensor]] = ()
    replica: nn.Module = field(init=False)
    images: list[Tensor] = field(init=False)  # a batch that was tested, or none

    def __post_init__(self) -> None:
        spec, batch_size = self.spec, self.config["batch_size"]
        shape = batch_size, spec.in_channels, spec.image_size, spec.image_size
        network = self.accelerator.compile_for_training(self.model, shape)
        self.replica = self.world.replicate(network)  # makes all as the first
        self.world.take_own_buffers(self.model, self.own_buffers)

    def run(self) -> None:
        """Train to the end.

        Raises:
            Stopped, TrainingDiverged, DataError: before; what there is to keep has been kept.
        """
        while self.done.step < self.total_steps:
            try:
                if self.meters.steps < self.goal:  # else only the test is left
                    self.train()
                tested = self.test()
            except Stopped:
                self.world.on_rank0(partial(self.recorder.checkpoint, self.state(), last=True))
                raise
            except TrainingDiverged as error:
                raise self.explain(error) from error
            except DataError:
                # Of several processes the others wait elsewhere, for this one.
                if self.meters.steps and self.world.size == 1:
                    self.recorder.checkpoint(self.state(), last=True)
                raise
            self.finish_epoch(tested)

    @property
    def goal(self) -> int:
        """Steps of the epoch under way: fewer than usual where the run ends within it."""
        return min(self.epoch_steps, self.total_steps - self.done.step)

    def train(self) -> None:
        """The epoch under way, from where it is."""
        self.train_loader.batch_sampler.set_epoch(self.done.epoch + 1, self.meters.steps)
        train_one_epoch(
            self.replica,
            self.train_loader,
            self.criterion,
            self.optimizer,
            self.scheduler,
            accelerator=self.accelerator,
            world=self.world,
            meters=self.meters,
            max_steps=self.goal,
            on_batch=self.after_batch,
            stop_request=self.stop_request,
            batch_context=self.hooks.batch_context,
            title=f"epoch {self.done.epoch + 1}/{self.epochs}",
        )
        self.world.average_buffers(self.model)
        self.save_if_due()

    def after_batch(self, batch: int, now: Metrics) -> None:
        self.recorder.batch(batch, now)
        if batch < self.goal:  # the last waits for the average, which, taken twice, would round
            self.save_if_due()

    def save_if_due(self) -> None:
        step = self.done.step + self.meters.steps
        if self.save_every and step % self.save_every == 0:
            self.recorder.checkpoint(self.state())

    def test(self) -> Metrics:
        network = self.hooks.eval_model(self.model.eval())
        with first_input(network) as self.images:
            return evaluate(
                network,
                self.test_loader,
                self.criterion,
                accelerator=self.accelerator,
                world=self.world,
                max_steps=self.test_batches,
                stop_request=self.stop_request,
            )

    def finish_epoch(self, tested: Metrics) -> None:
        trained = self.meters.training_metrics()
        self.done.finish_epoch(trained, tested)
        self.meters = EpochMetrics()
        last = self.done.step >= self.total_steps
        state = self.state()
        self.recorder.epoch(trained, tested, state, last=last)
        self.recorder.layers(partial(self.hooks.diagnose, self.model), *self.images)
        self.recorder.skipped(state["skipped"])

    def state(self) -> dict[str, Any]:
        """All that a checkpoint holds; asked of all processes at once."""
        return {
            **snapshot(self.done, self.meters, self.model, self.optimizer, self.accelerator),
            "config": self.config,
            "spec": asdict(self.spec),
            "images": count_images(self.train_loader, self.test_loader),
            "rng": self.world.gather(rng_state()),
            "own_buffers": self.world.gather_own_buffers(self.model),
            "skipped": list_skipped(self.world, self.train_loader, self.test_loader),
        }

    def explain(self, error: TrainingDiverged) -> TrainingDiverged:
        """The error with step, images and layer, which are also kept."""
        found = self.world.gather(name_bad_place(self.model, self.accelerator, error.images))
        report = {
            "error": str(error),
            "step": self.done.step + error.batch,
            "first": next((place for place in found if place), "the loss itself"),
            "images": self.train_loader.batch_sampler.images(error.batch - 1),
        }
        self.recorder.diverged(report)
        some = ", ".join(map(str, report["images"][:8]))
        more = ", ..." if len(report["images"]) > 8 else ""
        text = f"{error} (step {report['step']}), first in {report['first']}, with training images"
        return TrainingDiverged(f"{text} {some}{more}", error.batch, error.images)


def list_skipped(world: World, *loaders: ImageLoader) -> list[str]:
    """The bad files that any process has left out so far, in order."""
    mine = set().union(*(loader.skipped for loader in loaders))
    return sorted(set().union(*world.gather(mine)))
