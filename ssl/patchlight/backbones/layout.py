"""How a module lays out its features, found by trying one image: a feature map, or tokens with or without a class token."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check, sentence

WANTED = "its output must be a feature map [M, D, rows, columns] or tokens [M, N, D] or [M, 1 + N, D] of a square image"


@dataclass(frozen=True, slots=True)
class Layout:
    """Where patches are in a module's output."""

    kind: str  # "map" [M, D, rows, columns], "map last" [M, rows, columns, D], or "tokens" [M, prefix + N, D]
    width: int  # D
    patch_size: int  # pixels between neighboring patches
    prefix: int = 0  # tokens before the patches, of which the class token is the first

    def split(self, output: Tensor, grid: tuple[int, int]) -> tuple[Tensor | None, Tensor, tuple[int, int]]:
        """The first prefix token [M, D] or None, the patches [M, N, D] and their rows and columns. grid: of tokens."""
        if self.kind == "map":
            rows, columns = output.shape[-2:]
            return None, output.flatten(2).transpose(1, 2).contiguous(), (rows, columns)
        if self.kind == "map last":
            rows, columns = output.shape[1:3]
            return None, output.flatten(1, 2), (rows, columns)
        rule = "Tokens must be as many as the image has patches, and the prefix"
        rows, columns = grid
        got = f"{output.shape[1]} where the grid is {grid} and the prefix {self.prefix}"
        check(output.shape[1] == self.prefix + rows * columns, rule, got, "use images of another size")
        return (output[:, 0] if self.prefix else None), output[:, self.prefix :], grid


def find_layout(
    name: str,
    module: nn.Module,
    call: Callable[[Tensor], Any],
    image_size: int,
    prefix: int | None = None,
    channels_last: bool = False,
) -> Layout:
    """The layout of what `call` returns for an image of this size; an error if it is no layout of patches.

    name: of the module in messages. prefix: the number of tokens before the patches, where it is known.
    """
    output = _try(name, module, call, image_size)
    shape = tuple(output.shape) if isinstance(output, Tensor) else ()
    if len(shape) == 4 and shape[0] == 1:
        rows, columns, width = shape[1:] if channels_last else (*shape[2:], shape[1])
        kind = "map last" if channels_last else "map"
        if not channels_last and shape[1] == shape[2] != shape[3]:
            raise ValueError(_refusal(name, f"{shape}, with the width at the end", "return x.permute(0, 3, 1, 2)"))
        if rows == columns:
            return Layout(kind, width, _patch_size(name, image_size, rows))
    if len(shape) == 3 and shape[0] == 1:
        for number in (0, 1) if prefix is None else (prefix,):
            side = math.isqrt(max(shape[1] - number, 0))
            if side and side**2 == shape[1] - number:
                return Layout("tokens", shape[2], _patch_size(name, image_size, side), number)
    got = f"the shape {shape}" if shape else f"a {type(output).__name__}"
    remedy = (
        "remove its pooling and its classifier" if len(shape) == 2 else "wrap it in a module that returns one of these"
    )
    raise ValueError(_refusal(name, f"{got} for an image of {image_size}x{image_size}", remedy))


def attention_heads(width: int) -> int:
    """As many heads as have 64 channels or more each and divide the width: those of a class-attention summary."""
    return next(number for number in range(max(1, width // 64), 0, -1) if width % number == 0)


@torch.no_grad()
def _try(name: str, module: nn.Module, call: Callable[[Tensor], Any], image_size: int) -> Any:
    """What the module returns for an image of zeros, in evaluation mode, so that no statistics change."""
    weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    check(weight is not None, "A backbone must have parameters", f"{name} without any", "pass a network")
    assert weight is not None
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        return call(weight.new_zeros(1, 3, image_size, image_size))
    except Exception as error:  # of any library
        reason = (str(error).splitlines() or [""])[0].rstrip(".")
        got = f"{type(error).__name__}: {reason} for an image of {image_size}x{image_size}"
        raise ValueError(
            sentence(f"{name} as a backbone must take images [M, 3, H, W]", got, "pass the image_size that it takes")
        ) from error
    finally:
        for part, training in modes.items():
            part.training = training


def _patch_size(name: str, image_size: int, side: int) -> int:
    got = f"{side} for an image of {image_size} pixels"
    rule = f"{name} as a backbone: the sides of its grid must divide those of the image"
    check(image_size % side == 0, rule, got, "pass an image_size that is a multiple of its stride")
    return image_size // side


def _refusal(name: str, got: str, remedy: str) -> str:
    return sentence(f"{name} as a backbone: {WANTED}", got, remedy)
