"""Metrics of routers against plain formulas, their loggers, and alarms."""

import math

import anabranch
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

EXPERTS = 6


def model_of(device, **options):
    layers = (anabranch.MoE(8, 12, EXPERTS, 2, seed=seed, dtype=torch.float64, device=device, **options) for seed in (1, 2))
    return nn.Sequential(*layers)


def run(model, x, checkpointed=False):
    outs = []
    for layer in model:
        run = lambda rows, layer=layer: layer(rows)  # noqa: E731
        out = checkpoint(run, x, use_reentrant=False) if checkpointed else run(x)
        outs.append(out)
        x = x + out.output
    x.sum().backward()
    return outs


@pytest.mark.parametrize("checkpointed", [False, True])
def test_metrics_are_means_over_forwards(checkpointed, device):
    model = model_of(device, sequence_balance_coefficient=0.1)
    metrics = anabranch.RouterMetrics(model)
    outs = [run(model, torch.randn(3, 5, 8, dtype=torch.float64, device=device), checkpointed) for _ in range(2)]
    model.eval()
    run(model, torch.randn(7, 8, dtype=torch.float64, device=device))  # is not counted
    found = metrics.read()
    names = {"moe/load_balancing_loss": "balance_loss", "moe/z_loss": "z_loss", "moe/seq_load_balancing_loss": "sequence_balance_loss"}
    for name, field in names.items():
        of_layers = [sum(getattr(out[place], field).item() for out in outs) / 2 for place in range(2)]
        assert found[name] == pytest.approx(sum(of_layers) / 2)
        assert [found[f"{name}/layer_{place}"] for place in range(2)] == pytest.approx(of_layers)
    for place in range(2):
        load = (outs[0][place].expert_load + outs[1][place].expert_load).tolist()
        mean = sum(load) / EXPERTS
        deviation = math.sqrt(sum((each - mean) ** 2 for each in load) / EXPERTS)
        assert found[f"moe/cv/layer_{place}"] == pytest.approx(deviation / mean)
        assert found[f"moe/max_load/layer_{place}"] == pytest.approx(max(load) / mean)
        entropy = -sum(each / sum(load) * math.log(each / sum(load)) for each in load if each)
        assert found[f"moe/entropy/layer_{place}"] == pytest.approx(entropy / math.log(EXPERTS))
    assert metrics.read() == {}
    metrics.close()
    model.train()
    run(model, torch.randn(7, 8, dtype=torch.float64, device=device))
    assert metrics.read() == {}


def test_alarms_of_dead_experts_and_collapse(device):
    told = []
    model = model_of(device, router=False)
    metrics = anabranch.RouterMetrics(model, alarm=told.append, dead_after=3, collapsed_below=0.4)
    ids = torch.tensor([[0, 1]] * 9, device=device)
    balanced = torch.stack([torch.arange(12, device=device) % 6, (torch.arange(12, device=device) + 1) % 6], 1)

    def step(ids):
        for layer in model:
            layer(torch.randn(len(ids), 8, dtype=torch.float64, device=device), (ids, torch.ones(ids.shape, device=device)))
        return metrics.read()

    assert step(ids)["moe/entropy"] == pytest.approx(math.log(2) / math.log(6))
    assert len(told) == 2 and "0: the router has collapsed" in told[0] and "50% of all assignments" in told[0]
    step(ids)
    assert len(told) == 2  # told once
    step(ids)
    dead = [text for text in told if "dead" in text]
    assert len(dead) == 8 and "expert 2 is dead: no token in 3 reads" in dead[0]
    step(balanced), step(ids)
    assert len([text for text in told if "collapsed" in text]) == 4  # again, after balance
    assert len([text for text in told if "dead" in text]) == 8


def test_loggers(device, tmp_path):
    model = model_of(device)
    metrics = anabranch.RouterMetrics(model)
    run(model, torch.randn(7, 8, dtype=torch.float64, device=device))

    class Run:
        def log(self, found, step):
            self.found, self.step = found, step

    logged = Run()
    anabranch.log_to_wandb(metrics, logged, 7)
    assert logged.step == 7 and logged.found["moe/z_loss"] > 0

    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    run(model, torch.randn(7, 8, dtype=torch.float64, device=device))
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        anabranch.log_to_tensorboard(metrics, writer, 3)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {"moe/load_balancing_loss", "moe/cv/layer_1"} <= set(events.Tags()["scalars"])
    assert events.Scalars("moe/z_loss")[0].step == 3

    class Trainer:
        def __init__(self):
            self.model, self.history = model, []

        def log(self, logs, start_time=None):
            self.history.append(logs)

    metrics.close()
    trainer = Trainer()
    anabranch.log_to_trainer(trainer)
    run(model, torch.randn(7, 8, dtype=torch.float64, device=device))
    trainer.log({"loss": 1.0}, None)
    trainer.log({"eval_loss": 1.0})
    assert trainer.history[0]["loss"] == 1.0 and trainer.history[0]["moe/cv"] > 0 and trainer.history[1] == {"eval_loss": 1.0}
    with pytest.raises(ValueError, match="no layer"):
        anabranch.RouterMetrics(nn.Linear(2, 2))
