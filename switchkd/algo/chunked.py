"""A loss over many positions that never holds more than one chunk of vocabulary rows.

In: the student's last hidden states [N, D], its output head, the teacher's rows by slice, and a per-token loss.
Out: sum(weights * per-token loss), differentiable in the hidden states and in the head. The gradient of a chunk is
taken as soon as its loss is known (as Liger's fused losses do, arXiv 2410.10989): nothing is computed twice, and what
is kept until the backward pass is one gradient per hidden state and one of the head.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Head = Callable[..., Tensor]


def chunked_loss(
    student_hidden: Tensor,
    student_head: Head,
    head_parameters: Sequence[Tensor],
    teacher_logits: Callable[[slice], Any],
    labels: Tensor,
    mask: Tensor,
    weights: Tensor,
    loss: Callable[..., Tensor],
    extras: dict[str, Tensor],
    chunk: int,
) -> Tensor:
    """sum(weights * per-token loss), a differentiable scalar.

    `student_head(hidden [n, D], *head_parameters)` gives the student's rows [n, V] and `teacher_logits(slice)` the
    teacher's (None for a loss without a teacher, compressed rows where the loss takes them); each is called once per
    chunk, in order, and so is
    `loss(p_logits, q_logits, labels, mask, **extras)`, which gets the same slice of each tensor of `extras` ([N, ...]).
    N = 0 gives a zero that still reaches the hidden states and the head, so that every rank's hooks run.
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}: give a number of positions, at least 1")

    def of_rows(rows: slice, hidden: Tensor, *parameters: Tensor) -> Tensor:
        with torch.no_grad():
            p_logits = teacher_logits(rows)
        own = {name: tensor[rows] for name, tensor in extras.items()}
        per_token = loss(p_logits, student_head(hidden, *parameters), labels[rows], mask[rows], **own)
        return (weights[rows] * per_token).sum()

    total: Tensor = _GradientsAhead.apply(of_rows, chunk, student_hidden, *head_parameters)  # type: ignore[no-untyped-call]
    return total


class _GradientsAhead(torch.autograd.Function):
    """The sum over chunks; its gradients are ready when the forward pass ends, the backward pass scales them."""

    @staticmethod
    def forward(ctx: Any, of_rows: Callable[..., Tensor], chunk: int, hidden: Tensor, *parameters: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[2:]
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        grads: list[Tensor | None] = [None] * len(wanted)
        if wanted[0]:
            grads[0] = torch.zeros_like(hidden)
        leaves = [p.detach().requires_grad_(w) for p, w in zip(parameters, wanted[1:], strict=True)]
        for start in range(0, len(hidden), chunk):
            rows = slice(start, min(start + chunk, len(hidden)))
            with torch.enable_grad():
                states = hidden[rows].detach().requires_grad_(wanted[0])
                part = of_rows(rows, states, *leaves)
            total += part.detach()
            inputs = [leaf for leaf, w in zip((states, *leaves), wanted, strict=True) if w]
            if not (inputs and part.requires_grad):
                continue
            found = iter(torch.autograd.grad(part, inputs, allow_unused=True, materialize_grads=True))
            for i, w in enumerate(wanted):
                if w:
                    grads[i] = _added(grads[i], next(found), rows if i == 0 else None)
        for i, (parameter, w) in enumerate(zip(parameters, wanted[1:], strict=True), 1):
            if w:  # chunks were summed in float32; without any the gradient is zero
                found_grad = grads[i]
                grads[i] = torch.zeros_like(parameter) if found_grad is None else found_grad.to(parameter.dtype)
        ctx.grads = grads
        return total.to(torch.promote_types(hidden.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Any, ...]:
        grads, ctx.grads = ctx.grads, None  # scaled in place: there is no second backward pass
        return (None, None, *(None if grad is None else grad.mul_(outer[0].to(grad.dtype)) for grad in grads))


def _added(total: Tensor | None, part: Tensor, rows: slice | None) -> Tensor:
    if rows is not None:
        assert total is not None
        total[rows] = part
        return total
    return part.float() if total is None else total.add_(part)
