"""The programs of docs/habits.md as they stand there: one by torchrun on two ranks, the others on four as it starts them."""

import importlib.util
import os
import pathlib
import re
import runpy

import pytest
from jobs import ENVIRONMENT, SAME_PATH, TORCHRUN, run_job
from ranks import preload, run_as_torchrun

preload("transformers.trainer", "peft", "trl.trainer.sft_trainer", "lightning", "torchtitan.models.common.moe", "megatron.core.transformer.moe.moe_layer")
PAGE = (pathlib.Path(__file__).parents[3] / "docs/habits.md").read_text()
PROGRAMS = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.DOTALL))
NEEDED = {
    "torchtitan_moe.py": ("torchtitan", "pip install torchtitan==0.3.0"),
    "lightning_loop.py": ("lightning", "pip install lightning==2.6.6"),
    "megatron_moe.py": ("megatron", "pip install megatron-core==0.16.1"),
    "trl_sft.py": ("trl", "pip install trl==1.16.0"),
}


def run(rank, size, folder, name):
    os.chdir(folder)
    runpy.run_path(name, run_name="__main__")


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name, tmp_path):
    module, command = NEEDED.get(name, (None, None))
    if module and importlib.util.find_spec(module) is None:
        pytest.skip(f"no {module}: {command}")
    assert PROGRAMS[name].count("\n") < 40
    (tmp_path / name).write_text(PROGRAMS[name])
    if name == "trainer.py":
        run_job(*TORCHRUN, name, cwd=tmp_path, environment=ENVIRONMENT | SAME_PATH)
    else:
        run_as_torchrun(2 if "devices=2" in PROGRAMS[name] else 4, run, tmp_path, name)


def test_there_are_programs():
    assert {"trainer.py", "lora.py", "fsdp2.py", "replay.py", "torchtitan_moe.py"} <= PROGRAMS.keys()
