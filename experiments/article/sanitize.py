"""The article's case of the illegal memory access, through every engine under NVIDIA's compute-sanitizer."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import scaling  # launch/scaling.py: provenance
import torch

from .cases import Case, Unit
from .problem import Problem
from .registry import methods_for

SIZES = (32, 512, 512, 8, 4)
ROUTINGS = ("even", "uneven")
TIMEOUT_SECONDS = 1800
MARK = "anabranch-engine: "


def tool():
    """compute-sanitizer's path, or None."""
    beside = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin/compute-sanitizer"
    return shutil.which("compute-sanitizer") or (str(beside) if beside.exists() else None)


def steps(device, dtype, wanted, factor, sizes=SIZES, peers=False):
    """What runs under the tool: a forward and a backward of every engine, with a line before each."""
    factories = {name: make for name, make in methods_for(device, peers).items() if not wanted or name in wanted}
    case = Case(*sizes, expert_hidden=factor * sizes[2])
    problems = [Problem(Unit(case, dtype, routing), device, seed=1) for routing in ROUTINGS]
    for name, make in factories.items():
        print(f"\n{MARK}{name}", flush=True)
        try:
            for problem in problems:
                make(problem)(problem.x.detach().requires_grad_()).backward(problem.dy)
            if torch.device(device).type == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            print(f"{MARK}{name}: {type(error).__name__}: {error}".splitlines()[0], flush=True)
            if "CUDA error" in str(error):
                return 1
    print(f"\n{MARK}done", flush=True)
    return 0


def findings(log):
    """By engine, from what the tool printed: lines that name an error, and the engine's own exception if any."""
    result, engine = {}, None
    for line in log.splitlines():
        if line.startswith(MARK):
            engine, _, failure = line.removeprefix(MARK).partition(": ")
            result.setdefault(engine, [])
            if failure:
                result[engine].append(failure)
        elif engine and re.match(r"=+ \w", line) and not re.match(r"=+ (ERROR|RACECHECK|LEAK) SUMMARY", line):
            result[engine].append(line.lstrip("= "))
    finished = result.pop("done", None) is not None
    if not finished and engine:
        result[engine].append("the process ended here")
    return result


def run(folder, arguments, which="memcheck"):
    """Runs `which`; what it found takes the place in DIR/sanitizer.json of what the same command found before.
    True when every engine is clean."""
    program = tool()
    if program is None:
        raise FileNotFoundError("compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    command = [program, "--tool", which, "--report-api-errors", "no", "--error-exitcode", "9", sys.executable]
    command += ["-m", "article", *arguments, "--under-sanitizer"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # every tensor in an allocation of its own
    result = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        timeout=TIMEOUT_SECONDS, check=False,
    )  # fmt: skip
    log = folder / f"sanitizer_{which}.log"
    log.write_text(result.stdout)
    found = findings(result.stdout)
    if not found:
        raise RuntimeError(f"compute-sanitizer ran no engine (exit code {result.returncode}); see {log}")
    shown = [Path(word).name if word in (program, sys.executable) else word for word in command]
    about = scaling.provenance(shown)
    record = {
        "tool": which,
        **{name: about[name] for name in ("command", "commit", "changed", "date")},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "exit_code": result.returncode,
        "engines": found,
    }
    path = folder / "sanitizer.json"
    records = json.loads(path.read_text()) if path.exists() else []
    others = [other for other in records if other["command"] != record["command"]]
    path.write_text(json.dumps([*others, record], indent=1) + "\n")
    return result.returncode == 0 and not any(found.values())
