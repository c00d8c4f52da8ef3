"""A plan as the operators take it: a list of tensors, with names."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PlanTensors(NamedTuple):
    """The C++ ExchangePlan's members. Counts lie in host memory, indices on the tokens' device; all are int64.

    T tokens, W ranks; S rows are sent, R received; A assignments are sent, P received.
    """

    send_rows: Tensor
    """[W] rows to each rank, Σ = S."""
    receive_rows: Tensor
    """[W] rows from each rank, Σ = R."""
    send_assignments: Tensor
    """[W], Σ = A."""
    receive_assignments: Tensor
    """[W], Σ = P."""
    expert_counts: Tensor
    """[experts of this rank] assignments of each, Σ = P."""
    send_tokens: Tensor
    """[S] token of each sent row."""
    token_offsets: Tensor
    """[T + 1] into token_rows."""
    token_rows: Tensor
    """[S] the sent rows of each token, ascending."""
    send_order: Tensor
    """[A] flat (token, slot) of assignments by (expert, token)."""
    received_order: Tensor
    """[P] place of each assignment in the order of arrival."""
    assignment_rows: Tensor
    """[P] received row of each assignment."""
    row_offsets: Tensor
    """[R + 1] into row_assignments."""
    row_assignments: Tensor
    """[P] assignments of each received row, ascending."""
