"""The oracle against autograd through a dense layer, and what it calls right and wrong."""

import pytest
import torch
from article import cases, methods, oracle
from conftest import SMALL, Spoiled


def dense(problem):
    """y and gradients in fp64: every expert on every token, masked, through autograd; no code of the oracle's."""
    leaves = {name: getattr(problem, name).double().requires_grad_() for name in ("x", "up", "down")}
    x, routing = leaves["x"], (problem.logits if problem.gate is None else problem.gate).double().requires_grad_()
    logits = routing if problem.gate is None else (x @ routing.t()).gather(1, problem.ids)
    weights = torch.zeros(x.size(0), problem.case.experts, dtype=x.dtype)
    weights = weights.scatter(1, problem.ids, logits.softmax(dim=1))
    hidden = torch.nn.functional.gelu(torch.einsum("th,enh->etn", x, leaves["up"]), approximate="tanh")
    y = torch.einsum("etn,ehn,te->th", hidden, leaves["down"], weights)
    y.backward(problem.dy.double())
    gradients = {"dx": x.grad, "dup": leaves["up"].grad, "ddown": leaves["down"].grad}
    return {"y": y.detach(), **gradients, "dlogits" if problem.gate is None else "dgate": routing.grad}


@pytest.mark.parametrize("routing", cases.ROUTINGS)
@pytest.mark.parametrize("dtype", cases.TYPES)
def test_it_is_a_dense_layer(small, dtype, routing):
    problem = small(dtype, routing)
    found, exact = oracle.Oracle(problem).expected(), dense(problem)
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        torch.testing.assert_close(found[name].value, value, rtol=1e-9, atol=1e-11)


def test_samples_are_parts_of_the_whole(small):
    problem = small("bf16", "even")
    whole = oracle.Oracle(problem).expected()
    part = oracle.Oracle(problem, check_flops=4e5)
    assert 0 < len(part.tokens) < SMALL.tokens and 0 < len(part.units) < SMALL.expert_hidden
    found = part.expected()
    picks = {"dup": lambda t: t[:, part.units], "ddown": lambda t: t[:, :, part.units]}
    for name, expected in found.items():
        pick = picks.get(name, lambda t: t[part.tokens])
        torch.testing.assert_close(expected.value, pick(whole[name].value))
        torch.testing.assert_close(expected.allowed, pick(whole[name].allowed))


def test_the_gates_gradient_of_sampled_tokens(small):
    problem = small()
    part = oracle.Oracle(problem, check_flops=4e5)
    problem.dy = part.masked_dy()
    torch.testing.assert_close(part.expected()["dgate"].value, dense(problem)["dgate"])


def test_chunks_change_nothing(small, monkeypatch):
    problem = small("fp16", "uneven")
    whole = oracle.Oracle(problem).expected()
    monkeypatch.setattr(oracle, "CHUNK_BYTES", 1)
    case = cases.Case(10, 100, 8, experts=4, top_k=2, expert_hidden=8)
    big = small("fp16", "uneven", case)
    assert len(list(oracle.Oracle(big).chunks(0, None, 8))) > 1
    for name, expected in oracle.Oracle(problem).expected().items():
        torch.testing.assert_close(expected.value, whole[name].value)
    for name, value in dense(big).items():
        torch.testing.assert_close(oracle.Oracle(big).expected()[name].value, value)


@pytest.mark.parametrize("routing", cases.ROUTINGS)
@pytest.mark.parametrize("dtype", cases.TYPES)
def test_a_plain_layer_is_right_with_room(rows_of, dtype, routing):
    rows = rows_of({"plain": methods.PlainLoop}, dtype, routing)
    errors = rows["plain", "forward+backward"]["errors"]
    assert all(row["status"] == "ok" for row in rows.values())
    # Neither beyond what is allowed nor so far within it that the check would not see an error.
    assert all(error["used"] < 0.8 for error in errors.values())
    assert max(error["used"] for error in errors.values()) > 0.02


def drop_a_row(tensor):
    """The largest: one of nearly nothing may be lost without a trace."""
    changed = tensor.clone()
    changed[tensor.flatten(1).norm(dim=1).argmax()] = 0
    return changed


CHANGES = {
    "a lost row": drop_a_row,
    "ten per cent": lambda tensor: tensor * 1.1,
    "nan": lambda tensor: torch.where(torch.arange(tensor.numel()).view(tensor.shape) == 3, torch.nan, tensor),
    "shape": lambda tensor: tensor[..., :-1],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("name", ["y", "dx", "dup", "ddown", "dgate", "dlogits"])
def test_what_is_wrong_is_found(rows_of, name, change):
    if change is CHANGES["shape"] and name in ("y", "dx"):
        pytest.skip("autograd itself refuses a y or dx of another shape")
    routing = "even" if name == "dlogits" else "learned"
    rows = rows_of({"spoiled": lambda problem: Spoiled(problem, name, change)}, "bf16", routing)
    assert rows["spoiled", "forward"]["status"] == ("wrong" if name == "y" else "ok")
    row = rows["spoiled", "forward+backward"]
    assert row["status"] == "wrong" and row["ms"] is None and row["steps"] == 0
    first = rows["spoiled", "forward"] if name == "y" else row  # of a wrong y, gradients may be worse still
    assert first["reason"].startswith(f"{name} errs by")


def test_no_token_is_on_the_brink(small):
    problem = small("bf16", "learned", cases.Case(50, 100, 16, experts=8, top_k=3, expert_hidden=8))
    logits = (problem.x.double() @ problem.gate.double().t()).sort(dim=1, descending=True).values
    assert (logits[:, 2] - logits[:, 3]).min() >= 1e-3
    plain = (problem.x.float() @ problem.gate.t()).topk(3, dim=1).indices
    assert plain.sort(dim=1).values.equal(problem.ids.sort(dim=1).values)
