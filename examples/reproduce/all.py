"""Run every command of this folder, one after another or --jobs at a time, and write README.md from their tables."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import readme

from graphlocal import files

FOLDER = Path(__file__).parent
running: list[subprocess.Popen[bytes]] = []


def run(name: str, options: Sequence[str]) -> int:
    """Run one command; its progress goes to standard error. Returns its exit status."""
    started = time.perf_counter()
    command = [sys.executable, str(FOLDER / f"{name}.py"), *options]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    running.append(process)
    status = process.wait()
    said = "" if status == 0 else f", exit status {status}"
    print(f"{name}: {(time.perf_counter() - started) / 60:.1f} minutes{said}", flush=True)
    return status


def run_all(names: Sequence[str], options: Sequence[str], jobs: int) -> list[int]:
    """Run the commands, `jobs` at a time; an interruption stops those that run, and starts no other."""
    pool = ThreadPoolExecutor(max(1, jobs))
    try:
        return list(pool.map(lambda name: run(name, options), names))
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in running:
            process.send_signal(signal.SIGINT)  # of what has ended, this does nothing
        raise SystemExit(130) from None


def main(argv: Sequence[str] | None = None) -> None:
    every = [name for names in readme.PAPERS.values() for name in names]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", help="the folder that holds MNIST/raw, FashionMNIST/raw and cifar10-jpeg")
    parser.add_argument("--quick", action="store_true", help="fewer samples and epochs: half an hour on two cores")
    parser.add_argument("--jobs", type=int, default=1, help="how many commands run at a time, each on one thread")
    parser.add_argument("--only", nargs="+", choices=every, default=every, metavar="NAME", help=", ".join(every))
    arguments = parser.parse_args(argv)
    quick = ["--quick"] if arguments.quick else []
    data = ["--data-dir", arguments.data_dir] if arguments.data_dir else []
    # At its full size imagenet.py wants a folder of its own, and days: it is left to be called by itself.
    names = [name for name in arguments.only if quick or name != "imagenet"]
    started = time.perf_counter()
    statuses = run_all(names, [*quick, *data], arguments.jobs)
    files.write(readme.README, readme.render().encode())
    print(f"{readme.README.name} is written, after {(time.perf_counter() - started) / 60:.1f} minutes")
    raise SystemExit(max(map(abs, statuses), default=0))


if __name__ == "__main__":
    main()
