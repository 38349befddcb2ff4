import json

import torch

from util.tracking.provenance import write_record


def test_the_record_tells_flags_versions_commit_and_device(tmp_path):
    write_record(tmp_path, {"lr": 0.1}, torch.device("cpu"))
    record = json.loads((tmp_path / "args.json").read_text())
    assert record["flags"] == {"lr": 0.1}
    assert record["versions"]["torch"] == torch.__version__
    assert {"python", "torchvision", "numpy"} <= set(record["versions"])
    assert record["commit"] is None or len(record["commit"]) == 40
    assert record["device"].startswith("cpu, ")
