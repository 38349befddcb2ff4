"""The shell scripts, with stand-ins for the programs that they call."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.distributed import run

import main_imagenet
from util.cli.settings import read_settings

ROOT = Path(__file__).resolve().parents[2]

# Answers for the version asked in $VERSION, makes a .venv of copies of itself, and records calls.
STAND_IN = r"""#!/bin/sh
echo "$@" >>"$CALLS"
case "$1 $2" in
"--version ") echo "Python $VERSION" ;;
"-c "*) [ "$VERSION" != 3.9.1 ] ;;
"-m venv")
    mkdir -p .venv/bin
    cp "$0" .venv/bin/python
    echo "PATH=$PWD/.venv/bin:$PATH" >.venv/bin/activate
    ;;
esac
"""


@pytest.fixture
def make(tmp_path):
    """make(file, VERSION=...) runs make_environment in a copy; returns its end and pip's calls."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "environment.sh", tmp_path / "scripts")
    for name in ("requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python3"
    python.write_text(STAND_IN)
    python.chmod(0o755)

    def call(requirements, **variables):
        calls = tmp_path / "calls"
        calls.write_text("")
        path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls)}
        end = subprocess.run(
            ["bash", "-euc", f"source scripts/environment.sh; make_environment {requirements}"],
            cwd=tmp_path,
            env={"VERSION": "3.12.1", **path, **variables},
            capture_output=True,
            text=True,
        )
        return end, [line for line in calls.read_text().splitlines() if "pip install" in line]

    return call


def test_installs_once_and_again_only_when_requirements_change(make, tmp_path):
    end, installs = make("requirements.txt")
    assert end.returncode == 0, end.stderr
    assert len(installs) == 1 and installs[0].endswith("-r requirements.txt")
    assert make("requirements.txt")[1] == []
    assert len(make("requirements-dev.txt")[1]) == 1
    assert make("requirements-dev.txt")[1] == []
    with open(tmp_path / "requirements.txt", "a") as file:
        file.write("another\n")
    assert len(make("requirements-dev.txt")[1]) == 1


def test_the_quick_start_passes_its_arguments_on(make, tmp_path):
    make("requirements.txt")  # makes .venv
    shutil.copy(ROOT / "scripts" / "quickstart.sh", tmp_path / "scripts")
    calls = tmp_path / "calls"
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls)}
    command = ["bash", tmp_path / "scripts" / "quickstart.sh", "--arch", "two words"]
    subprocess.run(command, env={"VERSION": "3.12.1", **env}, check=True)
    assert calls.read_text().splitlines()[-1] == "scripts/quickstart.py --arch two words"


def test_slurm_starts_torchrun_with_a_command_that_the_script_accepts(tmp_path):
    """With many machines, more than a pipe holds."""
    answers = {"scontrol": "seq -f machine%g 20000", "srun": 'printf "%s\\n" "$@"'}
    for name, answer in answers.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{answer}\n")
        (tmp_path / name).chmod(0o755)
    job = {"JOB_ID": "7", "JOB_NODELIST": "many", "JOB_NUM_NODES": "20000", "CPUS_PER_TASK": "64"}
    env = os.environ | {f"SLURM_{name}": value for name, value in job.items()}
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    line = "/data/imagenet -a resnet18d --deconv True -j 32"
    command = ["bash", ROOT / "scripts" / "slurm.sh", *line.split()]
    end = subprocess.run(command, env=env, capture_output=True, text=True)
    assert end.returncode == 0, end.stderr
    cpus, torchrun, *words = end.stdout.splitlines()
    assert (cpus, torchrun) == ("--cpus-per-task=64", "torchrun")
    started = run.parse_args(words)
    assert (started.nnodes, started.rdzv_endpoint) == ("20000", "machine1:29500")
    assert started.training_script == "main_imagenet.py"
    flags, saved = read_settings(main_imagenet.build_script(), started.training_script_args)
    assert (flags.data, flags.run_dir, saved) == ("/data/imagenet", "runs/slurm-7", None)


def run_one_epoch(tmp_path, *words, code=0):
    """Run the recipe with a python that fails with `code`; return its end and python's calls."""
    calls = tmp_path / "calls"
    calls.write_text("")
    (tmp_path / "python").write_text(f'#!/bin/sh\necho "$@" >>"$CALLS"\nexit {code}\n')
    (tmp_path / "python").chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls)}
    command = ["bash", ROOT / "scripts" / "recipes" / "one_epoch_vgg11.sh", *words]
    end = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    return end, calls.read_text().splitlines()


def test_one_epoch_reads_a_folder_or_downloads(tmp_path):
    for part in ("train", "test"):
        (tmp_path / "my images" / part).mkdir(parents=True)
    end, calls = run_one_epoch(tmp_path, "my images", str(tmp_path / "out"))
    assert end.returncode == 0, end.stderr
    images = f"--dataset folder --data {tmp_path / 'my images'}"
    assert len(calls) == 21 and all(line.endswith(images) for line in calls[:20])
    assert calls[20].startswith("scripts/compare.py")
    end, calls = run_one_epoch(tmp_path, "", str(tmp_path / "out"))
    assert end.returncode == 0 and all(line.endswith("--dataset cifar10") for line in calls[:20])
    (tmp_path / "my images" / "test").rmdir()
    end, calls = run_one_epoch(tmp_path, "my images")
    assert (end.returncode, calls) == (2, [])
    error, usage = end.stderr.splitlines()
    assert error == "one_epoch_vgg11.sh: error: there is no folder my images/test"
    assert usage.startswith("usage: one_epoch_vgg11.sh [DIR [OUT]] ")


def test_one_epoch_stops_at_bad_input_and_goes_on_after_divergence(tmp_path):
    end, calls = run_one_epoch(tmp_path, "", str(tmp_path / "out"), code=2)
    assert end.returncode != 0 and len(calls) <= 2
    end, calls = run_one_epoch(tmp_path, "", str(tmp_path / "out"), code=1)
    assert end.returncode != 0 and len(calls) == 20


def test_an_old_python_is_refused_clearly(make, tmp_path):
    end, installs = make("requirements.txt", VERSION="3.9.1")
    assert end.returncode == 1 and not installs
    assert end.stderr.startswith("Python 3.10 or newer is needed")
    assert "3.9.1" in end.stderr
    assert not (tmp_path / ".venv").exists()


def test_another_python_than_that_of_the_environment_is_refused(make, tmp_path):
    make("requirements.txt")
    assert make("requirements.txt", PYTHON="python3")[0].returncode == 0
    other = tmp_path / "other"
    other.write_text("#!/bin/sh\necho Python 3.13.5\n")
    other.chmod(0o755)
    end, _ = make("requirements.txt", PYTHON=str(other))
    assert end.returncode == 1
    assert "3.13.5" in end.stderr and "remove .venv" in end.stderr
