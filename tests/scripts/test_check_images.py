import pytest
from PIL import Image

from scripts import check_images


@pytest.fixture
def root(tmp_path):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (8, 8)).save(tmp_path / split / name / f"{number}.png")
    return tmp_path


def verified(root, capsys, *flags):
    """Exit code, and what was said."""
    with pytest.raises(SystemExit) as end:
        check_images.main([str(root), *flags])
    return end.value.code, capsys.readouterr().out.splitlines()


def test_a_whole_data_set_is_counted(root, capsys):
    told = ["12 images in 4 class folders, 0 faults"]
    assert verified(root, capsys) == (0, told)


def test_every_fault_is_a_line_that_names_the_file(root, capsys):
    torn = root / "train" / "cat" / "1.png"
    torn.write_bytes(torn.read_bytes()[:40])
    (root / "val" / "dog" / "0.png").write_text("no image")
    (root / "train" / "owl").mkdir()
    code, (missing, empty, first, second, counts) = verified(root, capsys)
    assert code == 1
    assert missing == f"{root / 'val' / 'owl'}: missing"
    assert empty == f"{root / 'train' / 'owl'}: no images"
    assert str(torn) in first and str(root / "val" / "dog" / "0.png") in second
    assert counts == "12 images in 5 class folders, 4 faults"


def test_files_that_a_run_would_not_use_are_counted(root, capsys):
    (root / "train" / "cat" / "a.txt").touch()
    (root / "val" / "@eaDir").mkdir()
    (root / "val" / "@eaDir" / "0.png").touch()
    splits = f"{root / 'train'} and {root / 'val'}"
    told = [f"not used: 1 .txt, 1 hidden, in {splits}", "12 images in 4 class folders, 0 faults"]
    assert verified(root, capsys) == (0, told)


def test_the_limit_of_pixels_is_that_of_a_run(root, capsys):
    code, told = verified(root, capsys, "--max-image-pixels", "63")
    assert (code, len(told)) == (1, 13) and "more than --max-image-pixels 63" in told[0]


def test_a_single_class_is_a_fault(root, capsys):
    for split in ("train", "val"):
        for path in (root / split / "dog").iterdir():
            path.unlink()
        (root / split / "dog").rmdir()
    code, told = verified(root, capsys)
    assert (code, len(told)) == (1, 3)
    assert "1 class folders, at least two are needed" in told[0]


def test_a_folder_without_splits_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        check_images.main([str(tmp_path)])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"check_images.py: error: no folder {tmp_path}/train")
