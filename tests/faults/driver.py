"""Starts runs of recipes and kills them, quickly: one process imports what recipes import, and forks for each run.

Started as `python driver.py`; reads one job a line (JSON) from stdin and answers with one line. A job names a `recipe`,
its `argv`, the number of `processes`, and optionally `kill_after` (seconds until SIGKILL), `log_lines` (a file and how
many lines it must have before these seconds begin) and `kill` (`all`, the process groups with their loader workers; `one`,
only rank 1; `worker`, one loader worker of rank 0).
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import sys
import time
from pathlib import Path


def recipe_folder() -> Path:
    from mmbackdoor import recipe_files

    return recipe_files.folders()["recipes"]


def run_recipe(job: dict, rank: int, port: int, log: Path) -> None:
    """In the child: never returns."""
    os.setpgid(0, 0)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if job["processes"] > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["processes"]),
            LOCAL_WORLD_SIZE=str(job["processes"]), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
    sys.argv = [str(recipe_folder() / f"{job['recipe']}.py"), *job["argv"]]
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    # Not through the interpreter's end: this process was forked from one that has its own.
    os._exit(code)


def children_of(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def kill(job: dict, pids: list[int]) -> bool:
    """Whether anybody was there to be killed."""
    how = job.get("kill", "all")
    if how == "one":
        os.kill(pids[1], signal.SIGKILL)
        return True
    if how == "worker":
        workers = children_of(pids[0])
        for pid in workers[:1]:
            os.kill(pid, signal.SIGKILL)
        return bool(workers)
    for pid in pids:
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return True


def lines(path: str, count: int) -> bool:
    try:
        return Path(path).read_bytes().count(b"\n") >= count
    except OSError:
        return False


def perform(job: dict) -> dict:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs = [Path(f"{job['log']}-{rank}.txt") for rank in range(job["processes"])]
    pids: list[int] = []
    for rank, log in enumerate(logs):
        pid = os.fork()
        if pid == 0:
            run_recipe(job, rank, port, log)
        pids.append(pid)
    began, killed_at, codes = time.monotonic(), None, {}
    counting_from = None if "log_lines" in job else began
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        elapsed = time.monotonic() - began
        if counting_from is None and lines(*job["log_lines"]):
            counting_from = time.monotonic()
        due = "kill_after" in job and killed_at is None and counting_from is not None
        due = due and time.monotonic() - counting_from >= job["kill_after"]
        if due and not codes and kill(job, pids):
            killed_at = time.monotonic()
        if elapsed > job.get("timeout", 300):
            kill({"kill": "all"}, pids)
        time.sleep(0.005)
    return {
        "codes": [codes[pid] for pid in pids],
        "seconds": time.monotonic() - began,
        "killed": killed_at is not None,
        "said": [log.read_text(errors="replace")[-3000:] for log in logs],
    }


def main() -> None:
    # What every recipe needs, once; nothing is computed and no thread is started before the forks.
    from mmbackdoor import recipe_files

    for name in ("train_diffusion", "poison_diffusion", "clean_diffusion", "pretrain_clip", "clean_clip"):
        if name in recipe_files.recipe_names():
            recipe_files.load(name)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(perform(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
