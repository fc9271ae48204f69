"""What ops that return one loss share: an implementation by two kernels, and the gradient.

Their forward returns (loss, log2_student, log2_teacher, *gradients). Its last argument says whether the gradients are wanted
at once. If not, they are empty, and the backward computes them from the two tensors of sums.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .dispatch import Impl, Op


def two_kernels(name: str, statistics: Callable, gradients: Callable, unsupported: Callable, count: int) -> Impl:
    """An implementation by `statistics(*args)`, the loss and the two tensors of sums, and `gradients`, `count` of them.

    `gradients(grad_loss, log2_student, log2_teacher, args, dtype)` gives a tensor, or a tuple of them.
    """

    def fwd(*args) -> tuple[Tensor, ...]:
        loss, *sums = statistics(*args)
        if not args[-1]:
            return loss, *sums, *(loss.new_empty(0) for _ in range(count))
        return loss, *sums, *_tuple(gradients(loss.new_ones(()), *sums, args, loss.dtype))

    def bwd(grad_loss: Tensor, log2_student: Tensor, log2_teacher: Tensor, *args) -> Tensor | tuple[Tensor, ...]:
        return gradients(grad_loss, log2_student, log2_teacher, args, args[0].dtype)

    return Impl(name, fwd, unsupported, bwd)


def differentiate_loss(op: Op, bwd: Callable) -> None:
    """Gives the op its gradient. `bwd(grad_loss, *outputs behind the loss, *args)` gives those of the first arguments."""

    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # or each output that has no gradient would get zeros of its size
        ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.save_for_backward(*output[1:], *(value if isinstance(value, Tensor) else None for value in inputs))

    def backward(ctx, grad_loss: Tensor | None, *_) -> tuple:
        count = len(ctx.others)
        if grad_loss is None:  # nothing depends on the loss
            return (None,) * count
        saved, tensors = ctx.saved_tensors[:-count], ctx.saved_tensors[-count:]
        args = [other if tensor is None else tensor for tensor, other in zip(tensors, ctx.others, strict=True)]
        gradients = _tuple(bwd(grad_loss, *saved, *args))
        return *gradients, *([None] * (count - len(gradients)))

    op.differentiate(setup_context, backward)


def _tuple(x: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (x,) if isinstance(x, Tensor) else x
