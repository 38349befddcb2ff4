"""deconv.convert and deconv.fuse on networks of 1 to 3 dimensions, transposed layers included."""

import pickle

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from deconv import convert, fuse, plan
from deconv.surgery.batchnorm import ChannelAffine
from deconv.surgery.plan import DECONVOLUTIONS
from tests.oracle import CONVOLUTIONS, TRANSPOSED, make_maps
from tests.pairwise import loop_over

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_network(dims):
    """Down and up again; BatchNorm after the convolutions, and before the last one."""
    down, up, norm = CONVOLUTIONS[dims - 1], TRANSPOSED[dims - 1], NORMS[dims]
    layers = [down(4, 6, 3, 2, 1, padding_mode="reflect", bias=False), norm(6), nn.ReLU()]
    layers += [up(6, 4, 4, 2, 1, groups=2, bias=False), norm(4), nn.ReLU()]
    layers += [nn.AvgPool1d(1) if dims == 1 else nn.Identity(), norm(4), nn.ReLU(), down(4, 2, 1)]
    model = nn.Sequential(*layers)
    for module in model.modules():
        if isinstance(module, norm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    return model.eval()


@loop_over("dims", [1, 2, 3])
def test_networks_of_all_dimensions_are_converted_and_fused(dims):
    model, x = make_network(dims), make_maps(dims)
    names = [DECONVOLUTIONS[k].__name__ for k in (CONVOLUTIONS[dims - 1], TRANSPOSED[dims - 1])]
    new = convert(model)
    kinds = [type(module).__name__ for module in new]
    assert kinds[0] == kinds[-1] == names[0] and kinds[3] == names[1]
    assert [kinds[number] for number in (1, 4, 7)] == ["Identity"] * 3
    assert new[0].bias is not None and new[3].bias.shape == (4,)  # BatchNorm's shift is gone
    new(x).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in new.parameters())
    kept = convert(model, pretrained=True)
    torch.testing.assert_close(kept(x), model(x), rtol=1e-9, atol=1e-9)
    traced = fx.symbolic_trace(kept)
    assert all(f"({n}): {names[n // 3]}(" in repr(traced) for n in (0, 3))
    torch.testing.assert_close(traced(x), model(x), rtol=1e-9, atol=1e-9)
    plain = fuse(kept)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-9, atol=1e-9)
    assert b"deconv" not in pickle.dumps(plain)


def test_batchnorm_of_vectors_stays_and_that_of_maps_goes():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.maps, self.conv = nn.BatchNorm1d(4), nn.Conv1d(4, 4, 3)
            self.vectors, self.head = nn.BatchNorm1d(4), nn.Linear(4, 2)

        def forward(self, x):
            x = F.relu(self.maps(x))
            x = x.mean(2) + self.conv(x).mean(2)
            return self.head(self.vectors(x))

    rows = {row.name: (row.action, row.reason) for row in plan(Both(), linear=False)}
    assert rows["vectors"] == (
        "kept",
        "may normalise vectors: linear=[NAME] whitens a linear layer after it",
    )
    assert {row.name: row.action for row in plan(Both())}["vectors"] == "replaced"
    assert rows["maps"][0] == "kept"  # its output goes past the convolution as well
    ordered = plan(nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 2, 3)))
    assert ordered[0].action == "replaced"


@loop_over("dims", [1, 2, 3])
@loop_over("inner", [False, True])
def test_batchnorm_after_the_activation_goes_in_all_dimensions(dims, inner):
    """A convolution's maps are maps behind layers that leave them so, whatever follows."""
    conv, pool = CONVOLUTIONS[dims - 1](4, 4, 2), [nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d]
    before = [conv, nn.ReLU(), pool[dims - 1](2), nn.Dropout()]
    before = [nn.Sequential(*before)] if inner else before
    model = nn.Sequential(*before, NORMS[dims](4), nn.Flatten(), nn.LazyLinear(2)).eval()
    model(make_maps(dims))
    nn.init.normal_(model[-3].running_mean)
    row = next(row for row in plan(model, linear=False) if isinstance(row.module, NORMS[dims]))
    assert (row.action, row.reason) == ("replaced", "whitening replaces normalisation of maps")
    kept, x = convert(model, pretrained=True, linear=False), make_maps(dims)
    assert type(kept[-3]) is ChannelAffine
    torch.testing.assert_close(kept(x), model(x))


class Shortcut(nn.Sequential):
    """A block that also adds the output of its first layer."""

    def forward(self, x):
        y = self[0](x)
        return self[1](y) + y


NORM, SKIPPED = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)


@loop_over(
    ("name", "after"),
    [
        ("3", [NORM, nn.ReLU(), SKIPPED]),
        ("1.1", [Shortcut(NORM, SKIPPED)]),
        ("2", [nn.Sequential(NORM, nn.ReLU()), SKIPPED]),
        ("2.1", [NORM, nn.Sequential(nn.ReLU(), SKIPPED), nn.Conv2d(4, 4, 1)]),
    ],
)
def test_a_batchnorm_before_a_skipped_convolution_stays(name, after):
    """Keep the norm of a pre-activation block: the plain convolution needs normalised inputs."""
    before = nn.Sequential(nn.Conv2d(4, 4, 2), nn.MaxPool2d(2))
    rows = plan(nn.Sequential(before, *after), skip=[name])
    row = next(row for row in rows if row.module is NORM)
    assert (row.action, row.reason) == ("kept", f"precedes {name}, which is skipped")


@loop_over(
    ("first", "last", "shape"),
    [
        (nn.Flatten(), nn.Linear(3, 2), (4, 3)),
        (nn.Flatten(), nn.Linear(3, 2), (3, 3)),  # as many images as features
        (nn.Identity(), nn.Conv1d(3, 2, 2), (4, 3, 5)),
    ],
)
@loop_over("kind", [nn.BatchNorm1d, nn.SyncBatchNorm])
def test_a_batchnorm_of_vectors_before_a_whitened_layer_keeps_its_outputs(kind, first, last, shape):
    model = nn.Sequential(first, kind(3), last).double().eval()
    nn.init.normal_(model[1].running_mean)
    linear = ["2"] if isinstance(last, nn.Linear) else False
    new, x = convert(model, pretrained=True, linear=linear), torch.randn(shape)
    assert type(new[1]) is ChannelAffine
    for network in (new, fuse(new)):
        torch.testing.assert_close(network(x), model(x))


@loop_over("norm", [nn.BatchNorm1d, nn.SyncBatchNorm])
@loop_over("last", [nn.Flatten, lambda: nn.Linear(4, 4)])
def test_a_batchnorm_that_sees_vectors_for_certain_stays(norm, last):
    pool = [nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*pool, last(), nn.ReLU(), norm(4), nn.Linear(4, 2)).eval()
    new, x = convert(model, pretrained=True, linear=False), make_maps(2)
    assert type(new[5]) is norm
    torch.testing.assert_close(new(x), model(x))
