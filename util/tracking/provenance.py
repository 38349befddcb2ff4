"""Provenance of a run: flags, versions, commit and machine, written to args.json."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping
from contextlib import suppress
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
    """Write args.json, which holds all that is needed to repeat the run."""
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
    """Return the versions of the installed packages by name."""
    versions = {"torch": torch.__version__}  # includes the build: +cpu or +cu132
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def _git_commit() -> str | None:
    """Return the commit of this checkout; None if the project is not the root of a repository."""
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    top, commit = output.splitlines()
    return commit if Path(top).resolve() == root else None
