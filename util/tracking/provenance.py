"""TODO: util/tracking/provenance.py."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from util.device import describe_device, read_processor
from util.files import atomic_write

RECORD_NAME = "args.json"
PACKAGES = ("torchvision", "numpy", "scikit-learn", "pillow", "matplotlib", "tensorboardX")


def write_record(
    run_dir: Path, flags: Mapping[str, Any], device: torch.device, processes: int = 1
) -> None:
    """Write RECORD_NAME: all one needs to know to do the run again."""
    record = {
        "flags": dict(flags),
        "versions": {"python": platform.python_version(), **_installed_versions()},
        "commit": _git_commit(),
        "device": describe_device(device),
        "processor": read_processor(),
        "processes": processes,
        "platform": platform.platform(),
    }
    with atomic_write(run_dir / RECORD_NAME) as file:
        file.write(json.dumps(record, indent=2).encode() + b"\n")


def _installed_versions() -> dict[str, str]:
    versions = {"torch": torch.__version__}  # with the build, +cpu or +cu132
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _git_commit() -> str | None:
    """The commit of this checkout; None where the project is not the root of one."""
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    top, commit = answer.splitlines()
    return commit if Path(top).resolve() == root else None
