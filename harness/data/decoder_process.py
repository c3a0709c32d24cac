"""A process beside this one that decodes blocks: within one process the interpreter's lock lets only one decode at a time.

In: what makes the decoder, and blocks of bytes. Out: what it makes of each. Blocks and results lie in memory that both processes have
mapped, so that neither waits for the other to empty a pipe. The child is started by its module's name, not forked and not by
multiprocessing: libraries have threads by then, and the caller's script may have no ``if __name__ == "__main__"``. It ends when this
process does, however that ends; if it dies itself, its blocks are decoded here.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from typing import Any, Generic, TypeVar

T = TypeVar("T")
SLOT = 4 << 20
"""Bytes of a block, and of a result, at most; longer results go through the pipe."""
SLOTS = 3
"""Blocks in the child's hands: one in work, and enough for it not to wait while this process decodes one itself."""
PATIENCE_S = 5.0
"""For a child that has nothing to do to end by itself."""


class Pending(Generic[T]):
    """A block in the child's hands; ``decode`` makes its result here, should the child be gone."""

    def __init__(self, process: DecoderProcess[T], decode: Callable[[], T]):
        self._process, self._decode = process, decode
        self._result: list[T] = []

    def ready(self) -> bool:
        self._process.collect()
        return bool(self._result) or self._process.gone

    def result(self) -> T:
        """The result; waits for it."""
        while not self._result and not self._process.gone:
            self._process.collect(wait=True)
        return self._result[0] if self._result else self._decode()

    def set(self, result: T) -> None:
        self._result.append(result)


class DecoderProcess(Generic[T]):
    """``make(*args)``, called in the child, gives the decoder; both must be picklable, ``make`` by its name in a module."""

    def __init__(self, make: Callable[..., Callable[[memoryview], T]], *args: Any):
        self.gone = False
        self._started = False
        self._pending: deque[tuple[int, Pending[T]]] = deque()
        self._free = list(range(SLOTS))
        start = pickle.dumps((make, args))
        descriptor = _anonymous(SLOT * SLOTS)
        try:
            self._memory = mmap.mmap(descriptor, SLOT * SLOTS)
            self._pipe, theirs = Pipe()
            with theirs:
                self._child = subprocess.Popen(
                    [sys.executable, "-P", "-m", __name__, str(theirs.fileno()), str(descriptor)],
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},  # what this process imports, and in no other order
                    pass_fds=(theirs.fileno(), descriptor),
                    stdin=subprocess.DEVNULL,
                )
        finally:
            os.close(descriptor)
        self._send(start)

    def __enter__(self) -> DecoderProcess[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        try:
            self._child.wait(0 if self._pending else PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._memory.close()

    def takes(self, block: memoryview) -> bool:
        """Whether ``submit`` can take this block now: not while the child starts, which takes as long as twenty blocks."""
        self.collect()
        return self._started and bool(self._free) and not self.gone and len(block) <= SLOT

    def submit(self, block: memoryview, decode: Callable[[], T]) -> Pending[T]:
        slot = self._free.pop()
        pending = Pending(self, decode)
        self._pending.append((slot, pending))
        self._memory[slot * SLOT : slot * SLOT + len(block)] = block
        self._send((slot, len(block)))
        return pending

    def collect(self, *, wait: bool = False) -> None:
        """Takes the results that are there; with ``wait`` at least one, or the word that the child has started."""
        try:
            while wait or self._pipe.poll():
                size, answer = self._pipe.recv()
                wait = False
                if not self._started:
                    self._started = True
                    continue
                slot, pending = self._pending.popleft()
                pending.set(answer if size is None else pickle.loads(self._memory[slot * SLOT : slot * SLOT + size]))
                self._free.append(slot)
        except (EOFError, OSError):
            self.gone = True

    def _send(self, message: Any) -> None:
        try:
            self._pipe.send(message)
        except OSError:
            self.gone = True


def _anonymous(size: int) -> int:
    """A file descriptor of memory that has no name and is gone with the last process that holds it."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("decoder blocks")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor


def serve(pipe: Connection, descriptor: int) -> None:
    """The child's side, until the other side closes the pipe."""
    memory = mmap.mmap(descriptor, SLOT * SLOTS)
    with contextlib.suppress(EOFError, ConnectionError):
        make, args = pickle.loads(pipe.recv())
        decode = make(*args)
        pipe.send((None, None))  # ready
        while True:
            slot, size = pipe.recv()
            start = slot * SLOT
            with memoryview(memory) as whole, whole[start : start + size] as block:
                result = decode(block)
            packed = pickle.dumps(result, pickle.HIGHEST_PROTOCOL)
            if len(packed) > SLOT:
                pipe.send((None, result))
            else:
                memory[start : start + len(packed)] = packed
                pipe.send((len(packed), None))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the process that reads the file decides
    from harness.data import decoder_process  # by its own name, as what it is sent says

    decoder_process.serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
    os._exit(0)  # taking libraries down takes them a third of a second
