"""Estimate how long a training takes on one CPU thread or GPU: for planning, not for comparison."""

from __future__ import annotations

# BatchNorm, then deconvolution: seconds per step, and milliseconds per image on top.
# One core of an Intel Xeon, torch 2.14.1, float32, blocks of 64. Fitted to steps of 16 and 48
# images on a busy machine; DenseNet-121, DPN-92 and blocks of 16 are guesses.
COSTS: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "vgg11": ((0.05, 8.6), (0.49, 13.2)),
    "vgg11, blocks of 16": ((0.05, 8.6), (0.12, 10.2)),
    "vgg16": ((0.10, 15.9), (0.91, 26.8)),
    "resnet18": ((0.11, 28.3), (0.80, 57.9)),
    "preact": ((0.0, 34.3), (1.15, 46.5)),
    "senet": ((0.0, 34.4), (1.10, 49.3)),
    "densenet121": ((0.0, 100.0), (2.0, 130.0)),
    "resnext": ((0.0, 97.5), (0.29, 118.1)),
    "mobilev2": ((0.05, 23.6), (0.45, 30.2)),
    "dpn": ((0.0, 250.0), (2.0, 350.0)),
    "pnasnetA": ((0.31, 38.8), (0.61, 92.8)),
    "efficient": ((0.18, 9.5), (0.44, 22.9)),
    # One core of an AMD EPYC (AVX-512 BF16), channels last; blocks of 16.
    "vgg11, bfloat16": ((0.04, 2.8), (0.17, 3.0)),
    "resnet18, bfloat16": ((0.03, 9.4), (0.34, 8.9)),
    "airbench, bfloat16": ((0.1, 2.0), (0.2, 2.1)),
}
# BatchNorm, then deconvolution: milliseconds per step of up to 128 images on an NVIDIA H200, from
# results/table1.json. Several trainings shared the GPU, so these are upper bounds.
GPU, GPU_BATCH = "NVIDIA H200", 128
GPU_COSTS = {
    "vgg11": (22, 63),
    "vgg11, blocks of 16": (22, 67),
    "vgg16": (52, 140),
    "resnet18": (52, 185),
    "preact": (56, 183),
    "senet": (66, 180),
    "densenet121": (241, 615),
    "resnext": (110, 205),
    "mobilev2": (116, 189),
    "dpn": (278, 564),
    "pnasnetA": (97, 250),
    "efficient": (63, 129),
    "vgg11, bfloat16": (22, 67),  # as in float32
    "resnet18, bfloat16": (52, 185),
    "airbench, bfloat16": (4, 10),  # a guess
}
GPU_START = 20.0  # seconds: imports, decoding of images, capture of the graph
TEST_IMAGES = 10_000  # of CIFAR-10 and Fashion-MNIST
FORWARD = 1 / 3  # cost of a test image, relative to a training image


def estimate(
    arch: str, deconv: bool, steps: int, batch_size: int, *, tests: int = 1, slowdown: float = 1
) -> dict[str, float]:
    """Return the `seconds` and `gpu_seconds` of a run with training slower by `slowdown`."""
    per_step, per_image = COSTS[arch][deconv]
    training = slowdown * steps * (per_step + batch_size * per_image / 1000)
    gpu_step = GPU_COSTS[arch][deconv] / 1000 * max(batch_size / GPU_BATCH, 1)
    gpu_tests = tests * gpu_step * FORWARD * TEST_IMAGES / max(batch_size, GPU_BATCH)
    return {
        "seconds": training + tests * TEST_IMAGES * FORWARD * per_image / 1000,
        "gpu_seconds": GPU_START + slowdown * steps * gpu_step + gpu_tests,
    }
