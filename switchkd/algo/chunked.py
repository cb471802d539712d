"""A loss over many positions that never holds more than one chunk of vocabulary rows.

In: the student's last hidden states [N, D], its output head, the teacher's rows by slice, and a per-token loss.
Out: sum(weights * per-token loss), differentiable in the hidden states and in the head. Each chunk's logits are made,
reduced and dropped, and made again in the backward pass.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]


def chunked_loss(
    student_hidden: Tensor,
    student_head: Head,
    teacher_logits: Callable[[slice], Tensor | None],
    labels: Tensor,
    mask: Tensor,
    weights: Tensor,
    loss: Callable[..., Tensor],
    extras: dict[str, Tensor],
    chunk: int,
    *,
    num_chunks: int = 1,
    use_reentrant: bool = False,
) -> tuple[Tensor, Tensor]:
    """(sum(weights * per-token loss) as a differentiable scalar, the per-token losses detached, float32 [N]).

    `teacher_logits(slice)` gives the teacher's rows [n, V] (None for a loss without a teacher) and is called twice per
    chunk; `loss(p_logits, q_logits, labels, mask, **extras)` gets the same slice of each tensor of `extras` ([N, ...]).
    N = 0 gives a zero that still reaches the hidden states and the head, so that every rank's hooks run.

    `num_chunks` is the least number of chunks, the surplus ones being empty: DeepSpeed ZeRO-3 gathers the head at each
    of its calls, so all ranks must call it equally often or they wait for each other for ever.
    `use_reentrant` is for a single chunk only: with more, the head's gradient arrives once per chunk instead of once,
    which ZeRO 2 and 3 refuse with an assertion. The other kind was checked with ZeRO 1, 2 and 3.
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}: give a number of positions, at least 1")

    def of_rows(hidden: Tensor, rows: slice, _: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            p_logits = teacher_logits(rows)
        own = {name: tensor[rows] for name, tensor in extras.items()}
        per_token = loss(p_logits, student_head(hidden), labels[rows], mask[rows], **own)
        return (weights[rows] * per_token).sum(), per_token.detach()

    # the reentrant kind gives no gradient at all, not even to the head, unless one input asks for one
    anchor = torch.zeros((), device=student_hidden.device, requires_grad=True)
    sums, per_token = [], []
    num = len(student_hidden)
    for i in range(max(num_chunks, math.ceil(num / chunk), 1)):
        rows = slice(min(i * chunk, num), min((i + 1) * chunk, num))
        total, each = checkpoint(of_rows, student_hidden[rows], rows, anchor, use_reentrant=use_reentrant)
        sums.append(total)
        per_token.append(each)
    return torch.stack(sums).sum(), torch.cat(per_token).detach()
