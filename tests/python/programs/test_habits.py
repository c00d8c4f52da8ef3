"""The programs of docs/habits.md, as people start them: two ranks under torchrun, in a folder of their own."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest

PAGE = (pathlib.Path(__file__).parents[3] / "docs/habits.md").read_text()
PROGRAMS = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.DOTALL))
NEEDED = {
    "torchtitan_moe.py": ("torchtitan", "pip install torchtitan==0.3.0"),
    "lightning_loop.py": ("lightning", "pip install lightning==2.6.6"),
    "megatron_moe.py": ("megatron", "pip install megatron-core==0.16.1"),
    "trl_sft.py": ("trl", "pip install trl==1.16.0"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name, tmp_path):
    module, command = NEEDED.get(name, (None, None))
    if module and importlib.util.find_spec(module) is None:
        pytest.skip(f"no {module}: {command}")
    assert PROGRAMS[name].count("\n") < 40
    (tmp_path / name).write_text(PROGRAMS[name])
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", name],
        cwd=tmp_path, capture_output=True, text=True, timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]


def test_there_are_programs():
    assert {"trainer.py", "lora.py", "fsdp2.py", "replay.py", "torchtitan_moe.py"} <= PROGRAMS.keys()
