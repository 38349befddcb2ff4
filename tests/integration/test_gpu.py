"""What only a GPU can show; skipped without one."""

import json

import pytest
import torch

import main
from deconv import FastDeconv
from deconv.ops.inverse_sqrt import ROOTS
from util.tracking.logger import read_log

pytestmark = pytest.mark.gpu
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


def test_a_compiled_network_learns(tmp_path):
    """The last one, as compiling takes minutes."""
    assert train("--gpu 0 --epochs 4 --compile", tmp_path / "run")["test_top1"] > 85
