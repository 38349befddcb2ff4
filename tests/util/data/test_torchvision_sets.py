"""Every published data set is read from tiny files in its exact format on disk."""

import gzip
import multiprocessing
import os
import pickle
import re
import shutil
import struct
import tarfile
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import OpenerDirector

import numpy as np
import pytest
import torch
from scipy.io import savemat
from torchvision import datasets
from torchvision.datasets.utils import calculate_md5

from tests.pairwise import loop_over
from util.data import archives, download
from util.data.archives import list_archives
from util.data.datasets import DATASETS, build_loaders
from util.data.loader import LoaderOptions
from util.data.torchvision_sets import find_folder
from util.errors import DataError

rng = np.random.default_rng(0)
fork = multiprocessing.get_context("fork")
IDX_NAMES = {"train": "train", "test": "t10k"}


def pixels(*shape):
    return rng.integers(0, 256, shape, np.uint8)


def without_checksums(monkeypatch, kind):
    """The tiny files cannot have the checksums of the real ones."""
    for attribute in ("train_list", "test_list"):
        files = [[name, None] for name, _ in getattr(kind, attribute)]
        monkeypatch.setattr(kind, attribute, files)


def write_pickle(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=2))


def write_cifar10(root, monkeypatch):
    without_checksums(monkeypatch, datasets.CIFAR10)
    monkeypatch.setattr(datasets.CIFAR10, "meta", {**datasets.CIFAR10.meta, "md5": None})
    folder = root / "cifar-10-batches-py"
    parts = {name: (pixels(2, 3, 32, 32), [i, 9 - i]) for i, name in enumerate(cifar10_files())}
    for name, (images, labels) in parts.items():
        write_pickle(folder / name, {"data": images.reshape(2, 3072), "labels": labels})
    write_pickle(folder / "batches.meta", {"label_names": [f"class {i}" for i in range(10)]})
    *train, test = parts.values()
    images, labels = zip(*train, strict=True)
    return (np.concatenate(images), np.concatenate(labels).tolist()), test


def cifar10_files():
    return [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def write_cifar100(root, monkeypatch):
    without_checksums(monkeypatch, datasets.CIFAR100)
    monkeypatch.setattr(datasets.CIFAR100, "meta", {**datasets.CIFAR100.meta, "md5": None})
    folder = root / "cifar-100-python"
    parts = {"train": (pixels(4, 3, 32, 32), [0, 99, 5, 7]), "test": (pixels(1, 3, 32, 32), [42])}
    for name, (images, labels) in parts.items():
        entry = {"data": images.reshape(-1, 3072), "fine_labels": labels, "coarse_labels": labels}
        write_pickle(folder / name, entry)
    write_pickle(folder / "meta", {"fine_label_names": [f"class {i}" for i in range(100)]})
    return parts["train"], parts["test"]


def write_idx(root, folder, damage=0):
    """Magic number, sizes (big endian), bytes; `damage` bytes are missing at the end."""
    (root / folder / "raw").mkdir(parents=True)
    parts = {"train": (pixels(5, 28, 28), [0, 9, 1, 8, 3]), "test": (pixels(2, 28, 28), [4, 5])}
    for split, (images, labels) in parts.items():
        start = root / folder / "raw" / IDX_NAMES[split]
        content = struct.pack(">iiii", 2051, *images.shape) + images.tobytes()
        start.with_name(f"{start.name}-images-idx3-ubyte").write_bytes(
            content[: len(content) - damage]
        )
        content = struct.pack(">ii", 2049, len(labels)) + bytes(labels)
        start.with_name(f"{start.name}-labels-idx1-ubyte").write_bytes(content)
    padded = {s: (np.pad(x, ((0, 0), (2, 2), (2, 2)))[:, None], y) for s, (x, y) in parts.items()}
    return padded["train"], padded["test"]


def write_svhn(root, monkeypatch):
    split_list = {s: [u, n, None] for s, (u, n, _) in datasets.SVHN.split_list.items()}
    monkeypatch.setattr(datasets.SVHN, "split_list", split_list)
    parts = {"train": (pixels(3, 3, 32, 32), [10, 1, 9]), "test": (pixels(2, 3, 32, 32), [10, 2])}
    for split, (images, labels) in parts.items():
        matlab = {"X": images.transpose(2, 3, 1, 0), "y": np.array(labels, np.uint8)[:, None]}
        savemat(root / f"{split}_32x32.mat", matlab)
    return tuple((images, [label % 10 for label in labels]) for images, labels in parts.values())


def write_stl10(root, monkeypatch):
    without_checksums(monkeypatch, datasets.STL10)
    (root / "stl10_binary").mkdir()
    parts = {"train": (pixels(3, 3, 96, 96), [0, 9, 4]), "test": (pixels(2, 3, 96, 96), [1, 2])}
    for split, (images, labels) in parts.items():
        column_major = images.transpose(0, 1, 3, 2)
        (root / "stl10_binary" / f"{split}_X.bin").write_bytes(column_major.tobytes())
        (root / "stl10_binary" / f"{split}_y.bin").write_bytes(bytes(i + 1 for i in labels))
    (root / "stl10_binary" / "unlabeled_X.bin").touch()
    return parts["train"], parts["test"]


WRITERS = {
    "cifar10": write_cifar10,
    "cifar100": write_cifar100,
    "mnist": lambda root, _: write_idx(root, "MNIST"),
    "fashion": lambda root, _: write_idx(root, "FashionMNIST"),
    "svhn": write_svhn,
    "stl10": write_stl10,
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(opener, request, **options):
        if request.type != "file":
            raise URLError("no network in tests")
        return whole_open(opener, request, **options)

    whole_open = OpenerDirector.open
    monkeypatch.setattr(OpenerDirector, "open", refuse)
    monkeypatch.setattr(download, "MAX_ATTEMPTS", 1)


def build(name, root, image_size=32, mirror=None):
    options = LoaderOptions(batch_size=50, image_size=image_size)
    return build_loaders(name, root, options, cache_dir=root / "run", mirror=mirror)


@loop_over("name", WRITERS)
def test_pixels_and_targets_are_those_on_disk(tmp_path, monkeypatch, name):
    written = WRITERS[name](tmp_path, monkeypatch)
    spec, *loaders = build(name, tmp_path, image_size=96 if name == "stl10" else 32)
    for loader, (images, labels) in zip(loaders, written, strict=True):
        source, targets = loader.dataset.split
        assert np.array_equal(source.images.numpy(), images)
        assert targets.tolist() == labels and targets.dtype == torch.int64
    assert spec.num_classes == (100 if name == "cifar100" else 10)
    assert spec.in_channels == images.shape[1] == len(spec.mean) == len(spec.std)


def test_batches_have_the_size_asked_for(tmp_path, monkeypatch):
    for name in WRITERS:
        WRITERS[name](tmp_path, monkeypatch)
        for image_size in (32, 40):
            spec, *loaders = build(name, tmp_path, image_size=image_size)
            for loader in loaders:
                ((images, targets),) = loader
                assert images.shape == (len(targets), spec.in_channels, image_size, image_size)
                assert images.dtype == torch.float32 and targets.dtype == torch.int64
            assert spec.image_size == image_size


def files_of(name):
    """The files that are read, and the published addresses."""
    archives = list_archives(DATASETS[name].dataset)
    files = [path for archive in archives for path in archive.files]
    return files, [url for archive in archives for url in archive.addresses(None)]


def test_a_failed_download_says_what_was_tried_and_where_files_go(tmp_path):
    for name in WRITERS:
        with pytest.raises(DataError) as caught:
            build(name, tmp_path)
        message, (files, urls) = str(caught.value), files_of(name)
        folder = str(find_folder(DATASETS[name].dataset, tmp_path))
        for part in (name, urls[0], "no network in tests", folder, *(file.name for file in files)):
            assert part in message
        assert "damaged" not in message and "--data-url" in message
        assert caught.value.__suppress_context__


def test_files_put_where_the_message_says_are_found(tmp_path, monkeypatch):
    for name in WRITERS:
        WRITERS[name](tmp_path, monkeypatch)
        assert all((tmp_path / file).is_file() for file in files_of(name)[0])


def test_addresses_are_by_https_where_one_is_published():
    insecure = {"fashion", "svhn", "stl10"}  # only their checksums prove the content
    for name in WRITERS:
        schemes = {url.partition(":")[0] for url in files_of(name)[1]}
        assert schemes == {"http" if name in insecure else "https"}, name


def test_a_download_is_tried_only_for_what_is_missing(tmp_path, monkeypatch):
    write_cifar10(tmp_path, monkeypatch)
    build("cifar10", tmp_path)  # would be refused by no_network
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(DataError, match="missing or incomplete"):
        build("cifar10", tmp_path)


def test_places_for_files_are_named_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=re.escape(f" into {tmp_path}/data/cifar-10-batches-py,")):
        build("cifar10", Path("data"))


def test_a_torn_idx_file_is_named(tmp_path):
    write_idx(tmp_path, "MNIST", damage=100)
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    with pytest.raises(DataError, match=f"damaged: {path} has 3,836 bytes, another number"):
        build("mnist", tmp_path)


def test_what_no_checksum_tells_is_named_by_its_folder(tmp_path, monkeypatch):
    write_cifar10(tmp_path, monkeypatch)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match="cifar10: damaged files in .*cifar-10-batches-py \\("):
        build("cifar10", tmp_path)


def test_a_damaged_file_or_archive_is_named(tmp_path):
    """One of another checksum than the published one."""
    for name in ["cifar10", "cifar100", "svhn", "stl10"]:
        archives = list_archives(DATASETS[name].dataset)
        places = {archives[0].path, list(archives[0].files)[-1]}
        for path in places:
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).write_bytes(b"some")
        with pytest.raises(DataError) as caught:
            build(name, tmp_path)
        for path in places:
            line = f"damaged: {tmp_path / path} has another checksum than the published one, and 4"
            assert str(caught.value).count(line) == 1
        assert str(caught.value).count("damaged: ") == len(places)


@pytest.mark.parametrize("label", [10, 255])
def test_a_label_that_no_class_has_is_named(tmp_path, label):
    write_idx(tmp_path, "MNIST")
    path = tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    content = bytearray(path.read_bytes())
    content[8 + 2] = label
    path.write_bytes(content)
    with pytest.raises(
        DataError, match=f"mnist, train, .*image 2 has the label {label}, of 0 to 9"
    ):
        build("mnist", tmp_path)


def test_labels_that_are_too_few_are_named(tmp_path):
    write_idx(tmp_path, "MNIST")
    path = tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    content = path.read_bytes()
    path.write_bytes(content[:7] + bytes([content[7] - 1]) + content[8:-1])
    with pytest.raises(DataError, match="mnist, test, .* images and .* labels"):
        build("mnist", tmp_path)


class Malicious:
    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def test_code_in_the_files_of_cifar_does_not_run(tmp_path):
    """They are pickles: torchvision compares their checksums first."""
    folder, trace = tmp_path / "cifar-10-batches-py", tmp_path / "trace"
    folder.mkdir()
    for path in files_of("cifar10")[0]:
        (tmp_path / path).write_bytes(pickle.dumps(Malicious(trace)))
    with pytest.raises(DataError, match="cifar10 is missing or incomplete"):
        build("cifar10", tmp_path)
    assert not trace.exists()


def test_an_archive_of_another_checksum_is_not_unpacked(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    for name in ("cifar10", "stl10"):
        (published,) = list_archives(DATASETS[name].dataset)
        with tarfile.open(root / published.path, "w:gz") as archive:
            archive.addfile(tarfile.TarInfo("../outside"))
        with pytest.raises(DataError, match=f"{name} is missing or incomplete"):
            build(name, root)
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


def pack_cifar10(mirror, monkeypatch):
    """Tiny files in an archive of the published name; returns what they hold."""
    written = write_cifar10(mirror, monkeypatch)
    archive = mirror / datasets.CIFAR10.filename
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(mirror / "cifar-10-batches-py", "cifar-10-batches-py")
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", calculate_md5(archive))
    return written


def pack_mnist(mirror, monkeypatch):
    written = write_idx(mirror, "MNIST")
    resources = []
    for name, _ in datasets.MNIST.resources:
        archive = mirror / name
        archive.write_bytes(
            gzip.compress((mirror / "MNIST" / "raw" / name.removesuffix(".gz")).read_bytes())
        )
        resources.append((name, calculate_md5(archive)))
    monkeypatch.setattr(datasets.MNIST, "resources", resources)
    return written


@pytest.fixture
def mirror(tmp_path):
    (tmp_path / "mirror").mkdir()
    return tmp_path / "mirror"


@pytest.mark.parametrize(("name", "pack"), [("cifar10", pack_cifar10), ("mnist", pack_mnist)])
def test_a_mirror_stands_in_for_the_published_address(tmp_path, monkeypatch, mirror, name, pack):
    written = pack(mirror, monkeypatch)
    loaders = build(name, tmp_path / "root", mirror=mirror.as_uri())[1:]
    for loader, (images, labels) in zip(loaders, written, strict=True):
        assert np.array_equal(loader.dataset.split.source.images.numpy(), images)
        assert loader.dataset.split.targets.tolist() == labels
    shutil.rmtree(mirror)
    build(name, tmp_path / "root", mirror=mirror.as_uri())  # nothing is asked for again


def test_what_a_killed_process_had_unpacked_in_part_is_unpacked_again(
    tmp_path, monkeypatch, mirror
):
    pack_mnist(mirror, monkeypatch)
    root = tmp_path / "root"
    build("mnist", root, mirror=mirror.as_uri())
    shutil.rmtree(mirror)
    torn = root / "MNIST" / "raw" / "train-images-idx3-ubyte"
    whole = torn.read_bytes()
    torn.write_bytes(whole[:-5])
    build("mnist", root)
    assert torn.read_bytes() == whole


def test_a_mirror_with_another_file_is_refused_and_leaves_nothing(tmp_path, monkeypatch, mirror):
    pack_cifar10(mirror, monkeypatch)
    (mirror / datasets.CIFAR10.filename).write_bytes(b"another")
    with pytest.raises(DataError, match=f"{mirror.as_uri()}.*another file than expected: 7 bytes"):
        build("cifar10", tmp_path / "root", mirror=mirror.as_uri())
    assert [path.name for path in (tmp_path / "root").iterdir()] == [".CIFAR10.lock"]


def test_of_two_processes_one_downloads_and_one_waits(tmp_path, monkeypatch, mirror):
    pack_cifar10(mirror, monkeypatch)
    fetched, fetch = fork.SimpleQueue(), archives.fetch

    def slow_fetch(*args):
        fetched.put(os.getpid())
        time.sleep(0.5)
        fetch(*args)

    def download_once():
        archives.download(datasets.CIFAR10, tmp_path / "root", mirror.as_uri())

    monkeypatch.setattr(archives, "fetch", slow_fetch)
    both = [fork.Process(target=download_once) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert fetched.get() in {process.pid for process in both} and fetched.empty()
    build("cifar10", tmp_path / "root")
