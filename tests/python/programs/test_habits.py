"""The programs of docs/habits.md, as people start them: two ranks under torchrun, in a folder of their own."""

import importlib.util
import pathlib
import re

import pytest
from jobs import ENVIRONMENT, SAME_PATH, TORCHRUN, run_job

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
    run_job(*TORCHRUN, name, cwd=tmp_path, environment=ENVIRONMENT | SAME_PATH)


def test_there_are_programs():
    assert {"trainer.py", "lora.py", "fsdp2.py", "replay.py", "torchtitan_moe.py"} <= PROGRAMS.keys()
