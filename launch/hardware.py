"""What a measurement says of the machine that it was made on."""

import platform
import subprocess
from pathlib import Path


def processor():
    """As the kernel names it; elsewhere than on Linux what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def gpus():
    """Their names, where there are some: "2 × NVIDIA H100 80GB HBM3"."""
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[:-1]
    except (OSError, subprocess.CalledProcessError):
        return None
    return ", ".join(f"{names.count(name)} × {name}" for name in sorted(set(names)))
