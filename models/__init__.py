"""Networks: the tables of architectures, and the functions that build one.

    layers = make_layers(deconv=True)
    model = build_model("vgg11", layers, num_classes=100)
    model = build_imagenet_model("resnet18d", layers)

Every architecture has one definition, made of the layers that it is given; see `factory.py`.
CONTRIBUTING.md tells how to add a network.
"""

from __future__ import annotations

from .external import count_pretrained_classes
from .factory import Layers, make_layers, model_hooks
from .imagenet import IMAGENET_ARCHITECTURES, build_imagenet_model, describe_imagenet_architectures
from .registry import Architecture, init_from_images, init_weights
from .small_images import ARCHITECTURES, build_model, describe_architectures
from .transfer import take_weights

__all__ = [
    "ARCHITECTURES",
    "IMAGENET_ARCHITECTURES",
    "Architecture",
    "Layers",
    "build_imagenet_model",
    "build_model",
    "count_pretrained_classes",
    "describe_architectures",
    "describe_imagenet_architectures",
    "init_from_images",
    "init_weights",
    "make_layers",
    "model_hooks",
    "take_weights",
]
