import struct

import numpy as np
import pytest

from scripts.dev import make_fashion_mini


def write_idx(folder, stem, labels):
    """Images (N, 28, 28) whose pixels count the images, and their labels."""
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None].repeat(28, 1).repeat(28, 2)
    content = struct.pack(">iiii", 2051, *images.shape) + images.tobytes()
    (folder / f"{stem}-images-idx3-ubyte").write_bytes(content)
    content = struct.pack(">ii", 2049, len(labels)) + bytes(labels)
    (folder / f"{stem}-labels-idx1-ubyte").write_bytes(content)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(make_fashion_mini, "PARTS", {"train": ("train", 2), "test": ("t10k", 1)})
    write_idx(tmp_path, "train", [*range(10), 9, 9, *range(10)])
    write_idx(tmp_path, "t10k", [*reversed(range(10)), 3])
    return tmp_path


def test_the_first_images_of_each_class_are_kept_in_order(folder, capsys):
    out = folder / "mini.npz"
    for _ in range(2):
        make_fashion_mini.main([str(folder), "--out", str(out)])
        content = out.read_bytes()
    assert capsys.readouterr().out.count("20 train, 10 test images") == 2
    assert out.read_bytes() == content
    with np.load(out, allow_pickle=False) as arrays:
        train = [*range(11), *range(12, 21)]  # the second of class 9 is image 10
        assert arrays["train_images"][:, 5, 5].tolist() == train
        assert arrays["train_labels"].tolist() == [*range(10), 9, *range(9)]
        assert arrays["test_labels"].tolist() == [*reversed(range(10))]


def test_a_class_with_too_few_images_is_refused(folder, capsys):
    write_idx(folder, "t10k", [0, 1])
    with pytest.raises(SystemExit, match="2"):
        make_fashion_mini.main([str(folder), "--out", str(folder / "mini.npz")])
    assert "class 2 has 0 images, fewer than 1" in capsys.readouterr().err
    assert not (folder / "mini.npz").exists()
