"""Two real processes over gloo, one position: what one process reads, before and after a resume."""

import json

import pytest
from data.helpers import ROWS, fit
from processes import run_python

from remax_lightning.data import PromptDataModule

pytestmark = pytest.mark.slow

SECONDS = 120
SCRIPT = """
import json, os, sys
from data.helpers import fit
from remax_lightning.data import PromptDataModule
arguments, folder, options = json.loads(sys.argv[1])
data = PromptDataModule(batch_size=2, **arguments)
seen = fit(data, folder, strategy="ddp", devices=2, **options).seen
open(os.path.join(folder, "rank" + os.environ.get("LOCAL_RANK", "0") + ".json"), "w").write(json.dumps(seen))
"""


def fit_with_two_processes(arguments, folder, **options):
    """What each process saw; the processes have a hard time limit."""
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(SCRIPT)
    run_python([str(script), json.dumps([arguments, str(folder), options])], SECONDS)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.timeout(2 * SECONDS)
@pytest.mark.filterwarnings("ignore:.*dropped")
def test_stream_of_two_processes_goes_on_in_one(write, tmp_path):
    arguments = {"train": write([{"prompt": ""}, *ROWS]), "streaming": True, "shuffle_window": 7, "seed": 2}
    whole = fit(PromptDataModule(batch_size=4, **arguments), tmp_path / "whole", steps=9).seen
    first, second = fit_with_two_processes(arguments, tmp_path / "two", steps=7)
    assert [[row for pair in zip(*step, strict=True) for row in pair] for step in zip(first, second, strict=True)] == (
        whole[:7]
    )
    data = PromptDataModule(batch_size=4, **arguments)
    assert fit(data, tmp_path / "one", steps=9, ckpt_path=tmp_path / "two" / "step=7.ckpt").seen == whole[7:]
