"""The Triton kernels of `triton_bitmask`; importing this file needs Triton.

A program works on blocks of `ROWS` rows by `TILE` columns of M. Each lane of a warp takes one
byte of the mask, 8 elements of a row, so a warp takes the `TILE` elements of one row at a time:
their mask is one coalesced read, a prefix sum over the warp says where each lane's values begin,
and the values that the warp reads next to each other lie next to each other. Rows of a block do
not depend on one another, so that several reads are under way at once.

Where the values of each row begin in each tile is in `starts` ``(rows, ceil(columns / TILE))``.
No value is read beyond the last, whatever a damaged mask says.

For every 8 elements a lane loads 1 or 2 bytes of the mask, takes 5 steps of the prefix sum, and
loads 8 values, each only where its bit is set. On sm_90 that is about 17 instructions for each
element (counted in the machine code, not measured), no barrier, and no shared memory for one token.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROWS = tl.constexpr(16)  # four rows in flight for each of four warps; the least K of tl.dot
TILE = tl.constexpr(256)  # a byte of the mask for each lane of a warp
TOKENS = tl.constexpr(16)  # tokens of one call at most; the least M of tl.dot


@triton.jit
def _mask_bits(mask, row, tile, rows, columns):
    """The mask of the rows from `row` on in a tile, 8 elements each: ``(ROWS, TILE / 8)``."""
    # Only the place where the block begins takes 64 bits.
    begin = row.to(tl.int64) * columns + tile * TILE
    step, element = tl.arange(0, ROWS)[:, None], 8 * tl.arange(0, TILE // 8)[None, :]
    left = tl.minimum(columns - tile * TILE - element, 8)  # elements of the row, from here on
    inside = (row + step < rows) & (left > 0)
    bit = step * columns + element + (begin & 7).to(tl.int32)
    byte, shift = mask + (begin >> 3) + (bit >> 3), bit & 7
    low = tl.load(byte, mask=inside, other=0).to(tl.int32)
    # Rows begin anywhere in a byte; the next one is read only where the row goes on in it.
    high = tl.load(byte + 1, mask=inside & (shift + left > 8), other=0).to(tl.int32)
    return ((low | (high << 8)) >> shift) & ((1 << tl.maximum(left, 0)) - 1)


@triton.jit
def _tile_places(row, tile, rows, columns):
    """Where the rows from `row` on stand in a table ``(rows, tiles)``, and which there are."""
    tiles = tl.cdiv(columns, TILE)
    step = tl.arange(0, ROWS)
    return row.to(tl.int64) * tiles + tile + step * tiles, row + step < rows


@triton.jit
def _counts(bits):
    """Byte i of the result: how many of the bits 0 to i are set, of 4 bits."""
    spread = (bits * 0x00204081) & 0x01010101  # bit i in byte i
    return spread * 0x01010101


@triton.jit
def _value(place, bits, counts, i: tl.constexpr):
    """Element i of four whose values begin at `place`: a value, or 0."""
    if i > 0:
        place += (counts >> (8 * i - 8)) & 0xFF
    return tl.load(place, mask=(bits & (1 << i)) != 0, other=0.0)


@triton.jit
def _block(values, mask, starts, row, tile, rows, columns, nnz):
    """M at the rows from `row` on and the columns of a tile, ``(ROWS, TILE)``, zero outside."""
    place, there = _tile_places(row, tile, rows, columns)
    first = tl.load(starts + place, mask=there, other=0)
    bits = _mask_bits(mask, row, tile, rows, columns)
    a, b = bits & 15, bits >> 4
    a_counts, b_counts = _counts(a), _counts(b)
    size = (a_counts >> 24) + (b_counts >> 24)
    end = first[:, None] + tl.cumsum(size, axis=1)
    a, b = tl.where(end <= nnz, a, 0), tl.where(end <= nnz, b, 0)
    at_a = values + (end - size)
    at_b = at_a + (a_counts >> 24)
    even_a = tl.join(_value(at_a, a, a_counts, 0), _value(at_b, b, b_counts, 0))
    even_b = tl.join(_value(at_a, a, a_counts, 2), _value(at_b, b, b_counts, 2))
    odd_a = tl.join(_value(at_a, a, a_counts, 1), _value(at_b, b, b_counts, 1))
    odd_b = tl.join(_value(at_a, a, a_counts, 3), _value(at_b, b, b_counts, 3))
    # Each join adds a last axis: bits 2, 1 and 0 of an element's place, in this order.
    joined = tl.join(tl.join(even_a, even_b), tl.join(odd_a, odd_b))
    return tl.reshape(joined, (ROWS, TILE))


@triton.jit
def count(mask, counts, rows, columns):
    """counts ``(rows, tiles)`` = number of values of each row in each tile."""
    tiles = tl.cdiv(columns, TILE)
    tile = tl.program_id(0) % tiles
    row = tl.program_id(0) // tiles * ROWS
    bits = _mask_bits(mask, row, tile, rows, columns)
    size = (_counts(bits & 15) >> 24) + (_counts(bits >> 4) >> 24)
    place, there = _tile_places(row, tile, rows, columns)
    tl.store(counts + place, tl.sum(size, axis=1), mask=there)


@triton.jit
def expand(values, mask, starts, out, rows, columns, nnz):
    """out ``(rows, columns)`` = M."""
    tiles = tl.cdiv(columns, TILE)
    tile = tl.program_id(0) % tiles
    row = tl.program_id(0) // tiles * ROWS
    M = _block(values, mask, starts, row, tile, rows, columns, nnz)
    step, column = tl.arange(0, ROWS)[:, None], tile * TILE + tl.arange(0, TILE)[None, :]
    place = out + row.to(tl.int64) * columns + (step * columns + column)
    tl.store(place, M, mask=(row + step < rows) & (column < columns))


@triton.jit
def apply(
    x,
    values,
    mask,
    starts,
    sums,
    tokens,
    rows,
    columns,
    nnz,
    blocks_each,
    TRANSPOSED: tl.constexpr,
    ONE_TOKEN: tl.constexpr,
):
    """sums ``(splits, tokens, columns)``: over split, ``x @ M`` for x ``(tokens, rows)``.

    With TRANSPOSED sums is ``(splits, tokens, rows)``, for ``x @ M.T``, x ``(tokens, columns)``.
    Program (i, s) adds up `blocks_each` blocks: the s-th lot of tile i, or of rows i.
    """
    i, split = tl.program_id(0), tl.program_id(1)
    blocks = tl.cdiv(columns, TILE) if TRANSPOSED else tl.cdiv(rows, ROWS)
    read, written = (columns, rows) if TRANSPOSED else (rows, columns)
    token = tl.arange(0, TOKENS)
    if ONE_TOKEN:
        total = tl.zeros((ROWS, TILE), tl.float32)
    else:
        total = tl.zeros((TOKENS, ROWS if TRANSPOSED else TILE), tl.float32)
    first = split * blocks_each
    for step in range(tl.minimum(blocks_each, blocks - first)):
        block = first + step
        row, tile = (i * ROWS, block) if TRANSPOSED else (block * ROWS, i)
        M = _block(values, mask, starts, row, tile, rows, columns, nnz)
        k = tile * TILE + tl.arange(0, TILE) if TRANSPOSED else row + tl.arange(0, ROWS)
        if ONE_TOKEN:
            part = tl.load(x + k, mask=k < read, other=0.0).to(tl.float32)
            total += M.to(tl.float32) * tl.expand_dims(part, 0 if TRANSPOSED else 1)
        else:
            inside = (token < tokens)[:, None] & (k < read)[None, :]
            part = tl.load(x + token[:, None] * read + k[None, :], mask=inside, other=0.0)
            if TRANSPOSED:
                M = tl.trans(M)
            total = tl.dot(part, M, total)
    WIDTH: tl.constexpr = ROWS if TRANSPOSED else TILE
    n = i * WIDTH + tl.arange(0, WIDTH)
    out = sums + split.to(tl.int64) * tokens * written
    if ONE_TOKEN:
        total = tl.sum(total, axis=1 if TRANSPOSED else 0)
        tl.store(out + n, total, mask=n < written)
    else:
        inside = (token < tokens)[:, None] & (n < written)[None, :]
        tl.store(out + token[:, None] * written + n[None, :], total, mask=inside)


@triton.jit
def add(sums, out, splits, size):
    """out ``(size,)`` = the sum of sums ``(splits, size)``, in the order of the splits."""
    n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    total = tl.zeros((TILE,), tl.float32)
    place = sums + n
    for _ in range(splits):
        total += tl.load(place, mask=n < size, other=0.0)
        place += size
    tl.store(out + n, total, mask=n < size)
