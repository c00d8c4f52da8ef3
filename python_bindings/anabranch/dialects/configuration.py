"""Another library's configuration, as a dialect of `MoE.from_config` asks for its keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NoReturn

from ..layer.activations import activation_name

_ABSENT = object()


class Configuration:
    """Another library's options by their names there, and which of them have been asked for."""

    def __init__(self, dialect: str, values: Any) -> None:
        self.dialect = dialect
        self.values = normalised(values)
        self.known: set[str] = set()

    def get(self, *keys: str, default: Any = _ABSENT) -> Any:
        """Of the first of the keys that is there and not None."""
        self.known.update(keys)
        found = [self.values[key] for key in keys if self.values.get(key) is not None]
        if found:
            return found[0]
        if default is _ABSENT:
            raise ValueError(f"{self.dialect}: there is no {keys[0]}")
        return default

    def only(self, key: str, *values: Any, why: str) -> None:
        """Refuses other values than these (and None)."""
        value = self.get(key, default=None)
        if value is not None and value not in values:
            self.refuse(key, why)

    def elsewhere(self, *keys: str) -> None:
        """They say nothing about what a layer computes."""
        self.known.update(keys)

    def refuse(self, key: str, why: str) -> NoReturn:
        raise ValueError(f"{self.dialect}: {key} = {self.values.get(key)!r}: {why}")

    def activation(self, key: str, default: str) -> str:
        value = self.get(key, default=default)
        name = value if isinstance(value, str) else activation_name(value)
        names = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_tanh": "gelu_tanh", "relu": "relu"}
        names |= dict.fromkeys(["gelu_new", "gelu_pytorch_tanh"], "gelu_tanh")
        names |= {"relu_squared": "relu_squared", "relu2": "relu_squared", "quick_gelu": "quick_gelu"}
        if name is None or name not in names:
            self.refuse(key, f"expected one of {', '.join(names)}")
        return names[name]

    def check_known(self, *words: str) -> None:
        """Refuses keys with one of these words that nobody has asked for, unless they are not set."""
        for key, value in self.values.items():
            if key not in self.known and value not in (None, False) and any(word in key for word in words):
                self.refuse(key, "this option is not known here")


def normalised(values: Any) -> dict[str, Any]:
    """From a mapping, a dataclass or a configuration object; keys as on a command line too: --moe-router-topk."""
    if hasattr(values, "to_dict"):
        values = values.to_dict()
    elif dataclasses.is_dataclass(values) and not isinstance(values, type):
        values = {field.name: getattr(values, field.name) for field in dataclasses.fields(values)}
    elif not isinstance(values, Mapping) and hasattr(values, "__dict__"):
        values = vars(values)
    if not isinstance(values, Mapping):
        raise TypeError(f"config is a {type(values).__name__}, expected a mapping or a configuration")
    return {str(key).lstrip("-").replace("-", "_"): value for key, value in values.items()}
