"""Which kernels a call of an operation launches on a GPU, the bytes that each reads and writes, and its FLOPs.

The rules were checked against kernel profiles of torch 2.11 on an H200 (docs/cost.md). An operation without a rule of its own
works element by element: one kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import ceil, prod

from torch import Tensor

from .our_ops import kernels_of_our_op
from .records import (
    ATTENTION,
    HOST_COPY,
    HOST_READ,
    PRODUCTS_16,
    PRODUCTS_32,
    Call,
    Kernel,
    bytes_of,
    size_of,
    tensors_in,
)


def kernels_of(call: Call) -> list[Kernel]:
    """The kernels of a call, in order."""
    if call.name.startswith("patchlight."):
        return list(kernels_of_our_op(call))
    if call.name in FREE or call.on_host:
        return []
    rule = foreach if call.name.startswith("aten._foreach") else RULES.get(call.name.removeprefix("aten."), elementwise)
    return list(rule(call))


def same_layout(tensors: Sequence[Tensor]) -> bool:
    """Whether all have the same dense elements in the same order, so that a kernel can walk through them in one line."""
    large = [x for x in tensors if x.ndim and x.numel() > 1]
    if not large:
        return True
    first = large[0]
    extent = 1 + sum((size - 1) * stride for size, stride in zip(first.shape, first.stride(), strict=True))
    return extent == first.numel() and all(x.shape == first.shape and x.stride() == first.stride() for x in large)


def elementwise(call: Call) -> Iterator[Kernel]:
    given, returned = call.given, call.returned
    moved = [x for x in given if not is_written_only(call, x)] + returned
    kind = "elementwise" if same_layout(moved) else "strided"
    yield Kernel(call.name, kind, bytes_of(moved), max((x.numel() for x in moved), default=0))


def is_written_only(call: Call, x: Tensor) -> bool:
    """Whether an operation in place only writes its first argument."""
    return call.name in WRITES_ONLY and bool(call.args) and x is call.args[0]


def fill(call: Call) -> Iterator[Kernel]:
    yield Kernel(call.name, "elementwise", bytes_of(call.returned[:1]))


def copy(call: Call) -> Iterator[Kernel]:
    """A conversion is a kernel, a plain copy of adjacent bytes a command of the driver."""
    target = call.returned[0]
    source = call.given[-1]
    if source.device != target.device:
        waits = not (call.kwargs.get("non_blocking") or any(x is True for x in call.args))
        yield Kernel("copy from the host", HOST_COPY if waits else "memcpy", size_of(target))
        return
    moved = [source, target]
    dense = same_layout(moved)
    kind = "memcpy" if dense and source.dtype == target.dtype else "elementwise" if dense else "strided"
    yield Kernel(call.name, kind, bytes_of(moved))


def host_read(call: Call) -> Iterator[Kernel]:
    """The host waits until the device has reached this point."""
    yield Kernel("read by the host", HOST_READ, size_of(call.given[0]))


def fill_and_copy(call: Call) -> Iterator[Kernel]:
    """The gradient of a part: zeros of the whole, then the part is written."""
    whole, part = call.returned[0], call.given[0]
    yield Kernel(call.name + " zeros", "elementwise", size_of(whole))
    yield Kernel(call.name, "strided", 2 * size_of(part))


def clone_then(call: Call) -> Iterator[Kernel]:
    """An operation out of place that copies first and then works in place."""
    yield Kernel(call.name + " copy", "memcpy", bytes_of(call.returned) * 2)
    yield Kernel(call.name, "strided", bytes_of([*call.given, *call.returned]))


def concatenate(call: Call) -> Iterator[Kernel]:
    parts = [x for x in call.given if x.numel()]
    for start in range(0, len(parts), 128):
        yield Kernel(call.name, "elementwise", 2 * bytes_of(parts[start : start + 128]))


def reduction(call: Call) -> Iterator[Kernel]:
    """A reduction; one that several blocks share per output counts them in a buffer that a memset clears."""
    source, target = call.given[0], call.returned
    yield from cleared_first(source.numel(), max(target[0].numel(), 1))
    yield Kernel(call.name, reduction_kind(source, target[0]), bytes_of([source, *target]), source.numel())


def cleared_first(inputs: int, outputs: int) -> Iterator[Kernel]:
    """ATen splits a reduction over blocks when there are few outputs and each has many inputs."""
    if inputs // outputs >= SHARED_REDUCTION and inputs >= LARGE_REDUCTION:
        yield Kernel("memset", "memset")


SHARED_REDUCTION, LARGE_REDUCTION = 512, 1 << 17


def reduction_kind(source: Tensor, target: Tensor) -> str:
    """Columns of a matrix with many rows are summed slower than rows are."""
    over_rows = (
        source.ndim >= 2 and target.numel() > 1 and target.numel() == source.shape[-1] and source.stride(-1) == 1
    )
    return "column sum" if over_rows else "reduction"


def layer_norm(call: Call) -> Iterator[Kernel]:
    yield Kernel(call.name, "layer norm", bytes_of([*call.given, *call.returned]), 8 * call.returned[0].numel())


def layer_norm_backward(call: Call) -> Iterator[Kernel]:
    gradient, source = call.args[0], call.args[1]
    yield Kernel(call.name + " dx", "elementwise", bytes_of([gradient, source, source]), 8 * source.numel())
    if any(call.args[-1][1:]):
        yield Kernel(call.name + " weight", "layer norm weight", bytes_of([gradient, source]), 4 * source.numel())


def batch_norm(call: Call) -> Iterator[Kernel]:
    source = call.given[0]
    yield Kernel(call.name + " statistics", "reduction", size_of(source), 4 * source.numel())
    yield Kernel(call.name + " running", "elementwise", bytes_of(call.given[1:]))
    yield Kernel(call.name, "elementwise", 2 * size_of(source), 4 * source.numel())


def batch_norm_backward(call: Call) -> Iterator[Kernel]:
    gradient, source = call.given[:2]
    yield Kernel(call.name + " sums", "reduction", bytes_of([gradient, source]), 4 * source.numel())
    yield Kernel(call.name, "elementwise", bytes_of([gradient, source, source]), 4 * source.numel())


def softmax(call: Call) -> Iterator[Kernel]:
    yield Kernel(call.name, "elementwise", bytes_of([*call.given, *call.returned]), 5 * call.returned[0].numel())


def product(call: Call) -> Iterator[Kernel]:
    """[..., M, K] x [..., K, N]: a memset and a second kernel where the sum over K is split over blocks."""
    operands, out = tensors_in(call.args), call.returned[0]
    bias = operands[:1] if "add" in call.name else []
    a, b = operands[len(bias) :][:2]
    m, k, n = a.shape[-2] if a.ndim > 1 else 1, a.shape[-1], b.shape[-1] if b.ndim > 1 else 1
    batch = a.shape[0] if a.ndim == 3 else 1
    flops = 2 * batch * m * n * k
    half = a.element_size() == 2
    split = batch == 1 and is_split(m, n, k)
    if split:
        yield Kernel("memset", "memset")
    kind = product_kind(batch, m, n, k, half)
    moved = bytes_of([a, b, *bias, out])
    yield Kernel(call.name, kind, moved, flops, PRODUCTS_16 if half else PRODUCTS_32)
    if split:
        yield Kernel(call.name + " sum of splits", "elementwise", SPLITS * m * n * 4 + size_of(out))


SPLITS = 4


def is_split(m: int, n: int, k: int) -> bool:
    """cuBLAS splits the sum of a product that has many terms and few outputs."""
    return k >= 4096 and k >= 4 * max(m, n) and ceil(m / 128) * ceil(n / 128) < 132


def product_kind(batch: int, m: int, n: int, k: int, half: bool) -> str:
    """By shape: each kind has a rate of its own."""
    if min(m, n) == 1:
        return "matrix times vector"
    if not half:
        return "product fp32"
    if batch > 1:
        return "product 16 batched"
    if k >= 4 * max(m, n):
        return "product 16 long sum"  # weight gradients
    return "product 16 small" if max(n, k) <= 512 or (m < 4096 and n < 4096) else "product 16"


def convolution(call: Call) -> Iterator[Kernel]:
    source, weight = call.given[:2]
    flops = 2 * call.returned[0].numel() * prod(weight.shape[1:])
    yield Kernel(call.name, "convolution", bytes_of([*call.given, *call.returned]), flops, kind_of_product(source))


def convolution_backward(call: Call) -> Iterator[Kernel]:
    """As cuDNN runs it for channels first: both tensors are laid out anew, and the weight's gradient is laid out back."""
    gradient, source, weight = call.given[:3]
    flops = 2 * gradient.numel() * prod(weight.shape[1:])
    if call.args[-1][0]:  # the gradient of the input is wanted too
        yield Kernel(
            call.name + " dx", "convolution weight", bytes_of([gradient, source]), flops, kind_of_product(source)
        )
    if not call.args[-1][1]:
        return
    for x in (gradient, source):
        yield Kernel(call.name + " layout", "layout", 2 * size_of(x))
    yield Kernel(call.name, "convolution weight", bytes_of([gradient, source, weight]), flops, kind_of_product(source))
    yield Kernel(call.name + " sum of splits", "elementwise", 5 * size_of(weight))
    yield Kernel(call.name + " layout", "elementwise", 2 * size_of(weight))
    if call.args[-1][2]:
        yield from cleared_first(gradient.numel(), weight.shape[0])
        yield Kernel(call.name + " bias", "column sum", size_of(gradient))


def kind_of_product(x: Tensor) -> str:
    return PRODUCTS_16 if x.element_size() == 2 else PRODUCTS_32


def attention_blocks(query: Tensor) -> int:
    """Blocks of 64 queries of one head."""
    return prod(query.shape[:-2]) * ceil(query.shape[-2] / 64)


def attention(call: Call) -> Iterator[Kernel]:
    q, k, v = call.given[:3]
    flops = 4 * q.numel() * k.shape[-2]
    yield Kernel(call.name, "attention", bytes_of([q, k, v, *call.returned[:2]]), flops, ATTENTION, attention_blocks(q))


def attention_backward(call: Call) -> Iterator[Kernel]:
    """cuDNN: two memsets, the rows' products of output and gradient, the gradients, and dq from fp32."""
    gradient, q, k, v, out = call.given[:5]
    flops = 8 * q.numel() * k.shape[-2]
    for _ in range(2):
        yield Kernel("memset", "memset")
    yield Kernel(call.name + " rows", "elementwise", bytes_of([gradient, out]))
    moved = bytes_of([gradient, q, k, v, k, v]) + 4 * q.numel()
    yield Kernel(call.name, "attention backward", moved, flops, ATTENTION, attention_blocks(q))
    yield Kernel(call.name + " dq", "elementwise", 4 * q.numel() + size_of(q))


def upsample_backward(call: Call) -> Iterator[Kernel]:
    yield Kernel(call.name + " zeros", "elementwise", bytes_of(call.returned))
    yield Kernel(call.name, "resize", bytes_of([*call.given, *call.returned]))


def upsample(call: Call) -> Iterator[Kernel]:
    yield Kernel(call.name, "resize", bytes_of([*call.given, *call.returned]))


def sort(call: Call) -> Iterator[Kernel]:
    """Indices are written, then short rows are sorted by one block each, long ones by passes over 8 bits."""
    source = call.given[0]
    yield Kernel(call.name + " indices", "elementwise", 8 * source.numel())
    passes = 1 if source.shape[-1] <= 4096 else 2 + source.element_size()
    for _ in range(passes):
        yield Kernel(call.name, "sort", 2 * source.numel() * (source.element_size() + 8))


def topk(call: Call) -> Iterator[Kernel]:
    yield Kernel(call.name, "sort", bytes_of([*call.given, *call.returned]))
    yield Kernel(call.name + " order", "elementwise", 2 * bytes_of(call.returned))


def scatter_into_zeros(call: Call) -> Iterator[Kernel]:
    """Gradients that are added where they belong: zeros first."""
    yield Kernel(call.name + " zeros", "elementwise", bytes_of(call.returned[:1]))
    yield Kernel(call.name, "strided", bytes_of([*call.given, *call.returned]))


def fused_adam(call: Call) -> Iterator[Kernel]:
    lists = [part for part in call.args[:4] if isinstance(part, (list, tuple))]
    for numbers in chunks([x.numel() for x in lists[0]], 36):
        yield Kernel(call.name, "elementwise", numbers * 4 * 7, numbers * 12)


# How many tensors one launch takes, by how many lists there are.
MOST_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
CHUNK, MOST_CHUNKS = 1 << 16, 320


def foreach(call: Call) -> Iterator[Kernel]:
    """As `multi_tensor_apply` cuts lists; lists of 0-d tensors beside larger ones are worked on one by one."""
    lists = [[x for x in part if isinstance(x, Tensor)] for part in call.args if isinstance(part, (list, tuple))]
    lists = [part for part in lists if part]
    first = lists[0]
    if call.name == "aten._foreach_norm":
        for numbers in chunks([x.numel() for x in first], MOST_TENSORS[1]):
            yield Kernel(call.name, "reduction", numbers * first[0].element_size(), 2 * numbers)
        yield Kernel(call.name + " sums", "elementwise", 4 * len(first))
        return
    in_place = call.name.endswith("_")
    if any(not is_fast(a, b) for part in lists[1:] for a, b in zip(first, part, strict=False)):
        for tensors in zip(*lists, strict=True):
            moved = [*tensors, tensors[0]]
            kind = "memcpy" if "copy" in call.name else "elementwise" if same_layout(moved) else "strided"
            yield Kernel(call.name, kind, bytes_of(moved), tensors[0].numel())
        return
    passes = len(lists) + 1 - (call.name in WRITES_ONLY)
    depth = len(lists) + (not in_place)
    for numbers in chunks([x.numel() for x in first], MOST_TENSORS[min(depth, 5)]):
        yield Kernel(call.name, "elementwise", numbers * first[0].element_size() * passes, numbers)


def is_fast(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride()


def chunks(numbers: Sequence[int], most_tensors: int) -> Iterator[int]:
    """The elements of each launch."""
    tensors = blocks = elements = 0
    numbers = [number for number in numbers if number]
    for index, number in enumerate(numbers):
        tensors += 1
        pieces = ceil(number / CHUNK)
        for piece in range(pieces):
            last_piece = piece == pieces - 1
            elements += min(CHUNK, number - piece * CHUNK)
            blocks += 1
            full = (tensors == most_tensors and last_piece) or blocks == MOST_CHUNKS
            if full or (last_piece and index == len(numbers) - 1):
                yield elements
                blocks = elements = 0
                tensors = 0 if last_piece else 1


# Operations that change only what is known of a tensor, or that the host does alone.
FREE = {
    "aten._unsafe_view", "aten.as_strided", "aten.detach", "aten.lift_fresh", "aten.alias", "aten.promote_types",
    "aten.empty", "aten.empty_like", "aten.new_empty", "aten.empty_strided", "aten.new_empty_strided",
    "aten.sym_size", "aten.is_same_size", "aten.split_with_sizes", "aten.unbind", "aten._reshape_alias", "aten.set_",
    "prim.device", "profiler._record_function_enter_new", "profiler._record_function_exit",
    "aten.resize_", "aten._has_same_storage_numel", "aten._version",
}  # fmt: skip
WRITES_ONLY = {"aten.copy_", "aten.fill_", "aten.zero_", "aten._foreach_copy_", "aten.uniform_", "aten.normal_",
               "aten.bernoulli_", "aten.random_"}  # fmt: skip
RULES: dict[str, Callable[[Call], Iterator[Kernel]]] = {
    **dict.fromkeys(
        ("zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like", "arange",
         "zero_", "fill_", "rand", "randn", "randint", "uniform_", "normal_", "linspace", "scalar_tensor", "rand_like"),
        fill,
    ),
    **dict.fromkeys(("_to_copy", "clone", "copy_", "_copy_from_and_resize", "contiguous"), copy),
    **dict.fromkeys(("slice_backward", "select_backward", "diagonal_backward"), fill_and_copy),
    **dict.fromkeys(("masked_fill", "index_add", "index_copy", "scatter", "scatter_add", "index_fill"), clone_then),
    **dict.fromkeys(("cat", "stack"), concatenate),
    **dict.fromkeys(
        ("sum", "mean", "amax", "amin", "max", "min", "argmax", "argmin", "all", "any", "linalg_vector_norm", "norm",
         "var", "std", "var_mean", "logsumexp", "prod", "count_nonzero"),
        reduction,
    ),
    "native_layer_norm": layer_norm,
    "native_layer_norm_backward": layer_norm_backward,
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm"), batch_norm),
    **dict.fromkeys(("native_batch_norm_backward", "cudnn_batch_norm_backward"), batch_norm_backward),
    **dict.fromkeys(("_softmax", "_log_softmax", "_softmax_backward_data", "_log_softmax_backward_data"), softmax),
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "vdot", "_addmm_activation"), product),
    "convolution": convolution,
    "convolution_backward": convolution_backward,
    **dict.fromkeys(
        ("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_efficient_attention",
         "_scaled_dot_product_flash_attention"),
        attention,
    ),
    **dict.fromkeys(
        ("_scaled_dot_product_cudnn_attention_backward", "_scaled_dot_product_efficient_attention_backward",
         "_scaled_dot_product_flash_attention_backward"),
        attention_backward,
    ),
    **dict.fromkeys(("upsample_bicubic2d", "upsample_bilinear2d", "grid_sampler_2d"), upsample),
    **dict.fromkeys(
        ("upsample_bicubic2d_backward", "upsample_bilinear2d_backward", "grid_sampler_2d_backward"), upsample_backward
    ),
    **dict.fromkeys(("sort", "argsort"), sort),
    "topk": topk,
    "_local_scalar_dense": host_read,
    **dict.fromkeys(("gather_backward", "embedding_dense_backward", "unfold_backward"), scatter_into_zeros),
    "_fused_adamw_": fused_adam,
    "_fused_adam_": fused_adam,
}  # fmt: skip
