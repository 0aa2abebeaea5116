"""A function in a process of its own, with a time limit: one that fails or hangs leaves everything else alone."""

import faulthandler
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from inspect import isgenerator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

CONTEXT: BaseContext = get_context(
    "spawn"
)  # bitsandbytes uses the GPU when it is imported: no process can inherit that

LATE = "no result within its limit"


def run_alone(function: str, limit_s: float, log: Path, **arguments: Any) -> dict[str, Any]:
    """What a function returns, run in a process of its own.

    The process and all that it has started are killed when its result is here, or when its time is up.

    Args:
        function: Where it is, as `package.module:name`; it returns a dictionary, or yields several, of what it has
            found so far.
        limit_s: Seconds that it has at most, with its imports.
        log: File for what it prints.
        arguments: Arguments of the function.

    Returns:
        The result, or what there was of it before a failure: `error` then holds the message, in one line.
    """
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_answer, args=(sender, function, log, arguments))  # type: ignore[attr-defined]
    process.start()
    sender.close()
    found: dict[str, Any] = {}
    end = time.monotonic() + limit_s
    try:
        while receiver.poll(max(end - time.monotonic(), 0)):
            is_last, more = receiver.recv()
            found |= more
            if is_last:
                return found
        return found | {"error": f"{LATE} of {limit_s:.0f} s"}
    except EOFError:
        process.join(10)
        return found | {"error": f"the process ended without a result, with status {process.exitcode}; see {log}"}
    finally:
        with suppress(ProcessLookupError):  # it is the first of a group, once it runs
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()


def is_late(result: dict[str, Any]) -> bool:
    """Whether a result is that of a function whose time was up."""
    return str(result.get("error", "")).startswith(LATE)


def _answer(sender: Connection, function: str, log: Path, arguments: dict[str, Any]) -> None:
    os.setsid()
    stream = log.open("w", buffering=1, encoding="utf-8", errors="replace")
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    sys.stdout = sys.stderr = stream
    faulthandler.enable(stream)
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded: what asks for it is at fault
    try:
        result = resolve_name(function)(**arguments)
        for more in result if isgenerator(result) else [result]:
            sender.send((False, more))
        sender.send((True, {}))
    except BaseException as error:
        traceback.print_exc()
        sender.send((True, {"error": first_line(error)}))


def first_line(error: BaseException) -> str:
    """The class of an exception and the beginning of its message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
