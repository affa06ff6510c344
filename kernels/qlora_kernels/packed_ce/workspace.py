"""Says how the two paths cut their work, and so how many bytes they take beside what they return.

Whoever plans memory asks here (`workspace_bytes`, `backward_bytes`); the paths ask the same functions for their shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qlora_kernels.packed_ce.backend import PathName
from qlora_kernels.packed_ce.head import Head, NF4Head, PatchedHead
from qlora_kernels.packed_ce.inputs import compute_dtype

# ------------------------------------------------------------------ on a GPU

# Logits that are there at once. Share of the two products' time on an H200 (benchmarks/RESULTS.md), whole rows of a
# vocabulary of 128,256 x 4096 (8B) and of 256,000 x 2304 (Gemma 2):
#
#   MiB    8B, a quarter supervised   8B, all   Gemma, a quarter   Gemma, all
#   256    79%                        84%       68%                73%
#   512    81%                        85%       71%                81%
#   1024   83%                        72%       75%                81%
#   2048   82%                        83%       73%                83%
#
# With 256 MiB a chunk of Gemma's has 262 rows, for which the second product (262 x 2304) is 27 tiles of 128 x 256 for
# 132 processors; with 512 MiB 45. More gains little, and an 8B loses where the chunks fill the last wave badly.
# A layer's backward takes as much as soon as a row has some thousand tokens, so the peak of a long row stays.
WORKSPACE_BYTES = 512 * 2**20
# Fewer rows than this starve the second product of a chunk; the vocabulary is then tiled.
FEWEST_ROWS = 128
TRITON_TILE = 16384

# ------------------------------------------------------------------ in plain torch

# A tile of some million logits stays in the caches of a CPU and is large enough for its matrix products. Many rows
# rather than many columns: the products rearrange the tile of the head once per block of rows.
BLOCK_ROWS = 2048
# From this width of the head on that costs little, and fewer rows multiply faster (measured at 2048 wide: 1.2x in
# bfloat16 on AMD with a quarter of them and twice the columns; 1.05x in float32 on Intel with half of them).
WIDE = 1024
TORCH_TILE = 2048
# Rows for which the gradient of trained rows of the head is formed at once.
PATCHED_ROWS = 1024
NF4_BLOCK = 64


@dataclass(frozen=True)
class HeadShape:
    """Describes an output head [vocabulary, width] as far as memory goes.

    trained_rows: the number of trained rows of a `PatchedHead`.
    """

    vocabulary: int
    width: int
    dtype: torch.dtype
    in_4bit: bool = False
    trained_rows: int = 0

    @classmethod
    def of(cls, head: Head) -> HeadShape:
        """Returns the shape of a head."""
        base = head.base if isinstance(head, PatchedHead) else head
        rows = len(head.token_ids) if isinstance(head, PatchedHead) else 0
        return cls(head.shape[0], head.shape[1], head.dtype, isinstance(base, NF4Head), rows)

    @property
    def whole(self) -> bool:
        """Returns whether the head is one dense matrix, of which a tile is a view."""
        return not (self.in_4bit or self.trained_rows)


def block_shape(width: int, dtype: torch.dtype) -> tuple[int, int]:
    """Returns (rows of a block, columns of a tile)."""
    if width < WIDE:  # in float32 half the columns take half the memory, and no more time
        return BLOCK_ROWS, TORCH_TILE if dtype == torch.bfloat16 else TORCH_TILE // 2
    return (-(-BLOCK_ROWS // 4), 2 * TORCH_TILE) if dtype == torch.bfloat16 else (-(-BLOCK_ROWS // 2), TORCH_TILE)


def block_rows(count: int, width: int, dtype: torch.dtype) -> int:
    """Returns the rows of a block: about as many as `block_shape` says, in equal blocks.

    They are a multiple of what a product does at once, because a ragged rest is slow.
    """
    blocks = max(1, round(count / block_shape(width, dtype)[0]))
    return -(-count // (32 * blocks)) * 32


def vocabulary_tile(head: HeadShape, trainable: bool, tile: int | None, budget: int) -> int | None:
    """Returns the columns of a tile of the vocabulary on a GPU; None where whole rows of logits are formed.

    tile: the columns that the caller wants. trainable: whether the head has a gradient, which needs whole rows because
    their sum is not known before the last tile.
    """
    few = budget // (4 * padded(head.vocabulary)) < FEWEST_ROWS
    if tile is None and (not head.whole or (few and not trainable)):
        tile = TRITON_TILE
    return tile if tile is not None and tile < head.vocabulary and not trainable else None


def group_rows(count: int, tile: int, budget: int) -> int:
    """Returns the rows that go through all tiles together."""
    most = max(1, budget // (4 * padded(tile)))
    return _ceil_divide(count, _ceil_divide(count, most))


def padded(columns: int) -> int:
    """Returns the columns of a row of the workspace.

    Its rows start at multiples of 16 bytes in either type, as cuBLAS likes them.
    """
    return -(-columns // 8) * 8


def chunk_rows(count: int, width: int, vocabulary: int, budget: int, processors: int) -> int:
    """Returns the rows of a chunk.

    They are one full wave of 128 x 256 tiles in the second product if the budget allows. Chunks are equal and multiples
    of 128, because a ragged last chunk would waste most of a wave.
    """
    wave = _ceil_divide(processors * 128 * 256, width)
    most = max(1, budget // (4 * padded(vocabulary)))
    largest = max(1, min(max(512, wave), 4096, most))
    if count <= largest:
        return count
    even = _ceil_divide(count, _ceil_divide(count, largest))
    rounded = _ceil_divide(even, 128) * 128
    return rounded if rounded <= most else even


def _ceil_divide(a: int, b: int) -> int:
    return -(-a // b)


# ------------------------------------------------------------------ bytes


def workspace_bytes(
    head: HeadShape,
    count: int,
    dtype: torch.dtype,
    path: PathName,
    device: torch.device,
    capped: bool = False,
) -> int:
    """Returns the most bytes that the forward takes beside the gradient of its ``count`` positions, [count, width].

    dtype: the type of the hidden states. capped: whether there is a softcap. The figure holds for a frozen head,
    without label smoothing or bias.
    """
    if path == "torch":
        return _of_torch(head, count, dtype, device, capped)
    tile = vocabulary_tile(head, False, None, WORKSPACE_BYTES)
    return _of_rows(head, count, dtype) if tile is None else _of_tiles(head, count, dtype, tile)


def backward_bytes(head: HeadShape, count: int) -> int:
    """Returns the most bytes that the backward takes beside the gradient of all hidden states.

    Only a head with trained rows takes any.
    """
    if not head.trained_rows:
        return 0
    # The hidden states, the targets' rows of the head and their product, in float32; the values and their gradient.
    rows = min(count, PATCHED_ROWS)
    return 4 * rows * (3 * head.width + 8 * head.trained_rows) + 3 * 4 * head.trained_rows * head.width


def _of_torch(head: HeadShape, count: int, dtype: torch.dtype, device: torch.device, capped: bool) -> int:
    """Returns the bytes that the path in plain torch takes."""
    product = compute_dtype(dtype, head.dtype, device)
    wide = torch.promote_types(product, torch.float32)
    step, tile = block_rows(count, head.width, product), block_shape(head.width, product)[1]
    # A tile of logits, in bfloat16 a second time; with a softcap its slope, and what that is made of.
    logits = step * tile * (product.itemsize + (wide.itemsize if product != wide else 0))
    logits += 2 * step * tile * wide.itemsize if capped else 0
    # The supervised rows, gathered; their sums, where those are not the result; the second product of a block.
    rows = count * head.width * (product.itemsize + (wide.itemsize if dtype != wide else 0))
    rows += min(step, count) * head.width * product.itemsize if product != wide else 0
    # Each row has its label, order and column, its start and slope, five running values and three results.
    vectors = count * (24 + product.itemsize + 8 + 7 * wide.itemsize + 1)
    return logits + rows + vectors + _copied_head(head, tile, product)


def _of_rows(head: HeadShape, count: int, dtype: torch.dtype) -> int:
    """Returns the bytes that whole rows of logits take on a GPU.

    They are the logits of a chunk, its hidden states and those of the chunk before, the head where it is no dense
    matrix, and three results of every row.
    """
    rows = min(count, max(1, WORKSPACE_BYTES // (4 * padded(head.vocabulary))), 4096)
    gathered = rows * head.width * dtype.itemsize * (1 if rows == count else 2)
    return rows * 4 * padded(head.vocabulary) + gathered + 9 * count + _copied_head(head, head.vocabulary, dtype)


def _of_tiles(head: HeadShape, count: int, dtype: torch.dtype, tile: int) -> int:
    """Returns the bytes that tiles of the vocabulary take on a GPU.

    A group has its hidden states, its targets' rows of the head, its sums in float32 and some values of each row.
    Before, to find the targets' logits, three matrices in float32 stand in the place of logits and sums. Every row has
    three results.
    """
    rows = group_rows(count, tile, WORKSPACE_BYTES)
    logits = 4 * padded(tile) + 4 * head.width
    begin = 12 * head.width if dtype != torch.float32 else 4 * head.width
    scales = _scales(head)
    held = rows * (2 * head.width * dtype.itemsize + 76) + 9 * count + scales
    return held + max(rows * logits + _copied_head(head, tile, dtype) - scales, rows * begin)


def _copied_head(head: HeadShape, tile: int, dtype: torch.dtype) -> int:
    """Returns the bytes of a tile of the head where it is no view.

    It is a copy where the head is in 4 bits, in another type, or has trained rows in the tile.
    """
    if head.whole and head.dtype == dtype:
        return 0
    values = min(tile, head.vocabulary) * head.width
    # A tile in 4 bits is dequantised to its own type first.
    first = head.dtype.itemsize if head.in_4bit and head.dtype != dtype else 0
    return values * (first + dtype.itemsize) + _scales(head)


def _scales(head: HeadShape) -> int:
    """Returns the bytes of the scales of a head in 4 bits, in float32."""
    return head.vocabulary * head.width // NF4_BLOCK * 4 if head.in_4bit else 0
