"""Values out of a checkpoint's safetensors parts by byte range: each part's header and what is wanted, no more.

The format (https://github.com/huggingface/safetensors#format) is a header's length in 8 bytes, the header as JSON
with each tensor's place in the values, the values; so elements of a flat tensor are one range of bytes. No local
copy is made, and at most _AHEAD requests are on their way.
"""

from __future__ import annotations

import functools
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, TypeVar

import torch

from arvideo_dist.storage import Storage, patiently
from arvideo_dist.train.health.activity import activity

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD = 8
_REQUEST_BYTES = 32 * 2**20
# A request costs tens of milliseconds; what lies between two wanted ranges costs less to read if it is short.
_HOLE_BYTES = 64 * 2**10
_FIRST_BYTES = 8 * 2**10  # of a part: with some tens of ranks they hold its whole header


class Slice(NamedTuple):
    """Elements of the flat tensor `name` of member `part`, from element `start`, that belong into flat `target`."""

    part: str
    name: str
    start: int
    target: torch.Tensor


@dataclass
class _Request:
    """Bytes [begin, end) of `part`, and which of them go where."""

    part: str
    begin: int
    end: int
    pieces: list[tuple[int, torch.Tensor]]  # first byte, target


def read_slices(run: Storage, slices: Iterable[Slice]) -> None:
    """Fill the targets of `slices` from members of `run`.

    Digests are of whole parts and are not compared here. Raises OSError if the store fails for long, or gives
    less than its parts hold.
    """
    by_part: dict[str, list[Slice]] = {}
    for each in slices:
        by_part.setdefault(each.part, []).append(each)
    with ThreadPoolExecutor(_AHEAD, thread_name_prefix="read") as threads:
        headers = _ahead(threads, functools.partial(_read_header, run), by_part)
        requests = [r for part, header in headers for r in _requests(header, by_part[part])]
        for request, content in _ahead(threads, functools.partial(_read, run), requests):
            for begin, target in request.pieces:
                wanted = target.view(torch.uint8)  # whatever its type, which the caller has compared
                values = torch.frombuffer(
                    content, dtype=torch.uint8, count=wanted.numel(), offset=begin - request.begin
                )
                wanted.copy_(values)


def _ahead(
    threads: ThreadPoolExecutor, read: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[tuple[Item, Result]]:
    """Each item with what `read` gives for it, in order; reads run ahead, but not so far as to fill the memory."""
    left = iter(items)
    running = deque((item, threads.submit(read, item)) for item in islice(left, _AHEAD))
    while running:
        item, future = running.popleft()
        result = future.result()
        activity.tick()
        running.extend((further, threads.submit(read, further)) for further in islice(left, 1))
        yield item, result


def _read_header(run: Storage, part: str) -> dict[str, int]:
    """Where in `part` each tensor's first byte stands."""
    first = patiently(lambda: run.read_range(part, 0, _FIRST_BYTES))
    size, content = int.from_bytes(first[:8], "little"), first[8:]
    if size > len(content):
        content += _read_range(run, part, 8 + len(content), size - len(content))
    header = json.loads(content[:size])
    return {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items()}


def _read(run: Storage, request: _Request) -> bytearray:
    # torch.frombuffer wants memory that may be written.
    return bytearray(_read_range(run, request.part, request.begin, request.end - request.begin))


def _read_range(run: Storage, part: str, begin: int, size: int) -> bytes:
    def read() -> bytes:
        content = run.read_range(part, begin, size)
        if len(content) != size:
            raise OSError(f"{run.uri}/{part}: {len(content)} of {size} bytes at {begin}")
        return content

    return patiently(read)


def _requests(header: dict[str, int], slices: list[Slice]) -> list[_Request]:
    """The fewest requests for `slices` of one part that are not too large and bridge no long hole."""
    found: list[_Request] = []
    for first, each in sorted(
        ((header[s.name] + s.target.element_size() * s.start, s) for s in slices),
        key=lambda placed: placed[0],
    ):
        item_bytes = each.target.element_size()
        for number, target in enumerate(each.target.split(_REQUEST_BYTES // item_bytes)):
            begin = first + number * _REQUEST_BYTES
            end = begin + item_bytes * target.numel()
            last = found[-1] if found else None
            if last and begin - last.end <= _HOLE_BYTES and end - last.begin <= _REQUEST_BYTES:
                last.end = end
                last.pieces.append((begin, target))
            else:
                found.append(_Request(each.part, begin, end, [(begin, target)]))
    return found
