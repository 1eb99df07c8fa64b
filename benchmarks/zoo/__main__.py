"""Run the zoo: every model in a process of its own, several at a time, resumable.

An interrupted run goes on where it stopped (`--fresh` starts over). `--only 'timm/*'` measures a part and keeps the
other records of the last table. Writes benchmarks/results/zoo.md and zoo.json.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import resource
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from benchmarks import report  # noqa: E402
from benchmarks.zoo import catalogue  # noqa: E402
from benchmarks.zoo.smoke import SMOKE  # noqa: E402
from benchmarks.zoo.table import tables  # noqa: E402

PARTIAL = ROOT / "build" / "zoo.partial.jsonl"
RESULT = report.RESULTS / "zoo.json"


@dataclass(frozen=True)
class Limits:
    seconds: int
    gigabytes: int


def main() -> None:
    options = _options()
    wanted = [name for family in catalogue.FAMILIES for name in _ids(family, options)]
    if not wanted:
        sys.exit(f"no model matches {options.only}; `--list` prints their names")
    if options.list:
        print("\n".join(wanted))
        return
    records = {} if options.fresh or options.smoke else _resumed()
    pending = [name for name in wanted if name not in records]
    try:
        _run_all(pending, records, options, keep=not options.smoke)
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here" if not options.smoke else "interrupted")
    done = [records[name] for name in wanted]
    failed = [record for record in done if record["status"] == "failed"]
    if options.smoke:
        print("\n\n".join(tables(done)))
    else:
        _write({**_last_records(options), **{record["id"]: record for record in done}})
        PARTIAL.unlink(missing_ok=True)
    print(f"{len(done) - len(failed)} of {len(done)} models pass")
    sys.exit(bool(failed))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="GLOB", help="ids to measure, such as 'timm/*'")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="models at a time (default: one a core)")
    parser.add_argument("--seconds", type=int, default=600, help="time limit for a model (default: 600)")
    parser.add_argument("--gigabytes", type=int, default=12, help="memory limit for a model (default: 12)")
    parser.add_argument("--fresh", action="store_true", help="forget an interrupted run")
    parser.add_argument("--smoke", action="store_true", help="only the twenty of the smoke run; writes no table")
    parser.add_argument("--list", action="store_true", help="print the ids and stop")
    return parser.parse_args()


def _ids(family: str, options: argparse.Namespace) -> list[str]:
    if not any(fnmatch.fnmatch(family, pattern.partition("/")[0]) for pattern in options.only):
        return []
    found = [case.id for case in catalogue.cases(family)]
    if options.smoke:
        return [name for name in found if name in SMOKE]
    return [name for name in found if any(fnmatch.fnmatch(name, pattern) for pattern in options.only)]


def _run_all(pending: list[str], records: dict[str, Any], options: argparse.Namespace, keep: bool) -> None:
    limits = Limits(options.seconds, options.gigabytes)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress, ThreadPoolExecutor(options.jobs) as pool:
        task = progress.add_task("zoo", total=len(pending))
        running = [pool.submit(_measure, name, limits) for name in pending]
        try:
            for future in as_completed(running):
                record = future.result()
                records[record["id"]] = record
                if keep:
                    PARTIAL.parent.mkdir(exist_ok=True)
                    with PARTIAL.open("a") as file:
                        file.write(json.dumps(record) + "\n")
                if record["status"] == "failed":
                    progress.print(f"{record['id']} failed at {record['stage']}")
                progress.advance(task)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _measure(name: str, limits: Limits) -> dict[str, Any]:
    """One model in a process of its own."""

    def bound() -> None:
        size = limits.gigabytes << 30
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "record.json"
        command = [sys.executable, "-m", "benchmarks.zoo.measure", name, str(file)]
        try:
            done = subprocess.run(command, cwd=ROOT, preexec_fn=bound, timeout=limits.seconds, capture_output=True,
                                  text=True, check=False)  # fmt: skip
        except subprocess.TimeoutExpired:
            return _lost(name, f"took more than {limits.seconds} seconds")
        if not file.exists():
            return _lost(name, f"the process ended with {done.returncode}\n{done.stderr[-2000:]}")
        return json.loads(file.read_text())


def _lost(name: str, error: str) -> dict[str, Any]:
    """The record of a process that wrote none."""
    from benchmarks.zoo.measure import Record, asdict

    return asdict(Record(name, stage="process", error=error))


def _resumed() -> dict[str, Any]:
    if not PARTIAL.exists():
        return {}
    records = [json.loads(line) for line in PARTIAL.read_text().splitlines()]
    return {record["id"]: record for record in records}


def _last_records(options: argparse.Namespace) -> dict[str, Any]:
    if options.only == ["*"] or not RESULT.exists():
        return {}
    return {record["id"]: record for record in json.loads(RESULT.read_text())["records"]}


def _write(records: dict[str, Any]) -> None:
    ordered = [records[key] for key in sorted(records)]
    report.RESULTS.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"machine": report.machine(), "records": ordered}, indent=1) + "\n")
    report.write("zoo", "The zoo", "python -m benchmarks.zoo", tables(ordered))


if __name__ == "__main__":
    main()
