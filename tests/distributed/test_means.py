"""Means over ranks that have not added to the same names."""

import json
from pathlib import Path

import pytest
from processes import run_python

SCRIPT = """
import json, sys
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from remax_lightning.modules.means import Means

def work(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    means = Means()
    means.add("both", torch.tensor([1.0, 2.0]) if rank == 0 else torch.tensor([6.0]))
    means.add("first" if rank == 0 else "second", torch.tensor([4.0 + rank]))
    values = {name: float(value) for name, value in means.compute(torch.device("cpu")).items()}
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(values, file)
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(work, args=(sys.argv[1],), nprocs=2)
"""


@pytest.mark.slow
def test_a_rank_may_lack_a_metric(tmp_path: Path) -> None:
    """The others would wait for it forever."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run_python([str(script), str(tmp_path)], seconds=100)
    for rank in range(2):
        means = json.loads((tmp_path / f"{rank}.json").read_text())
        assert means == {"both": 3.0, "first": 4.0, "second": 5.0}
