"""What somebody with a GPU starts once must not rot: its small form runs every stage on a CPU. The
memory table is checked too."""

import os
import subprocess
import sys

import memory
import pytest
from conftest import ROOT


@pytest.mark.slow
def test_the_script_for_gpus_ends_with_a_table_of_every_stage(tmp_path):
    env = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
    command = ["tests/gpu.sh", "--small"]
    result = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1200
    )
    assert result.returncode == 0, result.stdout + result.stderr
    table = result.stdout.split("| what | result |")[1]
    for row in (
        "| machine | device ",
        "| tests | 1 passed",
        "| load demo 4 | batches/s ",
        "| train demo 4 | ",
        "| decode demo 4 | ",
        "| training | step 20, loss 5.545",
    ):
        assert row in table, table
    served = table.splitlines()[-1]
    assert any(words in served for words in ("images/s |", "is not installed", "pip install")), (
        table
    )


def test_what_the_memory_table_counts_grows_by_the_same_with_each_block():
    """So two small models tell what a deep one keeps. The blocks' part grows with the number of
    codes."""
    one, two, three = (memory.kept("demo", 4, n_layer) for n_layer in (1, 2, 3))
    assert 0 < two - one == three - two
    block_of_64_codes = memory.kept("demo", 8, 2) - memory.kept("demo", 8, 1)
    assert block_of_64_codes == pytest.approx(4 * (two - one), rel=0.05)
