"""What a cluster can do, and what a model asks of it."""

import dataclasses
import json
import math
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Link:
    """One direction of a GPU's connection within its node, or of a network adapter."""

    bandwidth: float  # bytes/s
    latency: float  # s, from the end of sending to arrival
    message: float = 0.0  # s, that the port is busy with a message besides its bytes


@dataclasses.dataclass(frozen=True)
class Machine:
    """Nodes of equal GPUs. Rates are those reached, not those on the data sheet."""

    name: str
    gpus_per_node: int
    flops: float  # FLOP/s of a GPU in the experts' GEMMs
    copy: float  # bytes/s of a GPU reading plus writing its memory
    memory: float  # bytes of a GPU
    node: Link  # of a GPU
    network: Link  # of an adapter
    gpus_per_nic: int = 1
    stage: float = 0.0  # s, fixed cost of a stage
    expert: float = 0.0  # s, fixed cost of a local expert that has rows in a stage
    weights: float = 0.0  # bytes/s of experts' weights in products, and of their gradients; 0: `copy`
    cores_per_node: float = 0.0  # that its ranks take turns at, where ranks compute on CPUs; 0: a GPU each
    source: str = ""  # where the numbers are from

    @property
    def weight_rate(self):
        return self.weights or self.copy


@dataclasses.dataclass(frozen=True)
class Model:
    """A transformer whose feed-forward layers are MoE layers, in mixed precision unless said otherwise."""

    layers: int
    hidden: int
    expert_hidden: int
    experts: int
    top_k: int
    tokens: int  # of a GPU, in a step
    glu: bool = True
    bytes: int = 2  # of an element of activations and of the parameters that compute
    dispatch_bytes: float = 0.0  # of an element on its way to the experts; 0: `bytes`
    dense_parameters_per_layer: int = -1  # attention and the like, replicated; -1: 4 hidden²
    sequence: int = 0  # tokens of a sequence, each attending to those before it; 0: no attention scores
    attention_hidden: int = 0  # heads × size of one, the mean of keys' and values'; 0: hidden
    key_hidden: int = 0  # of keys, where several heads share them; 0: attention_hidden
    vocabulary: int = 0  # of the layers at both ends, replicated; 0: none
    routed: bool = True  # has a gate; False: the routing is handed in
    recompute: bool = False  # backward runs each layer's forward again, exchanges and all
    optimizer_bytes: int = 12  # of a parameter: fp32 copy and Adam's two moments; 14 with gradients in fp32

    @property
    def projections(self):
        """Matrices [hidden, expert_hidden] of an expert."""
        return 3 if self.glu else 2

    @property
    def dense_parameters(self):
        given = self.dense_parameters_per_layer
        return given if given >= 0 else 4 * self.hidden**2

    @property
    def dense_flops(self):
        """Of a token in a layer, forward: projections, gate, and attention to half the sequence."""
        attention = 2.0 * self.sequence * self.attention_width
        return 2.0 * (self.dense_parameters + self.hidden * self.experts) + attention

    @property
    def attention_width(self):
        return self.attention_hidden or self.hidden

    @property
    def key_width(self):
        return self.key_hidden or self.attention_width

    @property
    def replicated_parameters(self):
        """Of the whole model, on every GPU."""
        return self.layers * self.dense_parameters + 2 * self.vocabulary * self.hidden

    @property
    def expert_parameters(self):
        """Of one expert."""
        return self.projections * self.hidden * self.expert_hidden

    def expert_flops(self, assignments):
        """Forward; backward is twice that."""
        return 2.0 * self.projections * self.hidden * self.expert_hidden * assignments


class Refused(ValueError):
    """A description that cannot be; the message says why."""


def _make(kind, values, where):
    known = {field.name for field in dataclasses.fields(kind)}
    unknown = set(values) - known
    missing = {
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.name not in values
    }
    if unknown or missing:
        problem = [f"unknown {', '.join(sorted(unknown))}"] if unknown else []
        problem += [f"missing {', '.join(sorted(missing))}"] if missing else []
        raise Refused(f"{where}: {'; '.join(problem)}")
    for name, value in values.items():
        least = -1 if name == "dense_parameters_per_layer" else 0
        if isinstance(value, (int, float)) and (value < least or not math.isfinite(value)):
            raise Refused(f"{where}: {name} is {value}, expected a finite number of at least {least}")
    return kind(**values)


def _read(path):
    try:
        values = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise Refused(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise Refused(f"{path}: expected a JSON object")
    return values


def machine_from(values, where):
    values = dict(values)
    for name in ("node", "network"):
        if not isinstance(values.get(name), dict):
            raise Refused(f"{where}: {name} must be an object with bandwidth and latency")
        values[name] = _make(Link, values[name], f"{where}: {name}")
        if values[name].bandwidth <= 0:
            raise Refused(f"{where}: {name}: the bandwidth must be above 0")
    machine = _make(Machine, values, where)
    for name in ("flops", "copy", "memory", "gpus_per_node", "gpus_per_nic"):
        if getattr(machine, name) <= 0:
            raise Refused(f"{where}: {name} must be above 0")
    return machine


def read_machine(path):
    return machine_from(_read(path), str(path))


def read_model(path):
    model = _make(Model, _read(path), str(path))
    if not 1 <= model.top_k <= model.experts:
        raise Refused(f"{path}: top_k is {model.top_k}, expected 1 to {model.experts} experts")
    if min(model.layers, model.hidden, model.expert_hidden, model.tokens) < 1:
        raise Refused(f"{path}: layers, hidden, expert_hidden and tokens must be at least 1")
    return model
