"""Diagnosis of deconvolution beside Muon: values by brute force, and a short run."""

import json

import pytest
import torch
from torch import nn

from deconv import FastDeconv
from models import airbench
from scripts.paper import rivals_arms, rivals_diagnosis, rivals_train
from scripts.paper.airbench import QUINTIC, QUINTIC_STEPS
from scripts.paper.records import read_curve
from tests.pairwise import loop_over
from tests.scripts.paper.test_rivals import QUIET
from tests.scripts.paper.test_rivals_layers import correlated_images


def orthogonalize_by_svd(matrix):
    """Apply the quintic polynomial of Muon to singular values."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    a, b, c = QUINTIC
    values = values / values.norm()
    for _ in range(QUINTIC_STEPS):
        values = a * values + b * values**3 + c * values**5
    return left @ torch.diag(values) @ right


def find_cosine(one, other):
    return torch.cosine_similarity(one.flatten(), other.flatten(), 0).item()


@loop_over("kind", ["deconv", "plain"])
def test_values_of_a_layer_equal_brute_force(kind):
    torch.manual_seed(0)
    layer = FastDeconv(4, 3, 3, block=2, layout="contiguous", bias=False)
    layer = (layer if kind == "deconv" else nn.Conv2d(4, 3, 3, bias=False)).double()
    x, grad = correlated_images(300, 4, side=3), torch.randn(300, 3).double()
    grad -= grad.mean(0)  # as behind BatchNorm
    (layer(x).flatten(1) * grad).sum().backward()
    rows = x.flatten(1) - x.flatten(1).mean(0)
    G = grad.mT @ rows
    own = layer if kind == "deconv" else FastDeconv(4, 3, 3)
    block = own.batch_whitening(x)[4]["joint"][0].double()
    D = torch.block_diag(*[block] * (36 // len(block)))
    values, vectors = torch.linalg.eigh(D.mT @ D)
    half = vectors @ torch.diag(values.sqrt()) @ vectors.mT
    cov = rows.mT @ rows / len(rows) + own.eps * torch.eye(36)
    muon, both = orthogonalize_by_svd(G), orthogonalize_by_svd(G @ D.mT) @ D
    updates = {"gradient": G, "half whitened": G @ half, "whitened": G @ D.mT @ D, "both": both}
    expected = {f"cosine: {name}": find_cosine(update, muon) for name, update in updates.items()}
    squares = {"G": G, "G D^T": G @ D.mT, "G D^T D": G @ D.mT @ D, "orth(G)": muon}
    spectra = {name: matrix @ matrix.mT for name, matrix in squares.items()}
    for name, matrix in {**spectra, "C": cov, "D C D^T": D @ cov @ D.mT}.items():
        values = torch.linalg.eigvalsh(matrix)
        expected[f"{name}: condition"] = (values[-1] / values[0]).item()
        expected[f"{name}: evenness"] = (values.mean() ** 2 / (values**2).mean()).item()
    weight = layer.weight.detach().flatten(1)
    kernel, update = (weight @ D, both) if kind == "deconv" else (weight, muon)
    change = (rows @ update.mT).square().sum() / (rows @ kernel.mT).square().sum()
    scale = 0.24 * weight.norm() / len(weight) ** 0.5
    found = rivals_diagnosis.measure_layer(layer, x, 0.24)
    assert found.pop("change") == pytest.approx((scale * change.sqrt()).item(), rel=0.02)  # eps
    assert found == pytest.approx(expected, rel=1e-4)


def test_channels_are_told_apart_by_their_deviation_and_mean():
    x = torch.randn(4, 11, 5, 5)
    x = (x - x.mean((0, 2, 3), True)) / x.std((0, 2, 3), keepdim=True, correction=0)
    scale = torch.arange(1.0, 12)[:, None, None]
    found = rivals_diagnosis.describe_channels(x * scale + 2 * scale)
    assert found == pytest.approx({"decile 1": 2, "decile 5": 6, "decile 9": 10, "mean": 2})


def test_the_arms_take_the_first_steps_of_their_runs(image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(airbench, "WIDTHS", (24, 24, 24))
    file, data = tmp_path / "diagnosis.json", ["--data", str(image_folder)]
    line = f"--steps 1 --measure 1 --batch-size 8 --json {file}"
    rivals_diagnosis.main([*data, *line.split()])
    arms = json.loads(file.read_text())["arms"]
    for arm, found in arms.items():
        layers = found["steps"]["1"]
        assert [*layers] == [f"{group}.{i}" for group in range(3) for i in (0, 4)], arm
        deviations = [row["GELU: decile 5"] for row in layers.values()]
        assert (deviations == pytest.approx([1] * 6, rel=1e-3)) == (arm == "bn-muon"), arm
        line = rivals_arms.make_flags(("airbench", arm), 0.24, 0)
        words = [*line.split(), *rivals_diagnosis.COMMON.split()]
        words += ["--batch-size", "8", "--print-freq", "1", "--dataset", "folder", *data]
        words += ["--max-steps", "2", "--run-dir", str(tmp_path / arm), *QUIET.split()]
        rivals_train.main(words)
        losses = [loss for _, loss in read_curve(tmp_path / arm)]
        assert found["losses"] == pytest.approx(losses, rel=1e-5), arm
    assert "| median of | bn-muon, step 1 | deconv-muon, step 1 |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        rivals_diagnosis.main([*data, "--steps", "1", "--measure", "2"])
    assert "--measure 2 is after the last step, --steps 1" in capsys.readouterr().err
