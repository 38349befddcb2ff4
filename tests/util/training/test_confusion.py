"""Tests of the confusion matrix."""

import csv

import torch
from PIL import Image
from torch.nn import functional as F

from util.training.confusion import ConfusionMatrix, report_classes
from util.training.metrics import count_hits


def test_images_are_counted_by_class_and_prediction_and_the_loss_is_unchanged():
    matrix = ConfusionMatrix(3)
    criterion = matrix.watch(F.cross_entropy)
    logits, targets = torch.randn(40, 3), torch.randint(3, (40,))
    for part in (slice(0, 30), slice(30, 40)):
        loss = criterion(logits[part], targets[part])
        assert torch.equal(loss, F.cross_entropy(logits[part], targets[part]))
    pairs = list(zip(targets.tolist(), logits.argmax(1).tolist(), strict=True))
    expected = [[pairs.count((row, column)) for column in range(3)] for row in range(3)]
    assert matrix.counts.tolist() == expected
    assert matrix.counts.diag().sum() == count_hits(logits, targets)[0]


def test_classes_are_printed_and_the_matrix_is_written(tmp_path, capsys):
    counts = torch.tensor([[3, 1, 0], [0, 0, 0], [2, 0, 0]])
    classes = ("$cat", "cow", "dog, small")
    report_classes(counts, classes, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:-1]] == [
        ["class", "top1", "images"],
        ["$cat", "75.00%", "4"],
        ["dog,", "small", "0.00%", "2"],
    ]
    with open(tmp_path / "confusion_matrix.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["class", *classes] and rows[1] == ["$cat", "3", "1", "0"]
    assert len(rows) == 4
    with Image.open(tmp_path / "confusion_matrix.png") as figure:
        assert len(figure.convert("RGB").getcolors(2**24)) > 3


def test_columns_align_where_names_are_shorter_than_their_heading(tmp_path, capsys):
    report_classes(torch.eye(2, dtype=torch.int64), ("a", "b"), tmp_path)
    heading, *rows, _ = capsys.readouterr().out.splitlines()
    assert {len(row) for row in rows} == {len(heading)}
