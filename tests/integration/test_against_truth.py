"""Drawn layers against an independent truth in float64 that whitens every patch by brute force.

The truth finds pixels by index arithmetic, runs the roots as published, and autograd differentiates
it. It shares no code with `deconv`. It imports the layers, `fuse`, and `TERMS`, the coefficients of
the resolvent. It checks its roots by eigenvalues, and the resolvent against Newton-Schulz.

A case covers evaluation before training, two training steps on inputs of different sizes (output,
gradients of input, weight and bias), running statistics, evaluation with gradients, and `fuse`.

For `rows_per_feature` above 0 a layer chooses some positions of its grid. The truth takes these
positions from the layer, and checks the rule of docs/method.md: as many per image as give
`rows_per_feature` rows per feature, none twice, and other positions in other images.

Odd cases run, on the CPU, the operations that a GPU would run.

TRUTH_SEED=N repeats a draw; `draw(seed, kind, number)` makes one of its cases.
"""

import os
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import gcd, prod
from random import Random
from time import time_ns

import pytest
import torch

import deconv
from deconv.ops import covariance, gathering, matmul
from deconv.ops.resolvent import TERMS

SEED = int(os.environ.get("TRUTH_SEED", 0))
KINDS = {  # cases of each in the suite
    "FastDeconv": 50,
    "FastDeconv1d": 25,
    "FastDeconv3d": 25,
    "FastDeconvTranspose1d": 25,
    "FastDeconvTranspose2d": 25,
    "FastDeconvTranspose3d": 25,
    "Delinear": 25,
}
BARS = {torch.float64: 1e-7, torch.float32: 2e-3}  # relative to the largest value
LEAST = 1e-2  # smallest "largest value": a layer rounds where the truth is 0
CONDITION = 500  # condition number of A from which on the bar of float32 grows with it
ROOTS = ("newton", "resolvent", "cholesky")
LAYOUTS = ("contiguous", "interleaved")
FILLS = ("reflect", "replicate", "circular")
AXES = {1: ("channel", "pixel"), 2: ("pixel",), 3: ("channel",), 4: ("joint",), 5: ("joint",)}


# The draw


@dataclass
class Case:
    """A layer and its inputs, as arguments; `str` shows them as code."""

    kind: str
    options: dict
    shapes: list[tuple[int, ...]]  # inputs of two training steps and of evaluation
    memory: str
    extra: tuple[int, ...] = ()  # pixels that `output_size` adds to a transposed convolution
    seed: int = 0

    def build(self):
        torch.manual_seed(self.seed)
        layer, dtype = getattr(deconv, self.kind)(**self.options), self.options["dtype"]
        inputs = [make_input(shape, dtype, self.memory) for shape in self.shapes]
        return set_memory_format(layer, layer.weight.dim(), self.memory), inputs

    def __str__(self):
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return (
            f"torch.manual_seed({self.seed})\n"
            f"layer = deconv.{self.kind}({arguments})\n"
            f"inputs = [make_input(shape, {self.options['dtype']}, {self.memory!r}) "
            f"for shape in {self.shapes}]\n"
            f"layer = set_memory_format(layer, layer.weight.dim(), {self.memory!r})"
            + (f"\nextra = {self.extra}  # pixels of output_size" if self.extra else "")
        )


def set_memory_format(value, dims, memory):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if memory != "channels_last" or dims not in formats:
        return value
    return value.to(memory_format=formats[dims])


def make_input(shape, dtype, memory):
    """Return correlated maps with an offset per channel, in a layout of memory."""
    x = torch.randn(shape, dtype=torch.float64)
    x = x + 0.8 * x.roll(1, -1) + 0.3 * x.flip(0) + torch.randn(x.shape[-1], dtype=x.dtype)
    if x.dim() > 2:
        x = x + 2 * torch.randn(shape[1], *[1] * (x.dim() - 2), dtype=x.dtype)
    x = (x / 2).to(dtype)
    if memory == "sliced":
        return torch.stack([x, -x], -1).flatten(-2)[..., ::2]
    if memory == "reversed":
        order = tuple(reversed(range(x.dim())))
        return x.permute(order).contiguous().permute(order)
    return set_memory_format(x, x.dim(), memory)


def draw(seed, kind, number):
    """Return case `number` of a kind; no mode, root and n_iter meet again before all have met."""
    triples = Random(seed).sample([*product(range(1, 6), ROOTS, range(1, 16))], 225)
    mode, root, n_iter = triples[(25 * [*KINDS].index(kind) + number) % len(triples)]
    pick = Random(f"{seed} {kind} {number}")
    options = dict(
        dtype=(dtype := pick.choice([torch.float64, torch.float32])),
        eps=pick.choice([1e-2, 0.1, 1.0] + [1e-3] * (dtype == torch.float64)),
        n_iter=n_iter,
        momentum=pick.choice([0.1, 0.5, 1.0]),
        layout=pick.choice(LAYOUTS),
        shared=pick.random() < 0.6,
        track_running_stats=pick.random() < 0.9,
        bias=pick.random() < 0.7,
    )
    memory = pick.choice(["contiguous", "channels_last", "sliced", "reversed"])
    counts = [pick.choice([1, 2, 3, 5, 8, 20]) for _ in range(3)]
    if kind == "Delinear":
        features = pick.choice([1, 4, 6, 12, 30, 64, 96] + [300] * (n_iter < 7))
        options |= dict(in_features=features, out_features=pick.randint(1, 5), root=root)
        options["block"] = pick.choice([1, 2, 4, 50, 512])
        shapes = [(n, *[3] * (pick.random() < 0.2), features) for n in counts]
        return Case(kind, options, shapes, memory, seed=number)
    options |= dict(
        mode=mode,
        root=root,
        block=pick.choice([1, 2, 3, 4, 6, 16]),
        sampling_stride=pick.randint(1, 4),
        rows_per_feature=pick.choice([0, 0, 0.5, 2, 24]),
        groups=pick.choice([1, 1, 2, 3]),
    )
    dims, transposed = int(kind[-2] if kind[-1] == "d" else 2), "Transpose" in kind

    def sides(*values):
        return tuple(pick.choice(values) for _ in range(dims))

    kernel = options["kernel_size"] = sides(*range(1, 5 if dims < 3 else 4))
    stride = options["stride"] = sides(1, 1, 2, 3)
    dilation = options["dilation"] = sides(1, 1, 2)
    spans = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    channels = pick.choice([1, 2, 3, 4, 6] if dims < 3 else [1, 2, 3])
    options["in_channels"] = options["groups"] * channels
    if options["in_channels"] == 1 and memory == "channels_last":
        # PyTorch 2.14 is wrong on a CPU: conv2d(ones(2, 1, 4, 5), ones(1, 1, 3, 3), None, (1, 3))
        # gives 9 and 3 where all are 9, for float32 in channels_last.
        memory = "contiguous"
    options["out_channels"] = options["groups"] * pick.randint(1, 3)
    extra = ()
    if transposed:
        options["padding"] = tuple(pick.randint(0, span) for span in spans)
        steps = [max(pair) for pair in zip(stride, dilation, strict=True)]
        options["output_padding"] = tuple(pick.randrange(step) for step in steps)
        if pick.random() < 0.2:
            extra = tuple(pick.randrange(s) for s in stride)
        least = [2 + 2 * p // s for p, s in zip(options["padding"], stride, strict=True)]
    else:
        options["padding_mode"] = pick.choice(["zeros", "zeros", *FILLS])
        options["padding"] = tuple(pick.randint(0, span) for span in spans)
        if stride == (1,) * dims and pick.random() < 0.4:
            options["padding"] = pick.choice(["same", "valid"])
        least = [span + 1 for span in spans]
    more = {1: 30, 2: 9, 3: 3}[dims]
    sizes = [tuple(side + pick.randint(0, more) for side in least) for _ in range(3)]
    if kind == "FastDeconv" and number % 25 == 7:  # 9 MB of patches are gathered in chunks
        options |= dict(mode=max(mode, 4), rows_per_feature=0, sampling_stride=1, stride=(1, 1))
        side = round((9e6 / 4 / 24 / options["in_channels"] / prod(kernel)) ** 0.5)
        counts[0], sizes[0] = 24, tuple(side + span for span in spans)
    shapes = [(n, options["in_channels"], *size) for n, size in zip(counts, sizes, strict=True)]
    if pick.random() < 0.1:
        shapes[0] = shapes[0][1:]  # one image without a batch dimension
    return Case(kind, options, shapes, memory, extra, number)


# The truth


def positions_along(size, kernel, stride, dilation, before, after, spread, mode):
    """Return for each patch along a dimension the pixel under each tap; -1: zero."""
    wide = (size - 1) * spread + 1

    def find(u):
        if mode == "reflect":
            u = abs(u)
            return u if u < size else 2 * (size - 1) - u
        if mode == "replicate":
            return min(max(u, 0), size - 1)
        if mode == "circular":
            return u % size
        return u // spread if 0 <= u < wide and u % spread == 0 else -1

    starts = range(-before, wide + after - dilation * (kernel - 1), stride)
    return [[find(start + k * dilation) for k in range(kernel)] for start in starts]


def number_pixels(size, tables):
    """Return for each patch the number of the pixel under each tap, (P, T); -1: zero."""
    rows, numbers = [[0]], []
    for length, table in zip(size, tables, strict=True):
        numbers = [
            [-1 if min(a, b) < 0 else a * length + b for a in row for b in other]
            for row in rows
            for other in table
        ]
        rows = numbers
    return torch.tensor(numbers)


class Truth:
    """The layer of a case in float64: parameters of its own, and its running statistics."""

    def __init__(self, case, layer):
        options = dict(mode=5, root="newton", groups=1, rows_per_feature=0) | case.options
        self.__dict__.update(options)
        self.linear = case.kind == "Delinear"
        self.transposed = "Transpose" in case.kind
        self.weight, self.bias = (
            None if p is None else p.detach().double().requires_grad_()
            for p in (layer.weight, layer.bias)
        )
        self.running, self.steps, self.condition = None, 0, 1.0
        if self.linear:
            self.in_channels = self.in_features
            self.kernel_size = self.stride = self.dilation = (1,)
            self.padding, self.padding_mode, self.sampling_stride = (0,), "zeros", 1
            self.weight = self.weight.detach()[..., None].requires_grad_()
        self.padding_mode = "zeros" if self.transposed else self.padding_mode
        self.taps = prod(self.kernel_size)
        self.channels = self.in_channels // self.groups
        self.columns = self.divide()

    def divide(self):
        """Return the numbers c * T + t of the features of each block of a group, (n, B, T)."""
        fits = [b for b in range(1, self.block + 1) if self.channels % b == 0]
        count, numbers = self.channels // max(fits), torch.arange(self.channels * self.taps)
        if self.layout == "contiguous":
            blocks = numbers.chunk(count)
        elif self.mode in (4, 5):
            blocks = [numbers[first::count] for first in range(count)]
        else:
            blocks = [numbers.reshape(-1, self.taps)[first::count] for first in range(count)]
        return torch.stack([block.reshape(-1, self.taps) for block in blocks])

    def find_patches(self, size, steps, single=False, extra=()):
        """Return `number_pixels` of every `steps`-th patch; `single`: of the pixels themselves."""
        tables = []
        for d, (length, k, s, dilation) in enumerate(
            zip(size, self.kernel_size, self.stride, self.dilation, strict=True)
        ):
            if self.padding in ("same", "valid"):
                total = dilation * (k - 1) * (self.padding == "same")
                before, after = total // 2, total - total // 2
            else:
                before = after = self.padding[d]
            stride, spread = s * steps[d], 1
            if self.transposed:
                before = dilation * (k - 1) - self.padding[d]
                after = before + (extra[d] if extra else self.output_padding[d])
                stride, spread = steps[d], s
            if single:
                k, stride = 1, steps[d]
                if self.padding_mode == "zeros":
                    before = after = 0
            tables.append(
                positions_along(
                    length, k, stride, dilation, before, after, spread, self.padding_mode
                )
            )
        return number_pixels(size, tables), tuple(len(table) for table in tables)

    def take(self, x, numbers):
        """Return the patches of x (N, C, *size) as (N, P, groups, C*T)."""
        pixels = torch.cat([x.flatten(2), x.new_zeros(*x.shape[:2], 1)], -1)  # the last is zero
        patches = pixels[:, :, numbers].transpose(1, 2)  # N P C T
        return patches.reshape(*patches.shape[:2], self.groups, -1)

    def step_widths(self):
        """Return the distance of sampled patches along each dimension."""
        step = 1 if self.mode == 4 else self.sampling_stride
        if not self.transposed:
            return [step] * len(self.stride)
        return [next(n for n in range(step, step + s + 1) if gcd(n, s) == 1) for s in self.stride]

    def sample(self, x, chosen):
        """Return all patches of the grid, and those for the covariance, (M, groups, n, B, T)."""
        single, size = self.mode == 3, tuple(x.shape[2:])
        numbers, _ = self.find_patches(size, self.step_widths(), single)
        patches = self.take(x, numbers)
        columns = self.columns[..., :1] // self.taps if single else self.columns
        self.check_choice(chosen, len(x), len(numbers))
        subset = patches
        if chosen is not None:
            subset = torch.stack([image[i] for image, i in zip(patches, chosen, strict=True)])
        return patches.flatten(0, 1), subset.flatten(0, 1)[..., columns]

    def check_choice(self, chosen, count, positions):
        """Check the rule of docs/method.md for the chosen positions (N, P) of an image's grid."""
        sharing = len(self.columns) if self.shared else 1
        wanted = self.rows_per_feature * self.columns[0].numel() / sharing / count
        per_image = max(round(min(wanted, positions)), 1)
        if self.mode in (3, 4) or not self.rows_per_feature or per_image >= positions:
            assert chosen is None, "a subset where all patches were expected"
            return
        assert chosen is not None, f"all patches, {per_image} of {positions} expected"
        assert chosen.shape == (count, per_image), f"{chosen.shape}, {per_image} per image expected"
        assert chosen.min() >= 0 and chosen.max() < positions
        rows = [tuple(sorted(row.tolist())) for row in chosen]
        assert all(len(set(row)) == per_image for row in rows), "a position twice"
        assert len(set(rows)) > 1 or count == 1, "the same positions in every image"

    def statistics(self, x, chosen):
        """Return the mean (groups, C*T), and covariance and D by axis, each (groups, n, d, d)."""
        patches, rows = self.sample(x, chosen)
        mean = patches.mean(0)
        rows = rows - rows.mean(0)  # M g n B T
        covs, whiten = {}, {}
        for axis in AXES[self.mode]:
            if axis == "channel":
                vectors = rows.movedim(-1, 1).flatten(0, 1)
            elif axis == "pixel":
                vectors = rows.movedim(-2, 1).flatten(0, 1)
            else:
                vectors = rows.flatten(-2)
            cov = torch.einsum("mgni,mgnj->gnij", vectors, vectors) / len(vectors)
            if self.shared:
                cov = cov.mean(1, keepdim=True).expand(cov.shape)
            covs[axis] = cov
            whiten[axis] = self.roots(cov)
            rows = self.whiten(rows, {axis: whiten[axis]})
        return mean, covs, whiten

    def roots(self, cov):
        """Return D of covariances (groups, n, d, d)."""
        return torch.stack([self.root_of(c) for c in cov.flatten(0, 1)]).reshape(cov.shape)

    def root_of(self, cov):
        """Return D of one covariance, checked by its eigenvalues."""
        identity = torch.eye(len(cov), dtype=cov.dtype)
        A = cov + self.eps * identity
        norm = A.square().sum().sqrt()
        x, basis = torch.linalg.eigh(A.detach() / norm.detach())
        response, floor = torch.ones_like(x), 1.5 ** (-2 * self.n_iter)
        for _ in range(self.n_iter):
            response = response * (3 - x * response**2) / 2
        self.condition = max(self.condition, ((x.max() + floor) / (x.min() + floor)).item())
        if self.root == "newton":
            Y, Z = A / norm, identity
            for _ in range(self.n_iter):
                T = (3 * identity - Z @ Y) / 2
                Y, Z = Y @ T, T @ Z
            D = Z / norm.sqrt()
        elif self.root == "resolvent":
            constant, slope, poles = TERMS[self.n_iter]
            D = constant * identity + slope * A / norm
            fit = constant + slope * x
            for shift, weight in poles:
                D = D + weight * torch.linalg.inv(A / norm + shift * identity)
                fit = fit + weight / (x + shift)
            D = D / norm.sqrt()
            assert ((fit - response).abs() <= 0.01 * response).all(), "1 % off Newton-Schulz"
            response = fit
        else:
            D = torch.linalg.inv(torch.linalg.cholesky(A + floor * norm * identity))
            response = (x + floor).rsqrt()
            assert near(D.detach(), D.detach().tril(), 1e-9) < 1
        symmetric = D.T @ D if self.root == "cholesky" else D
        power = 2 if self.root == "cholesky" else 1
        by_eigenvalues = (basis * (response * norm.rsqrt()) ** power) @ basis.T
        assert near(symmetric.detach(), by_eigenvalues.detach(), 1e-9) < 1, "the truth is unsure"
        return D

    def whiten(self, patches, whiten):
        """Return D x of patches x (..., groups, n, B, T)."""
        for axis, D in whiten.items():
            if axis == "joint":
                flat = patches.flatten(-2)
                patches = torch.einsum("gnij,...gnj->...gni", D, flat).reshape(patches.shape)
            elif axis == "channel":
                patches = torch.einsum("gnij,...gnjt->...gnit", D, patches)
            else:
                patches = torch.einsum("gnij,...gnbj->...gnbi", D, patches)
        return patches

    def apply(self, x, mean, whiten, extra=()):
        """Whiten every patch that the kernel sees, and weigh it: (N, out, *positions)."""
        steps = [1] * len(self.stride)
        numbers, positions = self.find_patches(tuple(x.shape[2:]), steps, extra=extra)
        if mean.shape[-1] < self.channels * self.taps:
            mean = mean.repeat_interleave(self.taps, -1)
        white = self.whiten((self.take(x, numbers) - mean)[..., self.columns], whiten)
        if self.transposed:  # (g C) o *K, its last tap first
            weight = self.weight.unflatten(0, (self.groups, -1)).transpose(1, 2)
            weight = weight.flatten(3).flip(3)
        else:
            weight = self.weight.unflatten(0, (self.groups, -1)).flatten(3)
        weight = weight.flatten(2)[..., self.columns]  # g o n B T
        y = torch.einsum("mpgnbt,gonbt->mgop", white, weight).flatten(1, 2)
        return (y if self.bias is None else y + self.bias[:, None]).unflatten(2, positions)

    def __call__(self, x, training, chosen=None, extra=()):
        """Return the layer's output, and update running statistics in training."""
        shape, dims = x.shape, len(self.stride)
        x = x.reshape(-1, shape[-1], 1) if self.linear else x.reshape(-1, *shape[-1 - dims :])
        if training or not self.track_running_stats:
            mean, covs, whiten = self.statistics(x, chosen)
            if training:
                self.update(mean.detach(), {axis: cov.detach() for axis, cov in covs.items()})
        elif self.running:
            mean, covs = self.running
            with torch.no_grad():
                whiten = {axis: self.roots(cov) for axis, cov in covs.items()}
        else:
            mean, whiten = torch.zeros(self.groups, self.channels * self.taps).double(), {}
        y = self.apply(x, mean, whiten, extra)
        if self.linear:
            return y.reshape(*shape[:-1], -1)
        return y if len(shape) == dims + 2 else y[0]

    def update(self, mean, covs):
        """Average the statistics of a batch into the running ones, the first one alone."""
        self.steps += 1
        m = 1 if self.running is None else self.momentum
        old, olds = self.running or (mean, covs)
        covs = {axis: (1 - m) * olds[axis] + m * cov for axis, cov in covs.items()}
        self.running = (1 - m) * old + m * mean, covs

    def buffers(self):
        """Return the running statistics as the layer's buffers hold them."""
        mean, covs = self.running
        buffers = {"running_mean": mean.flatten(), "num_batches_tracked": torch.tensor(self.steps)}
        for axis, cov in covs.items():
            cov = cov[:, :1] if self.shared else cov
            buffers[f"running_cov_{axis}"] = cov.flatten(0, 1)
        return buffers


# The comparison


def near(given, expected, bar):
    """Return the largest error as a multiple of the bar; infinity for a NaN."""
    if given.shape != expected.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    scale = max(expected.abs().max().item(), LEAST)
    error = (given.double() - expected.double()).abs().max().item() / scale / bar
    return error if error == error else float("inf")


def reported_choice(layer, x):
    """Return which positions of the grid the layer samples of each image, (N, P); None: all.

    The only look inside of a layer.
    """
    images = layer.prepare_input(x)
    sampling, _ = layer.choose_patches(images)
    if not hasattr(sampling, "choose"):
        return None
    return sampling.choose(len(images), images.shape[2:], x.device)


def compare(case):
    """Return the errors of a case above its bar, as text by name."""
    layer, (first, second, last) = case.build()
    truth, bar, errors = Truth(case, layer), BARS[case.options["dtype"]], []

    def check(name, given, expected):
        slack = max(truth.condition / CONDITION, 1) if bar > 1e-4 else 1
        multiple = near(given, expected, bar * slack)
        if not multiple < 1:
            errors.append(f"{name}: {multiple:.3g} times the bar")

    def run(name, x):
        chosen, more = reported_choice(layer, x), {}
        ours, theirs = x.detach().requires_grad_(), x.detach().double().requires_grad_()
        expected = truth(theirs, layer.training, chosen, case.extra)
        if case.extra:
            more = {"output_size": list(expected.shape[-len(case.extra) :])}
        given = layer(ours, **more)
        check(f"{name}: output", given, expected)
        slope = torch.randn(expected.shape, dtype=torch.float64)
        names = ["input", "weight", "bias"][: 2 if truth.bias is None else 3]
        gradients = [
            torch.autograd.grad(y, leaves[: len(names)], slope.to(y.dtype))
            for y, leaves in [
                (given, (ours, layer.weight, layer.bias)),
                (expected, (theirs, truth.weight, truth.bias)),
            ]
        ]
        for leaf, our, their in zip(names, *gradients, strict=True):
            check(f"{name}: gradient of the {leaf}", our, their.reshape(our.shape))
        return expected

    layer.eval()
    run("evaluation before training", last)
    layer.train()
    run("first step", first)
    run("second step", second)
    layer.eval()
    expected = run("evaluation", last)
    if not case.options["track_running_stats"]:
        return errors
    buffers = dict(layer.named_buffers())
    for name, buffer in truth.buffers().items():
        check(name, buffers.pop(name), buffer)
    assert not buffers
    if not case.extra:
        plain = deconv.fuse(layer)
        assert type(plain).__module__.startswith("torch.nn.modules")
        check("fused", plain(last), expected)
    return errors


@pytest.fixture
def run_cases(monkeypatch):
    def choose_operations(number):
        for module in (covariance, gathering, matmul):
            monkeypatch.setattr(module, "saves_launches", lambda device: number % 2 == 1)

    return partial(run_and_compare, choose_operations)


def run_and_compare(choose_operations, kind, seed, numbers):
    failures = []
    for number in numbers:
        case = draw(seed, kind, number)
        choose_operations(number)
        try:
            errors = compare(case)
        except Exception as error:
            errors = [f"{type(error).__name__}: {error}"]
        if errors:
            lines = "\n  ".join(errors)
            failures.append(f"TRUTH_SEED={seed}, {kind} number {number}\n  {lines}\n{case}")
    if failures:
        text = "\n\n".join(failures)
        pytest.fail(f"{len(failures)} of {len(numbers)} cases fail\n\n{text}", pytrace=False)


@pytest.mark.parametrize("kind", KINDS)
def test_drawn_layers_compute_the_truth(kind, run_cases):
    run_cases(kind, SEED, range(KINDS[kind]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_more_drawn_layers_compute_the_truth(kind, run_cases):
    seed = SEED or time_ns() % 10**9
    print(f"TRUTH_SEED={seed}")
    run_cases(kind, seed, range(20 * KINDS[kind]))
