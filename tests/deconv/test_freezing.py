"""`freeze`: batch statistics for some steps, then running ones without their gradient."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from deconv import (
    Delinear,
    FastDeconv,
    FastDeconvTranspose2d,
    convert,
    fuse,
    published,
    recalibrate,
)
from deconv.freezing import advance_phase, find_phase, hold_phase
from tests.pairwise import loop_over

ITER = 2  # estimating steps: a cycle has 20
MAKERS = {
    "convolution": lambda **more: FastDeconv(3, 4, 3, padding=1, **more),
    "transposed": lambda **more: FastDeconvTranspose2d(3, 4, 3, stride=2, **more),
    "linear": lambda **more: Delinear(5, 4, **more),
}


def make(name="convolution", **options):
    torch.manual_seed(0)
    return MAKERS[name](**{"freeze": True, "freeze_iter": ITER, **options}).double()


def draw(name="convolution"):
    return torch.randn((6, 5) if name == "linear" else (4, 3, 6, 6)).double() * 2 + 1


def measure(layer, x):
    """Output, and gradients of input and parameters."""
    x = x.clone().requires_grad_()
    y = layer(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]


@loop_over("name", MAKERS)
def test_two_cycles_equal_switching_by_hand(name):
    layer, twin = make(name), make(name, freeze=False)
    for step in range(10 * ITER + 3 * ITER):
        x, before = draw(name), copy.deepcopy(twin.state_dict())
        estimates = step % (10 * ITER) < ITER
        given, expected = measure(layer, x), measure(twin.train(estimates), x)
        torch.testing.assert_close(given, expected, rtol=0, atol=0, msg=f"step {step}")
        if not estimates:
            assert twin.state_dict()["num_batches_tracked"] == before["num_batches_tracked"]
        state = dict(layer.state_dict())
        assert state.pop("freeze_steps") == step + 1 == layer._steps
        torch.testing.assert_close(state, dict(twin.state_dict()), rtol=0, atol=0)
    x = draw(name)
    torch.testing.assert_close(layer.eval()(x), twin.eval()(x), rtol=0, atol=0)
    assert layer.freeze_steps == 13 * ITER  # evaluation does not count


def test_nothing_is_added_where_it_is_off():
    layer = FastDeconv(3, 4, 3, freeze_iter=7)
    assert "freeze_steps" not in layer.state_dict() and "freeze" not in repr(layer)
    layer.load_state_dict(FastDeconv(3, 4, 3).state_dict())
    assert "freeze=True, freeze_iter=2" in repr(make())


def reload(layer):
    new, file = make(), io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    new.load_state_dict(torch.load(file))
    return new


def rebuild(layer):
    """On the meta device, then empty memory, then the checkpoint."""
    new = FastDeconv(3, 4, 3, padding=1, freeze=True, freeze_iter=ITER, device="meta")
    new = new.double().to_empty(device="cpu")
    new.load_state_dict(layer.state_dict())
    return new


def assign(layer):
    new = FastDeconv(3, 4, 3, padding=1, freeze=True, freeze_iter=ITER, device="meta")
    new.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True)
    return new


COPIES = [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), reload, rebuild, assign]


@loop_over("steps", [0, 1, ITER, ITER + 1, 10 * ITER])  # at the borders of the phases
def test_every_copy_goes_on_in_the_same_phase(steps):
    layer = make()
    for _ in range(steps):
        layer(draw())
    others = [each(layer) for each in COPIES]
    for _ in range(ITER + 1):
        x = draw()
        expected = measure(layer, x)
        for number, other in enumerate(others):
            torch.testing.assert_close(measure(other, x), expected, msg=f"copy {number}")
            torch.testing.assert_close(dict(other.state_dict()), dict(layer.state_dict()))
            assert other._steps == layer._steps


def test_a_batch_that_is_refused_is_not_counted():
    reflect = dict(padding=2, padding_mode="reflect")
    refused = [
        (make(), draw()[:, :2]),
        (make(), draw().float()),
        (make(input_norm="l1"), draw()[..., :0]),
        (FastDeconv(3, 4, 5, freeze=True), torch.ones(2, 3, 4, 4)),
        (FastDeconv(3, 4, 5, freeze=True, mode=3), torch.ones(2, 3, 4, 4)),
        (FastDeconv(3, 4, 3, freeze=True, **reflect), torch.ones(2, 3, 2, 2)),
        (FastDeconvTranspose2d(3, 4, 3, padding=3, freeze=True), torch.ones(2, 3, 2, 2)),
        (make("linear"), draw("linear")[:, :2]),
        (make("linear"), draw("linear").float()),
        (published.FastDeconv(3, 4, 3, freeze=True), torch.ones(3, 6, 6)),
    ]
    for number, (layer, x) in enumerate(refused):
        for steps in (0, layer.freeze_iter):  # a phase of the batch, and of running statistics
            layer._steps, before = steps, copy.deepcopy(layer.state_dict())
            with pytest.raises((ValueError, RuntimeError)):
                layer(x)
            assert layer._steps == steps, number
            torch.testing.assert_close(dict(layer.state_dict()), dict(before), msg=f"{number}")
    up = make("transposed")
    with pytest.raises(ValueError, match="output size"):
        up(draw(), output_size=[50, 50])
    assert up.freeze_steps == up._steps == 0


def test_a_reset_begins_a_cycle():
    layer = make()
    for _ in range(ITER + 1):
        layer(draw())
    assert layer.frozen
    for reset in (layer.reset_running_stats, layer.reset_parameters):
        reset()
        assert layer.freeze_steps == layer._steps == 0
        layer(draw())
        assert not layer.frozen and layer.num_batches_tracked == 1


def test_the_counter_is_an_integer_that_casts_leave_alone():
    layer = make().half()
    assert layer.freeze_steps.dtype == torch.int64
    layer.to("meta")
    assert layer.freeze_steps.is_meta


@loop_over(("use_reentrant", "steps"), [(r, n) for r in (True, False) for n in range(ITER + 2)])
def test_checkpointing_repeats_the_phase_and_counts_once(use_reentrant, steps):
    layer, twin = make(), make()
    for _ in range(steps):
        x = draw()
        layer(x), twin(x)
    x = draw()
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    twin(inputs[0]).square().sum().backward()
    checkpoint(layer, inputs[1], use_reentrant=use_reentrant).square().sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    torch.testing.assert_close(layer.weight.grad, twin.weight.grad)
    torch.testing.assert_close(dict(layer.state_dict()), dict(twin.state_dict()))
    assert layer._steps == twin._steps == steps + 1


def test_held_forwards_stay_in_their_phase_and_a_replay_counts():
    layer = make()
    model, x = nn.Sequential(layer, nn.ReLU()), draw()
    for step in range(10 * ITER + 1):
        expected = (step % (10 * ITER) >= ITER,)
        with hold_phase():
            for _ in range(3):
                assert find_phase(model) == expected
                model(x)
                assert layer.frozen == expected[0]
        assert layer.freeze_steps == layer._steps == step
        advance_phase(model)
    assert find_phase(nn.Sequential(FastDeconv(3, 4, 3))) == ()


def test_recalibration_estimates_every_batch_and_leaves_the_cycle():
    layer, twin = make(), make(freeze=False)
    for _ in range(ITER + 1):
        layer(draw())
    batches = [draw() for _ in range(4)]
    recalibrate(layer, batches), recalibrate(twin, batches)
    torch.testing.assert_close(layer.running_cov_joint, twin.running_cov_joint)
    assert layer.freeze_steps == layer._steps == ITER + 1 and layer.freeze
    layer(draw())
    assert layer.frozen


def test_convert_and_fuse_know_it():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2))
    converted = convert(model, linear=True, freeze=True, freeze_iter=1)
    x = torch.randn(3, 3, 6, 6)
    for _ in range(2):
        converted(x)
    assert [converted[n].frozen for n in (0, 3)] == [True, True]
    torch.testing.assert_close(fuse(converted.eval())(x), converted(x), rtol=1e-4, atol=1e-5)


def test_bad_options_are_refused_by_name():
    for value in (0, -1, 2.5):
        with pytest.raises(ValueError, match=f"^freeze_iter must be a whole number.*{value}$"):
            FastDeconv(3, 4, 3, freeze=True, freeze_iter=value)
    with pytest.raises(ValueError, match="^freeze=True needs track_running_stats=True"):
        Delinear(3, 4, freeze=True, track_running_stats=False)
    replica = make()._replicate_for_data_parallel()
    with pytest.raises(ValueError, match="DataParallel, .*: use DistributedDataParallel"):
        replica._count_step()
