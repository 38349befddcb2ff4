"""Networks with the layers, the names and the order of registration of the published networks.

`make` holds the makers of the layers: conv, norm, channel and linear. Deconvolutions have no norm.
"""

from functools import partial
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

from deconv import published

PLAIN = partial(nn.Conv2d, bias=False)
BATCHNORM = SimpleNamespace(conv=PLAIN, stem=PLAIN, norm=nn.BatchNorm2d, channel=None)
BATCHNORM.linear = nn.Linear


def deconvolution(stem_iter=5, *, channel=None, linear=nn.Linear):
    stem = partial(published.FastDeconv, n_iter=stem_iter)
    layers = {"conv": published.FastDeconv, "stem": stem, "norm": None}
    return SimpleNamespace(**layers, channel=channel, linear=linear)


def add(module, make, **layers):
    """Register the layers that have a maker."""
    for name, (kind, *shape) in layers.items():
        if maker := getattr(make, kind):
            setattr(module, name, maker(*shape))


def apply(module, name, x):
    return getattr(module, name)(x) if hasattr(module, name) else x


class Basic(nn.Module):
    """Basic block: convolutions are registered before norms."""

    def __init__(self, make, channels, out, stride):
        super().__init__()
        self.conv1 = make.conv(channels, out, 3, stride=stride, padding=1)
        self.conv2 = make.conv(out, out, 3, padding=1)
        self.shortcut = nn.Sequential()
        add(self, make, bn1=("norm", out), bn2=("norm", out))
        if stride > 1:
            parts = [make.conv(channels, out, 1, stride=stride)]
            parts += [make.norm(out)] if make.norm else []
            self.shortcut = nn.Sequential(*parts)

    def forward(self, x):
        y = F.relu(apply(self, "bn1", self.conv1(x)))
        return F.relu(apply(self, "bn2", self.conv2(y)) + self.shortcut(x))


class BasicLarge(Basic):
    """Basic block for ImageNet: the shortcut is called downsample and keeps its BatchNorm."""

    def __init__(self, make, channels, out, stride):
        super().__init__(make, channels, out, stride)
        del self.shortcut
        if stride > 1:
            conv = make.conv(channels, out, 1, stride=stride)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(out))

    def forward(self, x):
        y = F.relu(apply(self, "bn1", self.conv1(x)))
        return F.relu(apply(self, "bn2", self.conv2(y)) + apply(self, "downsample", x))


class PreAct(nn.Module):
    """Preactivation block, with a gate in SENet; the shortcut is registered before the gate."""

    def __init__(self, make, channels, out, stride, gate=False):
        super().__init__()
        add(self, make, bn1=("norm", channels))
        self.conv1 = make.conv(channels, out, 3, stride=stride, padding=1)
        add(self, make, bn2=("norm", out))
        self.conv2 = make.conv(out, out, 3, padding=1)
        if stride > 1:
            conv = make.conv(channels, out, 1, stride=stride)
            self.shortcut = nn.Sequential(conv) if make.norm else conv
        if gate:
            conv = nn.Conv2d if make.norm else make.conv
            self.fc1, self.fc2 = conv(out, out // 16, 1), conv(out // 16, out, 1)

    def forward(self, x):
        active = F.relu(apply(self, "bn1", x))
        y = self.conv2(F.relu(apply(self, "bn2", self.conv1(active))))
        if hasattr(self, "fc1"):
            scale = self.fc2(F.relu(self.fc1(y.mean((2, 3), keepdim=True)))).sigmoid()
            y = y * scale
        return y + (self.shortcut(active) if hasattr(self, "shortcut") else x)


class Stages(nn.Module):
    """ResNet, Preact-ResNet or SENet of two blocks a stage; `deconv1` is registered early."""

    def __init__(self, widths, block, make, *, large=False, use_norm=True):
        super().__init__()
        self.use_norm, self.head = use_norm, "fc" if large else "linear"
        geometry = {"stride": 2, "padding": 3} if large else {"padding": 1}
        self.conv1 = make.stem(3, widths[0], 7 if large else 3, **geometry)
        add(self, make, bn1=("norm", widths[0]))
        add(self, make, deconv1=("channel",))
        self.pool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        channels = widths[0]
        for number, width in enumerate(widths, 1):
            stride = 1 if number == 1 else 2
            blocks = block(make, channels, width, stride), block(make, width, width, 1)
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
            channels = width
        setattr(self, self.head, make.linear(channels, 10))

    def forward(self, x):
        x = self.conv1(x)
        if self.use_norm:  # preact registers bn1, but does not use it
            x = F.relu(apply(self, "bn1", x))
        x = self.pool(x)
        for stage in (child for name, child in self.named_children() if name[:5] == "layer"):
            x = stage(x)
        return getattr(self, self.head)(apply(self, "deconv1", x).mean((2, 3)))


class Dense(nn.Module):
    """Dense layer; `newest` is where its new channels go: 0 first, 1 last."""

    def __init__(self, make, channels, growth, newest, names):
        super().__init__()
        norm, self.newest, self.norm = names, newest, names
        add(self, make, **{f"{norm}1": ("norm", channels)})
        self.conv1 = make.conv(channels, 4 * growth, 1)
        add(self, make, **{f"{norm}2": ("norm", 4 * growth)})
        self.conv2 = make.conv(4 * growth, growth, 3, padding=1)

    def forward(self, x):
        y = self.conv1(F.relu(apply(self, f"{self.norm}1", x)))
        y = self.conv2(F.relu(apply(self, f"{self.norm}2", y)))
        return torch.cat([x, y] if self.newest else [y, x], 1)


class Transition(nn.Module):
    def __init__(self, make, channels, norm):
        super().__init__()
        self.norm_name = norm
        add(self, make, **{norm: ("norm", channels)})
        self.conv = make.conv(channels, channels // 2, 1)

    def forward(self, x):
        return F.avg_pool2d(self.conv(F.relu(apply(self, self.norm_name, x))), 2)


class DenseNet(nn.Module):
    """DenseNet for small images; for large ones, names and order of channels are torchvision's."""

    def __init__(self, depths, growth, make, *, large=False):
        super().__init__()
        channels, self.large = 2 * growth, large
        features = nn.Module() if large else self
        norm, letters = ("norm", "denseblock transition") if large else ("bn", "dense trans")
        dense, trans = letters.split()
        if large:
            features.conv0 = make.stem(3, channels, 7, stride=2, padding=3)
            add(features, make, norm0=("norm", channels))
            self.features = features
        else:
            self.conv1 = make.stem(3, channels, 3, padding=1)
        self.steps = []
        for number, depth in enumerate(depths, 1):
            block = nn.Sequential()
            for index in range(depth):
                name = f"denselayer{index + 1}" if large else str(index)
                block.add_module(name, Dense(make, channels, growth, int(large), norm))
                channels += growth
            setattr(features, f"{dense}{number}", block)
            self.steps.append(f"{dense}{number}")
            if number < len(depths):
                setattr(features, f"{trans}{number}", Transition(make, channels, norm))
                self.steps.append(f"{trans}{number}")
                channels //= 2
        self.last = "norm5" if large else "bn"
        add(features, make, **{self.last: ("norm", channels)})
        self.head = "classifier" if large else "linear"
        setattr(self, self.head, make.linear(channels, 10))

    def forward(self, x):
        features = self.features if self.large else self
        if self.large:
            x = F.max_pool2d(F.relu(apply(features, "norm0", features.conv0(x))), 3, 2, 1)
        else:
            x = self.conv1(x)
        for step in self.steps:
            x = getattr(features, step)(x)
        x = F.relu(apply(features, self.last, x))
        return getattr(self, self.head)(x.mean((2, 3)))


class VGG(nn.Module):
    """VGG for small images, or with two hidden linear layers for large images.

    `channel` stands before every linear layer; for small images its name is channel_deconv, and it
    is registered first. A convolution before a norm has a bias.
    """

    def __init__(self, make, widths, hidden=None):
        super().__init__()
        if not hidden:
            add(self, make, channel_deconv=("channel",))
        modules, conv, channels = [], make.stem, 3
        for width, number in zip(widths, (1, 1, 2), strict=True):
            for _ in range(number):
                bias = {"bias": True} if make.norm else {}
                modules += [conv(channels, width, 3, padding=1, **bias)]
                modules += [make.norm(width)] if make.norm else []
                modules.append(nn.ReLU())
                conv, channels = make.conv, width
            modules.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*modules)
        self.side = 7 if hidden else 1
        if not hidden:
            self.classifier = make.linear(channels, 10)
            return
        head = []
        for inputs, outputs in ((49 * channels, hidden), (hidden, hidden), (hidden, 10)):
            head += [make.channel()] if make.channel else []
            head += [make.linear(inputs, outputs), nn.ReLU(), nn.Dropout()]
        self.classifier = nn.Sequential(*head[:-2])

    def forward(self, x):
        x = F.adaptive_avg_pool2d(self.features(x), self.side)
        return self.classifier(apply(self, "channel_deconv", x).flatten(1))
