"""deconv.calibrate: evaluation keeps its outputs, and training begins at nearly the same ones."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deconv import FastDeconv, calibrate, convert, published
from deconv.whitening import Whitening
from tests.deconv.surgery.helpers import TOLERANCE, assert_kept, pair, randomize
from tests.pairwise import loop_over, pairwise


def images(count=4, shape=(32, 4, 10, 10), dtype=torch.float32):
    """Batches of correlated images that are off centre."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(count, *shape, generator=generator, dtype=dtype)
    return list(
        noise.cumsum(-1).mul(0.3) + torch.arange(shape[1]).reshape(-1, *[1] * (len(shape) - 2))
    )


def begin_training(model):
    """Training mode without dropout, which would add its own noise."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    return model


def distance(new, old, x):
    """The root mean square difference of outputs in units of their standard deviation."""
    with torch.no_grad():
        given, expected = begin_training(new)(x), old.eval()(x)
    centred = expected - expected.mean(0)
    return ((given - expected).norm() / centred.norm()).item()


def three_layers(**options):
    torch.manual_seed(0)
    layers = [pair(**options), nn.Conv2d(8, 8, 3, stride=2, groups=2, bias=False), nn.Hardswish()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 5)]
    return randomize(nn.Sequential(*layers, nn.BatchNorm2d(8), *head))


@loop_over(
    ("mode", "root", "layout", "shared", "dtype"),
    pairwise(
        [1, 2, 3, 4, 5],
        ["newton", "resolvent", "cholesky"],
        ["contiguous", "interleaved"],
        [True, False],
        list(TOLERANCE),
    ),
)
def test_outputs_stay_in_evaluation_and_nearly_in_training(mode, root, layout, shared, dtype):
    model = three_layers().to(dtype)
    options = dict(pretrained=True, linear=True, mode=mode, root=root, layout=layout, block=4)
    options["shared"] = shared
    data = images(dtype=dtype)
    new, raw = convert(model, calibrate=data, **options), convert(model, **options)
    assert_kept(model, new, data[1], TOLERANCE[dtype])
    assert_kept(model, new, images(5, dtype=dtype)[4], TOLERANCE[dtype])
    assert distance(new, model, data[0]) < min(0.3, distance(raw, model, data[0]) / 2)
    assert all(
        layer.num_batches_tracked > 0 for layer in new.modules() if isinstance(layer, Whitening)
    )


@loop_over(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 6, 5, stride=2, padding=2, padding_mode="reflect"), (16, 4, 40)),
        (nn.Conv2d(4, 8, 3, groups=4, bias=False), (16, 4, 9, 9)),
        (nn.Conv3d(4, 2, 2, dilation=2), (8, 4, 5, 6, 7)),
        (nn.ConvTranspose1d(4, 6, 4, stride=2, groups=2), (16, 4, 40)),
        (nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, bias=False), (16, 4, 7, 8)),
        (nn.ConvTranspose3d(4, 2, 3), (8, 4, 4, 4, 4)),
    ],
)
def test_every_kind_of_layer_keeps_its_map_on_the_batch_it_saw(layer, shape):
    model = nn.Sequential(layer.double())
    x = images(1, shape, torch.float64)[0]
    new = convert(model, pretrained=True, calibrate=[x])
    assert isinstance(new[0], Whitening)
    torch.testing.assert_close(new.eval()(x), model(x))
    torch.testing.assert_close(new.train()(x), model(x))  # mu and D of the same batch


def test_the_weight_is_w_over_d_and_the_bias_gains_w_mu():
    torch.manual_seed(0)
    old = nn.Linear(3, 2).double()
    rows = torch.randn(2, 50, 3, dtype=torch.float64) @ torch.randn(3, 3).double() + 1
    options = {"linear": ["0"], "root_linear": "newton", "n_iter": 15}  # an exact root
    new = convert(nn.Sequential(old), pretrained=True, calibrate=rows, **options)[0]
    cov = torch.stack([torch.cov(batch.T, correction=0) for batch in rows]).mean(0)
    values, vectors = torch.linalg.eigh(cov + 0.01 * torch.eye(3))
    root = vectors @ values.sqrt().diag() @ vectors.T  # D^-1
    torch.testing.assert_close(new.weight, old.weight @ root, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(new.bias, old.bias + old.weight @ rows.mean((0, 1)))


def test_nothing_of_the_given_model_or_of_the_random_state_changes():
    model = three_layers().train()
    model[2].eval()
    data = images()
    before, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    state = torch.get_rng_state()
    new = convert(model, pretrained=True, linear=True, calibrate=data)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert [m.training for m in model.modules()] == flags
    assert new.training and not new[2].training and new[0][0].momentum == 0.1
    assert all(p.requires_grad and p.grad is None and p.is_leaf for p in new.parameters())
    assert not new[0][0]._forward_pre_hooks


def test_a_trained_deconvolution_moves_to_other_statistics_without_a_change_of_outputs():
    torch.manual_seed(0)
    model = nn.Sequential(FastDeconv(4, 6, 3, bias=False), nn.ReLU(), FastDeconv(6, 2, 3))
    for x in images(3):
        model(x)
    old, data = copy.deepcopy(model), [3 * x + 1 for x in images(12)]
    assert calibrate(model, iter(data)) == 10
    assert_kept(old, model, data[0])
    assert model[0].num_batches_tracked == 10 and model[0].bias.requires_grad
    assert distance(model, old, data[0]) < distance(old, copy.deepcopy(old), data[0]) / 2


@loop_over("options", [{"input_norm": "l1"}, {"freeze": True, "freeze_iter": 2}])
def test_layers_with_a_normalisation_or_a_freeze_are_calibrated(options):
    model = nn.Sequential(FastDeconv(4, 6, 3, **options), nn.ReLU(), FastDeconv(6, 2, 3))
    for x in images(3):
        model(x)
    old, x = copy.deepcopy(model).eval(), 3 * images(1)[0] + 1
    calibrate(model, [x])
    assert_kept(old, model, x)
    torch.testing.assert_close(model.train()(x), old(x), rtol=1e-3, atol=1e-4)  # same mu and D


def test_a_layer_that_is_called_twice_undoes_the_mean_of_both_calls():
    layer = nn.Conv2d(4, 4, 3, padding=1)
    model = _Twice(nn.Sequential(layer, nn.BatchNorm2d(4))).eval()
    data = images()
    new = convert(model, pretrained=True, calibrate=data)
    assert_kept(model, new, data[0])
    assert new.inner[0].num_batches_tracked == 8


class _Twice(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + self.inner(2 * x)


def test_a_layer_that_no_batch_reaches_stays_as_it_is():
    model = three_layers()
    model.unused = nn.Conv2d(4, 8, 3)
    new = convert(model, pretrained=True, calibrate=images(), forward=lambda m, x: m[:7](x))
    assert new.unused.num_batches_tracked == 0
    torch.testing.assert_close(new.unused.weight, model.unused.weight)


def test_a_model_whose_train_returns_nothing_is_calibrated():
    class Quiet(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)

    model = Quiet(*three_layers())
    assert_kept(model, convert(model, pretrained=True, calibrate=images()), images()[0])


def test_batches_of_any_kind_are_taken_by_a_forward():
    model, data = three_layers(), images()
    named = [{"pixels": x} for x in data]
    forward = lambda model, batch: model(batch["pixels"])
    new = convert(model, pretrained=True, calibrate=named, forward=forward)
    expected = convert(model, pretrained=True, calibrate=[(x, None) for x in data])
    torch.testing.assert_close(new.state_dict(), expected.state_dict(), rtol=0, atol=0)


def tied():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    model[2].weight = model[0].weight
    return model


@loop_over(
    ("model", "data", "options", "message"),
    [
        (pair(), images(), {"pretrained": False}, "calibrate .* needs pretrained=True"),
        (pair(), None, {"forward": print}, "forward .* needs calibrate"),
        (pair(), images(), {"input_norm": "layer"}, "input_norm='layer' .* pretrained=True"),
        (pair(), [], {}, "no finite batch among 0 batches"),
        (pair(), [images(1)[0] * torch.nan], {}, "no finite batch among 1 batches"),
        (pair(), [images(1)[0][:0]], {}, "no finite batch among 1 batches"),
        (pair(), images(), {"track_running_stats": False}, "has no running statistics"),
        (tied(), images(), {}, "2 shares its weight with 0, .*: convert with skip=.'0', '2'."),
        (pair(), images(1, (8, 3, 9, 9)), {}, "input must have 4 channels"),
        (pair(), [{"x": 0}], {}, "got dict: pass forward="),
    ],
)
def test_what_cannot_be_calibrated_is_refused_in_one_line(model, data, options, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        convert(model, calibrate=data, **{"pretrained": True, **options})
    assert "\n" not in str(caught.value)


def test_an_error_leaves_a_model_as_it_was():
    model = convert(pair(), pretrained=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="4 channels"):
        calibrate(model, [*images(2), torch.ones(8, 3, 9, 9)])
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert model.training
    with pytest.raises(ValueError, match="has no deconvolution layer"):
        calibrate(pair(), images())
    with pytest.raises(ValueError, match="0 .FastDeconv2019. pads with its mean"):
        calibrate(nn.Sequential(published.FastDeconv2019(4, 4, 3)), images())


def test_half_precision_keeps_its_type_and_outputs():
    model, x = three_layers().bfloat16(), images()
    new = convert(model, pretrained=True, calibrate=[batch.bfloat16() for batch in x])
    assert {p.dtype for p in new.parameters()} == {torch.bfloat16}
    assert new[0][0].running_mean.dtype == torch.float32
    assert_kept(model, new, x[0].bfloat16(), 0.1)


def test_the_training_loss_begins_within_a_twentieth_of_batchnorms():
    labels = torch.arange(64) % 4
    for seed in range(3):
        torch.manual_seed(seed)
        clean = torch.randn(4, 4, 10, 10).cumsum(-1)
        sets = [clean[labels] + 2 * torch.randn(64, 4, 10, 10).cumsum(-1) for _ in range(45)]
        *train, test = sets
        model = three_layers()
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        for x in train:
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()
        torch.optim.swa_utils.update_bn(train[:4], model)  # running statistics lag behind
        new = convert(model, pretrained=True, linear=True, calibrate=train)
        raw = convert(model, pretrained=True, linear=True)
        losses = [F.cross_entropy(begin_training(each)(test), labels) for each in (model, new, raw)]
        own, calibrated, plain = (loss.item() for loss in losses)
        assert calibrated < 1.05 * own and plain > 1.1 * own, (seed, own, calibrated, plain)
