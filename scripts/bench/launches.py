"""Count the GPU kernels that a layer launches, and its graphs under torch.compile.

Without a GPU, the layer runs on the meta device. Every operator that is not a view or an allocation
counts; operators that launch several kernels count as such (`kernels`). A call of a library, such
as cuSOLVER's Cholesky factor, counts as one. On a GPU, torch.profiler counts, copies and fills
included.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts.bench.layers import DIRECTIONS, WHOLE, Key, Stopwatch, divide

aten = torch.ops.aten
META = torch.device("meta")
RUNNING = "running statistics"
WARMUP = 3  # calls before counting: libraries choose their kernels in the first call

# Operators without a kernel that are no views by their signatures.
NO_KERNEL = {aten._unsafe_view, aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty}
# Fill and copy; fill and diagonal; copy and product (aten/src/ATen/native: PadNd.cpp,
# cuda/TensorFactories.cu, cuda/Blas.cpp).
TWO_KERNELS = {aten.constant_pad_nd, aten.eye, aten.baddbmm}


def kernels(func: Any, args: tuple[Any, ...], result: Any) -> int:
    """Return the number of kernels that a call of an operator launches."""
    returned = func._schema.returns
    view = any(r.alias_info is not None and not r.alias_info.is_write for r in returned)
    operator = func.overloadpacket
    if view or operator in NO_KERNEL or not _has_tensor(result):
        return 0
    if operator is aten.copy_ and _same(*args[:2]):  # `x[0] += 1` ends with such a copy
        return 0
    if operator is aten.convolution:  # cuDNN's has no bias, which is added after it
        return 1 if args[2] is None else 2
    if operator is aten.convolution_backward:  # one for each gradient
        return sum(tensor is not None for tensor in result)
    return 2 if operator in TWO_KERNELS else 1


def _same(one: Tensor, other: Tensor) -> bool:
    """Return True if two tensors are the same view of the same memory."""
    places = [(x.untyped_storage()._cdata, x.storage_offset(), x.stride()) for x in (one, other)]
    return places[0] == places[1] and one.shape == other.shape


def _has_tensor(result: Any) -> bool:
    several = result if isinstance(result, tuple | list) else (result,)
    return any(isinstance(one, Tensor) for one in several)


class Launches(TorchDispatchMode):
    """A dispatch mode that counts kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count += kernels(func, args, result)
        return result


class LaunchWatch(Stopwatch):
    """A stopwatch whose time is the number of launches so far."""

    def __init__(self, launches: Launches) -> None:
        super().__init__(META)
        self.launches = launches

    def now(self) -> float:
        return float(self.launches.count)


def count_on_paper(layer: nn.Module, shape: tuple[int, ...]) -> Counter[Key]:
    """Count launches by layer, step and direction, as `layers.measure` takes seconds.

    RUNNING is a separate step here.
    """
    layer = deepcopy(layer).to(META).train()
    x = torch.empty(shape, device=META, requires_grad=True)
    layer(x)  # makes what later steps reuse
    launches = Launches()
    watch = LaunchWatch(launches)
    if hasattr(layer, "_update_running"):
        layer._update_running = watch.timed(layer._update_running, RUNNING)
    with watch.attached(layer), launches:
        with watch.span("", WHOLE, "forward"):
            out = layer(x)
        grad = torch.empty_like(out)
        with watch.span("", WHOLE, "backward"):
            out.backward(grad)
    return divide(watch.read())


def count_on_gpu(
    layer: nn.Module, shape: tuple[int, ...], device: torch.device, *, compiled: bool = False
) -> dict[str, int]:
    """Count the launches of forward and backward with the profiler."""
    layer = deepcopy(layer).to(device).train()
    layer = torch.compile(layer) if compiled else layer
    x = torch.randn(shape, device=device, requires_grad=True)
    grad = torch.empty_like(layer(x))

    def forward() -> Tensor:
        layer.zero_grad()
        x.grad = None
        return layer(x)

    first, both = count_calls(forward), count_calls(lambda: forward().backward(grad))
    return dict(zip(DIRECTIONS, (first, both - first), strict=True))


def count_calls(call: Callable[[], Any]) -> int:
    """Count the kernels, copies and fills of a call on the GPU."""
    for _ in range(WARMUP):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    on_gpu = (e for e in profiler.events() if e.device_type == DeviceType.CUDA)
    return sum(not event.is_user_annotation for event in on_gpu)


def count_graphs(layer: nn.Module, shape: tuple[int, ...], *, training: bool) -> int:
    """Count the graphs that torch.compile makes of the forward; 1 without graph breaks.

    The backward is compiled from the same graphs. The layer stays where it is.
    """
    layer = deepcopy(layer).train(training)
    x = torch.randn(shape, device=next(layer.parameters()).device, requires_grad=True)
    torch._dynamo.reset()
    return torch._dynamo.explain(layer)(x).graph_count
