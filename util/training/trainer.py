"""Training loop of a run: train and test epoch by epoch, and save before an early end."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from util.checkpoint.schema import EMA_VALUES
from util.data.loader import ImageLoader
from util.errors import DataError, Stopped, TrainingDiverged
from util.training.engine import evaluate, first_input, train_one_epoch
from util.training.hooks import ModelHooks, enter_batch
from util.training.metrics import EpochMetrics, Metrics
from util.training.nonfinite import find_nonfinite
from util.training.optim import Criterion
from util.training.recorder import NullRecorder, Recorder
from util.training.resume import Plan, TrainingState
from util.training.signals import StopRequest


@dataclass
class Trainer:
    """Training loop of a run.

    Attributes:
        replica: `state.model` compiled, and replicated over ranks.
        criteria: losses of training and of the test.
    """

    state: TrainingState
    plan: Plan
    replica: nn.Module
    criteria: tuple[Criterion, Criterion]
    scheduler: LRScheduler
    recorder: Recorder | NullRecorder
    hooks: ModelHooks
    stop_request: StopRequest

    def run(self) -> None:
        """Train to the end of the plan.

        Raises:
            Stopped, TrainingDiverged, DataError: before the end; the recorder has saved the state.
        """
        state, recorder = self.state, self.recorder
        while state.progress.step < self.plan.total_steps:
            try:
                if state.metrics.steps < self.epoch_end:  # else only the test is left
                    self.train()
                tests, images = self.test()
            except Stopped:
                state.world.on_rank0(partial(recorder.checkpoint, state.capture(), last=True))
                raise
            except TrainingDiverged as error:
                raise self.explain(error) from error
            except DataError:
                # `capture` needs all ranks, but the other ranks wait in another collective.
                if state.metrics.steps and state.world.size == 1:
                    recorder.checkpoint(state.capture(), last=True)
                raise
            self.finish_epoch(tests, images)
        recorder.finished()

    @property
    def epoch_end(self) -> int:
        """Number of the last step of this epoch, which --max-steps may cut short."""
        return min(self.plan.epoch_steps, self.plan.total_steps - self.state.progress.step)

    def train(self) -> None:
        """Train to the end of the epoch under way."""
        state, epoch = self.state, self.state.progress.epoch + 1
        loader = state.loaders[0]
        loader.batch_sampler.set_epoch(epoch, state.metrics.steps)
        train_one_epoch(
            self.replica,
            loader,
            self.criteria[0],
            state.optimizer,
            self.scheduler,
            accelerator=state.accelerator,
            world=state.world,
            epoch_metrics=state.metrics,
            micro_batch=self.plan.micro_batch,
            max_steps=self.epoch_end,
            on_batch=self.after_batch,
            on_update=self.update_average,
            reads_now=self.saves_after,
            stop_request=self.stop_request,
            batch_context=self.hooks.batch_context,
            title=f"epoch {epoch}/{self.plan.epochs}",
        )
        for model in filter(None, (state.model, state.average)):
            state.world.average_buffers(model)
        self.save_if_due()

    def update_average(self) -> None:
        """Move the moving average, if there is one, towards the model."""
        if self.state.average is not None:
            self.state.average.update_parameters(self.state.model)

    def after_batch(self, batch: int, metrics: Metrics) -> None:
        """Log the step, and save if a checkpoint is due."""
        self.recorder.batch(batch, metrics)
        if batch < self.epoch_end:  # after the last step `train` averages the buffers, then saves
            self.save_if_due()

    def saves_after(self, batch: int) -> bool:
        """Return True if a checkpoint is due after this batch of the epoch."""
        every = self.plan.checkpoint_steps
        return every > 0 and (self.state.progress.step + batch) % every == 0

    def save_if_due(self) -> None:
        """Save every `checkpoint_steps` steps."""
        if self.saves_after(self.state.metrics.steps):
            self.recorder.checkpoint(self.state.capture())

    def test(self) -> tuple[dict[str, Metrics], list[Tensor]]:
        """Return the metrics of the test and of the validation, and the first batch of the test.

        The moving average, if there is one, adds EMA_VALUES, and the seconds of its own test.
        """
        average, loaders = self.state.average, self.state.loaders[1:]
        loaders = dict(zip(("test", "val"), loaders, strict=False))
        model = self.hooks.eval_model(self.state.model.eval())
        with first_input(model) as images:
            tests = {part: self.evaluate(model, loader, part) for part, loader in loaders.items()}
        if average is not None:
            model = self.hooks.eval_model(average.module.eval())
            for part, loader in loaders.items():
                averaged = self.evaluate(model, loader, f"{part} average")
                tests[part]["seconds"] += averaged["seconds"]
                tests[part] |= {key: averaged[key.removeprefix("ema_")] for key in EMA_VALUES}
        return tests, images

    def evaluate(self, model: nn.Module, loader: ImageLoader, title: str) -> Metrics:
        """Return the metrics of a model in evaluation mode."""
        return evaluate(
            model,
            loader,
            self.criteria[1],
            accelerator=self.state.accelerator,
            world=self.state.world,
            max_steps=self.plan.test_batches,
            stop_request=self.stop_request,
            title=title,
        )

    def finish_epoch(self, tests: dict[str, Metrics], images: list[Tensor]) -> None:
        """Count, log and save the epoch."""
        state, train = self.state, self.state.metrics.training_metrics()
        state.progress.finish_epoch(train, **tests)
        if state.metrics.steps < self.plan.epoch_steps:
            state.cut = state.metrics
        state.metrics = EpochMetrics()
        self.recorder.epoch(train, **tests)
        saved, ended = state.capture(), state.progress.step >= self.plan.total_steps
        self.recorder.checkpoint(saved, last=ended)
        self.recorder.layers(partial(self.hooks.diagnose, state.model), *images)
        self.recorder.skipped(saved["skipped"])

    def explain(self, error: TrainingDiverged) -> TrainingDiverged:
        """Return the error with step, layer and images; the recorder writes them to a file."""
        state = self.state
        offset = state.world.batch_offset(len(error.images))
        with enter_batch(self.hooks.batch_context, *offset):
            bad = error.images, error.parameters
            origin = find_nonfinite(state.model, state.accelerator, *bad)
        origins = filter(None, state.world.gather(origin))
        first, step = next(origins, "the loss itself"), state.progress.step + error.batch
        numbers = state.loaders[0].image_numbers(error.batch - 1)
        self.recorder.diverged(
            {"error": str(error), "step": step, "first": first, "images": numbers}
        )
        images = ", ".join([*map(str, numbers[:8]), *(["..."] if len(numbers) > 8 else [])])
        message = f"{error} (step {step}), first in {first}, with training images {images}"
        return TrainingDiverged(message, error.batch, *bad)
