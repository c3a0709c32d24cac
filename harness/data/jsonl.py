"""Files of JSON lines, plain or gzipped: read in blocks of whole lines, and decoded while the next block is read.

In: a path and what to do with a block. Out: results in order of the file. This process reads and decompresses; other processes decode
what they can take, and this one the rest. Memory is a few blocks, whatever the file's size.

Decoding is quick and strict: a block in which a wanted field has another type, a line is not one object, or anything looks odd is not
decoded but handed back, and ``records`` goes through it line by line with the standard library, which decides and names the line.
So what is accepted does not depend on the quick decoder (but for brackets nested a thousand deep, where the library gives up).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
import numpy as np
import pyarrow as pa
from isal import isal_zlib

from harness.data.decoder_process import DecoderProcess, Pending
from harness.data.source import DataError

T = TypeVar("T")
Decode = Callable[[memoryview, np.ndarray], T]
"""Makes something of a block, given the places of its line ends; raises Refused where it cannot say what the block holds."""
GzipError: Any = isal_zlib.error  # a class, whatever its stub says
BLOCK = 4 << 20
"""Bytes of a block, about."""
LONGEST = 1 << 28
"""Bytes of a line. The longest of the release are below a megabyte; a file without line ends is not read into memory."""
PROCESSES = 3
"""That decode beside this one, at most: more would wait for the decompression."""
LARGE = 48 << 20
"""Bytes of text from which on they are started."""
GZIPPED = 4
"""What a byte of a gzipped file counts for."""
SMALL = 64 << 10
"""Bytes of a block that is not worth handing over."""
AHEAD = 16
"""Blocks that wait to be decoded or taken."""
BOM = b"\xef\xbb\xbf"
NEWLINE, RETURN, OPEN, CLOSE = (ord(c) for c in "\n\r{}")


class Damaged(Exception):
    """The stream ends or breaks where it should not."""


# ------------------------------------------------------------------------------------------------------------- reading


def blocks(path: Path) -> Iterator[memoryview]:
    """The file, decompressed, in blocks that end with a line end; a byte order mark at its start is left out.

    Raises Damaged after the last whole line of a damaged gzip file.
    """
    parts: list[bytes | memoryview] = []  # the line that the last chunk broke off
    length = 0
    start = True
    try:
        for chunk in _gunzip(path) if path.suffix == ".gz" else _plain(path):
            if start:
                chunk, start = chunk.removeprefix(BOM), False
            view, begin = memoryview(chunk), 0
            if parts:
                begin = chunk.find(b"\n") + 1
                parts.append(view[:begin] if begin else view)
                length += len(parts[-1])
                if length > LONGEST:
                    raise Damaged(f"a line is longer than {LONGEST >> 20} MB: this is not a file of JSON lines")
                if not begin:
                    continue
                yield memoryview(b"".join(parts))  # one line by itself: joined to its block, all of it would be copied
                parts, length = [], 0
            end = chunk.rfind(b"\n") + 1
            if end > begin:
                yield view[begin:end]
            if max(begin, end) < len(chunk):
                parts = [view[max(begin, end) :]]
                length = len(parts[0])
    except GzipError as error:
        raise Damaged(f"the gzip file is truncated or damaged ({error})") from None
    if parts:
        yield memoryview(b"".join((*parts, b"\n")))


def _plain(path: Path) -> Iterator[bytes]:
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(BLOCK):
            yield chunk


def _gunzip(path: Path) -> Iterator[bytes]:
    """Chunks of at most BLOCK bytes. Members that follow each other are one stream; zero bytes after the last are padding."""
    with open(path, "rb", buffering=0) as file:
        member, data = None, b""
        while data or (data := file.read(BLOCK // 4)):
            if member is None:
                data = data.lstrip(b"\0")
                if not data:
                    continue
                member = isal_zlib.decompressobj(31)
            if chunk := member.decompress(data, BLOCK):
                yield chunk
            data = member.unused_data if member.eof else member.unconsumed_tail
            if member.eof:
                member = None
            elif not data and len(chunk) == BLOCK:  # there may be more inside that did not fit
                while chunk := member.decompress(b"", BLOCK):
                    yield chunk
        if member is not None:
            raise GzipError("it ends in the middle of the stream")


# ------------------------------------------------------------------------------------------------------------ decoding


def decoded(path: Path, make: Callable[..., Decode[T]], *args: Any) -> Iterator[tuple[int, memoryview, T | None]]:
    """(number of its first line, block, what the decoder makes of it) for each block, in order of the file.

    ``make(*args)`` gives the decoder, which gets a block and the places of its line ends; for a large file it is also called in other
    processes, so it stands in a module and ``args`` can be pickled. None instead of a result: the decoder refused, or not every line
    looks like one object in UTF-8; go through ``records`` then. Raises DataError for an empty and for a damaged file.
    """
    work = _worker(make, args)
    waiting: deque[tuple[memoryview, _Done[T] | Pending[tuple[int, T | None]]]] = deque()
    line = 1
    damage: Damaged | None = None
    with contextlib.ExitStack() as stack:
        others: list[DecoderProcess[tuple[int, T | None]]] = []
        for _ in range(_processes(path)):
            with contextlib.suppress(OSError):  # no memory or no process to be had: what is here decodes all
                others.append(stack.enter_context(DecoderProcess(_worker, make, args)))
        reader = blocks(path)
        more = True
        while more or waiting:
            try:
                if more:
                    block = next(reader)
                    here = functools.partial(work, block)
                    other = next((one for one in others if len(block) >= SMALL and one.takes(block)), None)
                    waiting.append((block, other.submit(block, here) if other else _Done(here())))
            except StopIteration:
                more = False
            except Damaged as error:
                more, damage = False, error
            while waiting and (not more or len(waiting) > AHEAD or waiting[0][1].ready()):
                block, found = waiting.popleft()
                count, result = found.result()
                yield line, block, result
                line += count
    if damage:
        raise DataError(f"{path} after line {line - 1}: {damage}; fetch it again")
    if line == 1:
        raise DataError(f"{path} is empty; fetch it again")


def _processes(path: Path) -> int:
    """How many processes decode beside this one: none for a file that is done before they have started."""
    large = path.stat().st_size * (GZIPPED if path.suffix == ".gz" else 1) >= LARGE
    return min(len(os.sched_getaffinity(0)) - 1 if hasattr(os, "sched_getaffinity") else 1, PROCESSES) if large else 0


def _worker(make: Callable[..., Decode[T]], args: tuple[Any, ...]) -> Callable[[memoryview], tuple[int, T | None]]:
    _keep_freed_memory()
    decode = make(*args)

    def work(block: memoryview) -> tuple[int, T | None]:
        """How many lines the block has, and what the decoder makes of them."""
        ends = np.flatnonzero(np.frombuffer(block, np.uint8) == NEWLINE)
        if not _plausible(block, ends):
            return len(ends), None
        try:
            return len(ends), decode(block, ends)
        except (Refused, RecursionError):
            return len(ends), None

    return work


class _Done(Generic[T]):
    """What was decoded here, beside what is ``Pending``."""

    def __init__(self, found: tuple[int, T | None]):
        self._found = found

    def ready(self) -> bool:
        return True

    def result(self) -> tuple[int, T | None]:
        return self._found


@functools.cache
def _keep_freed_memory() -> None:
    """Tell glibc to use the memory of a block again. By itself it gives it back and asks for new: half a million page faults for 2 GB, a
    sixth of the time. Another C library does as it likes."""
    trim_threshold, mmap_threshold = -1, -3
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  # elsewhere these numbers may mean something else
        libc.mallopt(trim_threshold, 256 << 20)
        libc.mallopt(mmap_threshold, 64 << 20)


class Refused(Exception):
    """A decoder cannot say what a block holds."""


def _plausible(block: memoryview, ends: np.ndarray) -> bool:
    """Whether every line begins with { and ends with }, and all is UTF-8.

    In valid JSON no line end can then stand inside an object: between } and { there must be a comma or a bracket. So n objects in n
    such lines are one a line, which the decoders, for which a line end is white space, do not see. Nor do they look into strings that
    nobody wants, hence UTF-8 here; for control characters and escapes they do.
    """
    data = np.frombuffer(block, np.uint8)
    last = data[ends - 1]  # of an empty first line: the block's last byte, a line end
    last = np.where(last == RETURN, data[ends - 2], last)
    if data[0] != OPEN or not (last == CLOSE).all() or not (data[ends[:-1] + 1] == OPEN).all():
        return False
    if data.max() < 128:
        return True
    whole = pa.Array.from_buffers(pa.large_binary(), 1, [None, pa.py_buffer(np.array([0, len(block)])), pa.py_buffer(block)])
    try:
        whole.cast(pa.large_string())
    except pa.ArrowInvalid:
        return False
    return True


def columns(schema: pa.Schema) -> Callable[[memoryview, np.ndarray], list[pa.Array]]:
    """A decoder for ``decoded``: columns of these fields (string, int64), null where a line has none. Others are not looked at."""
    kinds = {pa.string(): str, pa.int64(): int}
    row = msgspec.defstruct("Row", [(field.name, kinds[field.type] | None, None) for field in schema], gc=False)
    decoder = msgspec.json.Decoder(row)

    def decode(block: memoryview, ends: np.ndarray) -> list[pa.Array]:
        try:
            rows = decoder.decode_lines(block)
            if len(rows) != len(ends):
                raise Refused
            return [pa.array([getattr(row, name) for row in rows], kind) for name, kind in zip(schema.names, schema.types, strict=True)]
        except (msgspec.DecodeError, UnicodeError, OverflowError, RecursionError, pa.ArrowException):
            raise Refused from None

    return decode


def loader(fields: tuple[str, ...]) -> Callable[[memoryview], dict[str, Any]]:
    """What makes a dictionary of one line in a block that ``columns`` has decoded; it may leave out other fields."""
    decoder = msgspec.json.Decoder(msgspec.defstruct("Record", [(name, Any, None) for name in fields]))

    def load(line: memoryview) -> dict[str, Any]:
        record = decoder.decode(line)
        return {name: getattr(record, name) for name in fields}

    return load


# -------------------------------------------------------------------------------------------------------- line by line


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered JSON objects of a file. A broken line, other bytes and a truncated gzip name their line."""
    done = 0
    try:
        for block in blocks(path):
            first = done + 1
            for done, record in records(path, first, block):
                yield done, record
    except Damaged as error:
        raise DataError(f"{path} after line {done}: {error}; fetch it again") from None
    if not done:
        raise DataError(f"{path} is empty; fetch it again")


def records(path: Path, first: int, block: memoryview) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a block whose first line has this number. Raises DataError for a line that is none."""
    for line, raw in enumerate(bytes(block[:-1]).split(b"\n"), first):
        try:
            record = json.loads(raw.decode())
        except UnicodeDecodeError as error:
            raise DataError(f"{path} line {line}: not UTF-8 ({error.reason}); fetch the file again") from None
        except json.JSONDecodeError as error:
            raise DataError(f"{path} line {line}: broken JSON ({error.msg}); fetch the file again") from None
        except RecursionError:
            raise DataError(f"{path} line {line}: broken JSON (nested too deeply); fetch the file again") from None
        if not isinstance(record, dict):
            raise DataError(f"{path} line {line}: not a JSON object")
        yield line, record
