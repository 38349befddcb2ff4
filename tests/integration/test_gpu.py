"""What only a GPU can show; skipped without one."""

import json

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import main
from deconv import FastDeconv
from deconv.ops.inverse_sqrt import ROOTS
from models import model_hooks
from util.errors import TrainingDiverged
from util.tracking.logger import read_log
from util.training.accelerator import Accelerator
from util.training.ema import ExponentialAverage
from util.training.engine import train_one_epoch
from util.training.hooks import ModelHooks
from util.training.nonfinite import find_nonfinite
from util.training.optim import build_criterion, build_optimizer, build_scheduler

pytestmark = pytest.mark.gpu
GPU, HOOKS = torch.device("cuda", 0), ModelHooks(**model_hooks())
LINE = "--dataset digits --arch vgg11 --deconv True --batch-size 128 --lr .05 --epochs 2"


def train(line, run_dir):
    main.main([*LINE.split(), *line.split(), "--run-dir", str(run_dir)])
    return json.loads((run_dir / "summary.json").read_text())


@pytest.mark.parametrize("mode", [1, 2, 3, 4, 5])
def test_a_layer_computes_as_on_the_cpu(mode):
    torch.manual_seed(0)
    layer, x = (
        FastDeconv(16, 8, 3, padding=1, mode=mode, block=8).double(),
        torch.randn(8, 16, 9, 9),
    )
    gpu = FastDeconv(16, 8, 3, padding=1, mode=mode, block=8).double().cuda()
    gpu.load_state_dict(layer.state_dict())
    for module, device in ((layer, "cpu"), (gpu, "cuda")):
        module(x.double().to(device)).square().sum().backward()
    torch.testing.assert_close(gpu.weight.grad.cpu(), layer.weight.grad)
    for name, buffer in gpu.named_buffers():
        assert buffer.device.type == "cuda"
        torch.testing.assert_close(buffer.cpu(), layer.get_buffer(name))


@pytest.mark.parametrize("root", ROOTS)
def test_products_in_tf32_change_no_bit_of_the_folded_weight(root):
    x = torch.randn(64, 32, 9, 9, device="cuda")
    x = torch.einsum("dc,nchw->ndhw", torch.randn(32, 32, device="cuda"), x)
    values = []
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            torch.manual_seed(0)
            layer = FastDeconv(32, 8, 3, n_iter=15, root=root, block=32).cuda()
            given = x.clone().requires_grad_()
            folded = layer.fold_whitening(given)
            sum(value.square().sum() for value in folded).backward()
            values.append([*folded, given.grad, layer.weight.grad, *layer.buffers()])
        left, right = torch.randn(2, 256, 256, device="cuda")
        assert (left @ right - left.double() @ right.double()).abs().max() > 1e-3  # TF32 is at work
    finally:
        torch.set_float32_matmul_precision("highest")
    for one, other in zip(*values, strict=True):  # sums of atomics differ in the last bits
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


@pytest.mark.parametrize(
    "line", ["", "--amp bf16", "--amp fp16", "--channels-last", "-j 2 --amp bf16"]
)
def test_networks_learn(tmp_path, line):
    figures = train(f"--gpu 0 --epochs 4 {line}", tmp_path / "run")
    assert figures["test_top1"] > 85
    assert figures["device"].startswith("cuda") and figures["peak_memory_mb"] > 0


def test_a_run_is_continued(tmp_path):
    whole = train("--gpu 0 --epochs 2", tmp_path / "whole")
    train("--gpu 0 --max-steps 12", tmp_path / "half")
    half = tmp_path / "half" / "checkpoint.pth.tar"
    main.main(["--resume", str(half), "--epochs", "2", "--gpu", "0"])
    assert len(read_log(tmp_path / "half" / "test.log")["epoch"]) == 2
    assert whole["epochs"] == 2


def test_all_visible_gpus_are_used(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    assert train("", tmp_path / "run")["processes"] == torch.cuda.device_count()


JOINT = ["--mode 5", "--mode 5 --root newton", "--mode 5 --root resolvent --num-groups 64"]
FREEZE = "--freeze True --freeze-iter 1 --norm-type layernorm"  # a cycle has 10 steps
MIXED = "--mixup .2 --cutmix 1 --label-smoothing .1 --amp fp16"
KINDS = ["--mode 1", "--mode 3", *JOINT, "--amp fp16", FREEZE, f"{FREEZE} --amp fp16", MIXED]


@pytest.mark.parametrize("line", ["--deconv False", *KINDS])
def test_replayed_steps_learn_what_launched_ones_do(tmp_path, line):
    line = f"--gpu 0 --max-steps 14 --lr .001 {line}"
    plain, replayed = (
        train(f"{line} --cuda-graphs {graphs}", tmp_path / graphs) for graphs in ("False", "True")
    )
    for figure in ("train_loss", "test_loss"):  # sums that threads add in any order, 14 steps long
        assert replayed[figure] == pytest.approx(plain[figure], rel=5e-3)


def test_replayed_steps_on_all_gpus_learn_what_launched_ones_do(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    line = "--sync-stats False --max-steps 14 --lr .001"
    plain, replayed = (
        train(f"{line} --cuda-graphs {graphs}", tmp_path / graphs) for graphs in ("False", "True")
    )
    assert replayed["test_loss"] == pytest.approx(plain["test_loss"], rel=5e-3)


def make_parts(name="SGD", **options):
    """Return a small network with its training on six batches, and the accelerator."""
    torch.manual_seed(0)
    accelerator = Accelerator(GPU, **options)
    layers = FastDeconv(3, 8, 3, sync_stats=False), nn.BatchNorm2d(8), nn.ReLU()
    model = accelerator.to_device(nn.Sequential(*layers, nn.Flatten(), nn.Linear(800, 2)))
    images = [torch.randn(16, 3, 12, 12).pin_memory() for _ in range(6)]
    targets = (torch.arange(16) % 2).pin_memory()
    optimizer = build_optimizer(name, model.parameters(), lr=0.01, fused=True)
    scheduler = build_scheduler("cosine", optimizer, total_steps=12, epoch_steps=6)
    batches = [(batch, targets) for batch in images]
    return model, (batches, build_criterion("CE", 2), optimizer, scheduler), accelerator


@pytest.mark.parametrize("name", ["SGD", "Adam", "AMSGrad", "AdamW"])
@pytest.mark.parametrize("options", [{}, {"cuda_graphs": True}, {"amp": "fp16", "clip_grad": 1.0}])
def test_no_step_waits_for_the_gpu(name, options):
    model, args, accelerator = make_parts(name, **options)
    network = accelerator.compile_for_training(model, (16, 3, 12, 12), HOOKS)
    average = ExponentialAverage(model, 0.5)
    step = {"accelerator": accelerator, "batch_context": HOOKS.batch_context}
    train_one_epoch(network, *args, **step)  # layers move their constants once
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_one_epoch(network, *args, **step, on_update=lambda: average.update_parameters(model))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("name", ["SGD", "Adam", "AMSGrad", "AdamW", "Muon"])
def test_a_bad_batch_changes_no_parameter(name, graphs):
    model, (batches, *args), accelerator = make_parts(name, cuda_graphs=graphs)
    network = accelerator.compile_for_training(model, (16, 3, 12, 12), HOOKS)
    batches[3][0][5] = torch.nan
    seen = []
    with pytest.raises(TrainingDiverged, match="batch 4: the loss is nan") as caught:
        train_one_epoch(
            network,
            batches,
            *args,
            accelerator=accelerator,
            on_update=lambda: seen.append([p.tolist() for p in model.parameters()]),
            batch_context=HOOKS.batch_context,
        )
    assert [p.tolist() for p in model.parameters()] == seen[2]
    found = find_nonfinite(model, accelerator, caught.value.images, caught.value.parameters)
    assert found == "the output of 0 (FastDeconv)"


def test_replayed_steps_below_ddp_learn_what_launched_ones_do():
    """A world of one GPU, whose messages go to itself."""
    world = {"store": distributed.HashStore(), "rank": 0, "world_size": 1, "device_id": GPU}
    distributed.init_process_group("cpu:gloo,cuda:nccl", **world)
    states = []
    for graphs, is_replicated in ((False, False), (True, True)):
        model, args, accelerator = make_parts(cuda_graphs=graphs)
        network = accelerator.compile_for_training(model, (16, 3, 12, 12), HOOKS)
        network = DistributedDataParallel(network) if is_replicated else network
        context = HOOKS.batch_context
        train_one_epoch(network, *args, accelerator=accelerator, batch_context=context)
        states.append(model.state_dict())
    distributed.destroy_process_group()
    torch.testing.assert_close(*states, rtol=1e-3, atol=1e-5)


def test_a_compiled_network_learns(tmp_path):
    """The last one, as compiling takes minutes."""
    assert train("--gpu 0 --epochs 4 --compile", tmp_path / "run")["test_top1"] > 85
