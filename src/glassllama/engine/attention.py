"""Attention of a step: positions, the cache, and what every head sees.

Queries that look at the same keys do so together: those of the heads that share a key/value head,
and those of up to eight tokens next to each other in a row (a tile). Each query's own sums are
taken in the same order in any company.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from glassllama.engine.attention_kernels import (
    begin,
    finish,
    item_bytes,
    merge,
    mix,
    place,
    score,
    store,
    unpack,
    weigh,
    worth_unpacking,
)
from glassllama.engine.compiled import compiled, inlined
from glassllama.engine.intrinsics import integers64
from glassllama.engine.kv_pages import FLOAT32, PAGE
from glassllama.engine.layer_ops import convert, field, inputs_of, row, told
from glassllama.engine.thread_pool import complete, take
from glassllama.engine.workspace import GROUPS, LANES, MATRICES, POSITION, ROW, WK, WQ

SPAN = 4 * PAGE  # tokens of one item of attention: long contexts are shared between threads


class Places(NamedTuple):
    """Bytes from a page's start."""

    keys: int
    values: int
    scales: int


class Seat(NamedTuple):
    """Where one thread keeps what it looks at: addresses."""

    queries: int  # of a tile
    scores: int
    opened: int  # a page's keys, then its values, unpacked


@compiled
def page_offsets(room: Any, layer: int, kv_head: int, kind: int) -> Any:
    """Bytes from a page's start to the keys, the values and the scales of a layer and kv head."""
    heads, head = room.layers * room.kv_heads, layer * room.kv_heads + kv_head
    size = room.head_dim * PAGE * item_bytes(kind)
    return Places(head * size, (heads + head) * size, 2 * heads * size + head * 2 * PAGE * 4)


@compiled
def row_pages(room: Any, step: Any, t: int) -> Any:
    """Addresses of the pages of a token's row."""
    batch_row = told(room, t)[ROW]
    return integers64(step.table + batch_row * step.pages * 8, step.pages)


@compiled
def position_of(room: Any, t: int) -> Any:
    return told(room, t)[POSITION]


@compiled
def place_heads(room: Any, layer: int, step: Any, t: int, kv_head: int) -> None:
    """Turn a token's key of one kv head, and the queries that look at it, by the token's position;
    key and value go into the cache."""
    width, group, m = room.head_dim, room.group_size, layer * MATRICES
    cos, sin = row(room.cos, t, width // 2), row(room.sin, t, width // 2)
    queries = room.qkv + t * room.qkv_width * 4
    for head in range(kv_head * group, (kv_head + 1) * group):
        place(row(queries, head, width), cos, sin, room.pairs, room.qk_norm, room.eps)
    first_key = queries + field(room, m + WQ, GROUPS) * LANES * 4
    first_value = first_key + field(room, m + WK, GROUPS) * LANES * 4
    key, value = row(first_key, kv_head, width), row(first_value, kv_head, width)
    place(key, cos, sin, room.pairs, room.qk_norm, room.eps)
    position = position_of(room, t)
    page, slot = row_pages(room, step, t)[position // PAGE], position % PAGE
    at = page_offsets(room, layer, kv_head, step.kind)
    store(key, value, page + at.keys, page + at.values, page + at.scales, slot, step.kind)


@inlined
def spans_shared(room: Any, step: Any) -> Any:
    """Whether spans are items of their own: for one token that looks at several."""
    return step.tokens == 1 and step.spans > 1


@compiled
def place_all(me: Any, phase: int, room: Any, layer: int, step: Any) -> None:
    """`place_heads` for all tokens and kv heads; a token alone is placed by who looks at it."""
    if step.tokens == 1 and not spans_shared(room, step):
        return
    first, last = take(me, phase, step.tokens, 1)
    mine = 0
    while first < last:
        for t in range(first, last):
            for kv_head in range(room.kv_heads):
                place_heads(room, layer, step, t, kv_head)
        mine += last - first
        first, last = take(me, phase, step.tokens, 1)
    complete(me, phase, step.tokens, mine)


@inlined
def look_at_page(room: Any, seat: Any, page: int, ahead: int, past: int, t: int, count: int,
                 part: int, at: Any, kind: int) -> None:  # fmt: skip
    """A tile's queries look at one page, which `past` tokens come before.

    The page that is `ahead` bytes away comes next, and is asked for.
    """
    group, width, scores = room.group_size, room.head_dim, seat.scores
    keys, values, form = page + at.keys, page + at.values, kind
    apart = worth_unpacking(count * group, width, kind)
    if apart:
        unpack(keys, width * PAGE, seat.opened, ahead, kind)
        keys, values, form = seat.opened, seat.opened, FLOAT32
    score(seat.queries, count * group, keys, width, scores, ahead, form)
    for n in range(count):
        visible = min(PAGE, position_of(room, t + n) + 1 - past)
        for g in range(n * group, (n + 1) * group):
            seen = part + g * (width + 2) * 4
            weigh(scores + g * PAGE * 4, visible, seen, width, page + at.scales, kind)
    if apart:
        unpack(page + at.values, width * PAGE, seat.opened, ahead, kind)
    mix(scores, count * group, values, width, part, ahead, form)


@compiled
def look_at_span(
    me: Any, room: Any, layer: int, step: Any, tile: int, kv_head: int, span: int, part: int
) -> None:
    """The queries of a tile and kv head look at one span -> `part` (queries, D + 2)."""
    t = integers64(room.tile_first + tile * 8, 1)[0]
    count = integers64(room.tile_count + tile * 8, 1)[0]
    group, width, seats = room.group_size, room.head_dim, room.tile_queries
    seat = Seat(
        room.queries + me.thread * seats * width * 4,
        room.scores + me.thread * seats * PAGE * 4,
        room.opened + me.thread * width * PAGE * 4,
    )
    for n in range(count):
        own = room.qkv + (t + n) * room.qkv_width * 4
        for g in range(group):
            begin(row(own, kv_head * group + g, width), row(seat.queries, n * group + g, width),
                  row(part, n * group + g, width + 2))  # fmt: skip
    at = page_offsets(room, layer, kv_head, step.kind)
    pages, last = row_pages(room, step, t), position_of(room, t + count - 1) // PAGE
    for page in range(span * SPAN // PAGE, min((span + 1) * SPAN // PAGE - 1, last) + 1):
        ahead = pages[min(page + 1, last)] - pages[page]
        look_at_page(room, seat, pages[page], ahead, page * PAGE, t, count, part, at, step.kind)


@inlined
def look_at_row(me: Any, room: Any, layer: int, step: Any, tile: int, kv_head: int) -> None:
    """The queries of a tile and kv head look at their row, span after span -> `mixed`."""
    t = integers64(room.tile_first + tile * 8, 1)[0]
    count = integers64(room.tile_count + tile * 8, 1)[0]
    group, width, seats = room.group_size, room.head_dim, room.tile_queries
    whole = room.part + 2 * me.thread * seats * (width + 2) * 4
    part = whole + seats * (width + 2) * 4
    look_at_span(me, room, layer, step, tile, kv_head, 0, whole)
    for span in range(1, position_of(room, t + count - 1) // SPAN + 1):
        look_at_span(me, room, layer, step, tile, kv_head, span, part)
        for n in range(count):
            if span * SPAN <= position_of(room, t + n):
                for g in range(n * group, (n + 1) * group):
                    merge(row(whole, g, width + 2), row(part, g, width + 2), width)
    for n in range(count):
        out = room.mixed + (t + n) * room.heads * width * 4
        for g in range(group):
            finish(row(whole, n * group + g, width + 2), row(out, kv_head * group + g, width))


@compiled
def attend_heads(me: Any, phase: int, room: Any, layer: int, step: Any) -> None:
    """Every query head of every token looks at its row's keys up to its own position."""
    kv_heads, group = room.kv_heads, room.group_size
    spans = step.spans if spans_shared(room, step) else 1
    items = step.tiles * kv_heads * spans
    first, last = take(me, phase, items, 1)
    mine = 0
    while first < last:
        for item in range(first, last):
            tile, kv_head, span = item // (kv_heads * spans), item // spans % kv_heads, item % spans
            if spans == 1:
                if step.tokens == 1:
                    place_heads(room, layer, step, 0, kv_head)
                look_at_row(me, room, layer, step, tile, kv_head)
            else:
                part = room.parts + (span * kv_heads + kv_head) * group * (room.head_dim + 2) * 4
                look_at_span(me, room, layer, step, tile, kv_head, span, part)
        mine += last - first
        first, last = take(me, phase, items, 1)
    complete(me, phase, items, mine)


@inlined
def merge_spans(me: Any, room: Any, step: Any, out: int) -> None:
    """The spans that threads shared become what the only token's heads saw, at `out`."""
    width, heads = room.head_dim, room.heads
    whole = row(room.part, 2 * me.thread * room.tile_queries, width + 2)
    for head in range(heads):
        first = row(room.parts, head, width + 2)
        for i in range(width + 2):
            whole[i] = first[i]
        for span in range(1, step.spans):
            merge(whole, row(room.parts, span * heads + head, width + 2), width)
        finish(whole, row(out, head, width))


@compiled
def merge_token(me: Any, room: Any, step: Any, t: int, reads: int, slot: int) -> None:
    """What a token's heads saw becomes inputs."""
    inputs, width = inputs_of(room), room.heads * room.head_dim
    numbers, seen = row(inputs.numbers, slot, inputs.width), row(room.mixed, t, width)
    if spans_shared(room, step):
        merge_spans(me, room, step, inputs.numbers + slot * inputs.width * 4)
    else:
        for i in range(width):
            numbers[i] = seen[i]
    convert(reads, inputs, slot, numbers, 0, width)


@compiled
def prepare_mixed(me: Any, phase: int, room: Any, reads: int, step: Any) -> Any:
    """What the heads saw becomes inputs -> slot of the first token's: see `prepare_norms`."""
    if step.tokens == 1:
        merge_token(me, room, step, 0, reads, room.slots + me.thread)
        return room.slots + me.thread
    first, last = take(me, phase, step.tokens, 1)
    mine = 0
    while first < last:
        for t in range(first, last):
            merge_token(me, room, step, t, reads, t)
        mine += last - first
        first, last = take(me, phase, step.tokens, 1)
    complete(me, phase, step.tokens, mine)
    return 0
