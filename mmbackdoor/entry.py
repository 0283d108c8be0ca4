"""How a command starts and ends: exit codes, one sentence on stderr, and signals.

0 done, 2 wrong input, 1 a fault while running, 130 and 143 stopped by SIGINT and SIGTERM.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from mmbackdoor.config import parse
from mmbackdoor.config_schema import is_main_process
from mmbackdoor.types import InputError, RunFault

Config = TypeVar("Config")

# What gloo and NCCL say, as plain RuntimeErrors, where the other end of a connection is gone.
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo/transport", "ncclRemote")

_received: int | None = None
_loops = 0


class Terminated(SystemExit):
    """Ends the command because of a signal; its exit code is 128 + the signal's number.
    A loop that found `terminated()` true raises it after it saved its state."""

    def __init__(self, signum: int | None = None) -> None:
        self.signum = signum or _received or signal.SIGTERM
        super().__init__(128 + self.signum)


def terminated() -> bool:
    """Whether a signal asked this process to stop. A loop within `graceful()` looks at it between steps."""
    return _received is not None


@contextmanager
def graceful() -> Iterator[None]:
    """Within this block the first SIGTERM or SIGINT only makes `terminated()` true, so that a loop can save and stop.
    The second one ends the command at once, and so does leaving the block with a signal that nobody looked at."""
    global _loops
    _loops += 1
    try:
        yield
    finally:
        _loops -= 1
    if _received is not None and not _loops:
        raise Terminated


def main(config_type: type[Config], run: Callable[[Config], None], doc: str | None = None) -> None:
    """What a recipe calls: read the settings, `run` them, and exit with the code that the outcome has."""
    guarded(lambda: run(parse(config_type, doc=doc or "")))


def guarded(act: Callable[[], None]) -> None:
    """Call `act`. Where it fails, say why in one sentence and raise `SystemExit` with the exit code."""
    with _signals():
        try:
            act()
            # What is still in the buffer, while there is somebody to say what is wrong.
            sys.stdout.flush()
        except InputError as error:
            # Every process checks its input and finds the same: one of them says it.
            _say(str(error), everywhere=False)
            raise SystemExit(2) from None
        except Terminated as stop:
            _say(f"stopped by {signal.Signals(stop.signum).name}", everywhere=False)
            raise
        except KeyboardInterrupt:
            _say("stopped by SIGINT", everywhere=False)
            raise SystemExit(130) from None
        except BrokenPipeError:
            # The reader of our output went away (`| head`); the interpreter must not complain when it flushes.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from None
        except Exception as error:
            sentence = _fault(error)
            if sentence is None:
                traceback.print_exc()
                kind = type(error).__name__
                sentence = f"an error that should not happen: {kind}: {error}; please report it with the lines above"
            _say(sentence, everywhere=True)
            raise SystemExit(1) from None


def _fault(error: Exception) -> str | None:
    """The sentence for a fault whose cause is known and lies outside the program; None for any other error."""
    if isinstance(error, RunFault):
        return str(error)
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    # safetensors reports a full disk as an error of its own, with the system's words in it.
    if full or "No space left on device" in str(error) or "StorageFull" in str(error):
        place = f" at {error.filename!r}" if isinstance(error, OSError) and error.filename else ""
        return f"the disk is full{place}: free some space, or give another --output_dir, and run the same command again"
    # torch raises it from a signal handler, wherever the main process happens to be.
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
        return f"a loader worker died: {_first_line(error)}"
    lost = type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError") or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in _LOST_PEER)
    )
    if lost:
        return (
            f"another process of this run ended or cannot be reached ({_first_line(error)[:200]}): its own message says "
            "why; start all of them again with --resume_from_checkpoint auto"
        )
    # Named, not imported: commands that need no torch must not load it.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory ({_first_line(error)}): lower --train_batch_size, or add --gradient_checkpointing"
    return None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _say(sentence: str, *, everywhere: bool) -> None:
    main_process = is_main_process()
    if main_process or everywhere:
        sys.stdout.flush()
        prefix = "" if main_process else f"[rank {os.environ.get('RANK', '?')}] "
        print(f"error: {prefix}{' '.join(sentence.split())}", file=sys.stderr, flush=True)


@contextmanager
def _signals() -> Iterator[None]:
    """Our handlers, while the command runs. Python allows them in the main thread only."""
    global _received
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def handle(signum: int, frame: FrameType | None) -> None:
        global _received
        if os.getpid() != owner:
            # A forked worker has inherited this handler; it has nothing to save.
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
            return
        first = _received is None
        _received = signum
        if not (first and _loops):
            raise Terminated(signum)

    before = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            # None: the handler before ours was not set from Python, and cannot be put back from here.
            if handler is not None:
                signal.signal(signum, handler)
        _received = None
