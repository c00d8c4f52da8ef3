"""Engines to compare anabranch's with: importing this adds them to `anabranch.grouped_gemm_engines`.

Built beside the package for its tests and benchmarks, and part of no wheel.
"""

import pathlib

import anabranch  # noqa: F401 (loads the library whose engines these join)
import torch

torch.ops.load_library(str(pathlib.Path(__file__).parent / "libanabranch_baselines.so"))
