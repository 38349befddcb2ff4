import copy
import math
import warnings
from importlib.util import find_spec, module_from_spec

import pytest
import torch
from torch import nn

from deconv import FastDeconv
from tests.pairwise import loop_over
from util.errors import RunError
from util.training.accelerator import PRECISIONS, Accelerator
from util.training.optim import build_optimizer, build_scheduler

CPU = torch.device("cpu")


def step(accelerator, model, images):
    """Take one step; return the dtype of the logits."""
    optimizer = build_optimizer("SGD", model.parameters(), lr=0.1)
    with accelerator.autocast():
        out = model(images)
        loss = out.float().square().mean()
    accelerator.update(loss, optimizer)
    return out.dtype


@pytest.mark.parametrize("amp", PRECISIONS)
def test_models_compute_in_the_chosen_precision_and_keep_float32_weights(amp):
    torch.manual_seed(0)
    model, images = nn.Linear(8, 4), torch.randn(16, 8)
    plain = copy.deepcopy(model)
    assert step(Accelerator(CPU, amp=amp), model, images) == PRECISIONS[amp]
    step(Accelerator(CPU), plain, images)
    assert model.weight.dtype == torch.float32
    torch.testing.assert_close(model.weight, plain.weight, atol=2e-3, rtol=0)


def test_fp16_skips_the_step_and_halves_the_scale_where_gradients_overflow():
    model = nn.Linear(2, 1, bias=False)
    before, accelerator = model.weight.detach().clone(), Accelerator(CPU, amp="fp16")
    step(accelerator, model, torch.full((1, 2), 3e4))
    assert torch.equal(model.weight, before)
    scale = accelerator.scaler.state_dict()["scale"]
    other = Accelerator(CPU, amp="fp16")
    assert scale == other.scaler.state_dict()["scale"] / 2
    other.scaler.load_state_dict(accelerator.scaler.state_dict())
    assert other.scaler.state_dict() == accelerator.scaler.state_dict()


def test_fp16_gradients_that_overflow_at_every_scale_count_as_nan():
    accelerator, model = Accelerator(CPU, amp="fp16"), nn.Linear(2, 1)
    optimizer = build_optimizer("SGD", model.parameters(), lr=0.1)
    accelerator.backward(model(torch.ones(1, 2)).sum())
    assert not accelerator.largest_gradients(optimizer).any()
    accelerator.scaler.load_state_dict({**accelerator.scaler.state_dict(), "scale": 2.0**-15})
    assert accelerator.largest_gradients(optimizer).isnan().all()


def test_the_largest_gradient_is_found_and_nan_if_one_is_nan():
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = build_optimizer("SGD", [weight], lr=0.1)
    accelerator = Accelerator(CPU)
    for gradient, largest in (([3.0, -4e30], 4e30), ([1e-3, 0.0], 1e-3), ([math.nan, 1.0], None)):
        weight.grad = torch.tensor(gradient)
        (found,) = accelerator.largest_gradients(optimizer)
        assert found.isnan() if largest is None else found == largest


@loop_over("amp", PRECISIONS)
def test_gradients_are_clipped_to_their_joint_norm_and_short_ones_are_kept(amp):
    for slopes in ([3.0, 4.0], [0.3, 0.4]):
        weights = [nn.Parameter(torch.zeros(1)) for _ in slopes]
        optimizer = build_optimizer("SGD", weights, lr=1.0, momentum=0.0)
        loss = sum(weight.sum() * slope for weight, slope in zip(weights, slopes, strict=True))
        Accelerator(CPU, amp=amp, clip_grad=2.0).update(loss, optimizer)
        factor = min(1, 2 / math.hypot(*slopes))
        assert torch.cat(weights).tolist() == pytest.approx([-factor * s for s in slopes])


def test_a_first_step_that_overflows_causes_no_warning():
    model = nn.Linear(2, 1, bias=False)
    optimizer = build_optimizer("SGD", model.parameters(), lr=0.1)
    scheduler = build_scheduler("cosine", optimizer, total_steps=3, epoch_steps=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fresh = module_from_spec(find_spec("util.training.accelerator"))
        fresh.__spec__.loader.exec_module(fresh)  # anew: pytest forgets what the first one ignores
        accelerator = fresh.Accelerator(CPU, amp="fp16")
        with accelerator.autocast():
            loss = model(torch.full((1, 2), 3e4)).float().square().mean()
        accelerator.update(loss, optimizer)
        scheduler.step()
    assert not caught and scheduler.last_epoch == 1


def test_models_and_images_are_stored_channels_last():
    accelerator = Accelerator(CPU, channels_last=True)
    model = accelerator.to_device(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2)))
    images, _ = accelerator.batch_to_device(torch.randn(2, 3, 8, 8), torch.zeros(2))
    for tensor in (images, model[0].weight, model[0](images)):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert not tensor.is_contiguous()


def record_calls(monkeypatch):
    """Replace the capture, which needs a GPU, by a warm-up step; return the replayed batches."""
    replayed = []

    def make(step, images):
        torch.autograd.grad(step(*images).sum(), tuple(step.parameters()))
        forward = step.forward
        step.forward = lambda images: replayed.append(images) or forward(images)
        return step

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make)
    return replayed


def test_only_full_training_batches_are_replayed_and_the_capture_keeps_all_state(monkeypatch):
    replayed = record_calls(monkeypatch)
    model = nn.Sequential(FastDeconv(2, 3, 3), nn.Dropout(0.5))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    network = Accelerator(CPU, cuda_graphs=True).compile_for_training(model, (4, 2, 5, 5))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state) and not replayed
    full, part = torch.randn(4, 2, 5, 5), torch.randn(3, 2, 5, 5)
    for images in (full, part):
        network(images)
    network.eval()(full)
    with torch.no_grad():
        network.train()(full)
    assert replayed == [full] and int(model[0].num_batches_tracked) == 3


def test_without_cuda_graphs_the_model_trains_as_it_is(monkeypatch):
    replayed = record_calls(monkeypatch)
    model = nn.Linear(2, 1)
    assert Accelerator(CPU).compile_for_training(model, (4, 2)) is model and not replayed


def test_a_model_that_cannot_be_captured_is_refused_with_a_remedy(monkeypatch):
    def make(step, images):
        raise RuntimeError("operation not permitted when stream is capturing\nCompile with ...")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make)
    with pytest.raises(RunError, match=r"not permitted when .*: train with --cuda-graphs False$"):
        Accelerator(CPU, cuda_graphs=True).compile_for_training(nn.Linear(2, 1), (4, 2))
