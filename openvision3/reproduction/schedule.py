"""Runs arms side by side, each in a process of its own, and goes on where it was stopped, arm by arm."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from openvision3.config import OpenVisionError, TrainConfig, differences, from_dict, load_json, save_json
from openvision3.reproduction.arm import RECIPE, finished
from openvision3.reproduction.arms import Length, Precision, arm_config
from openvision3.reproduction.claims import Claim, Result
from openvision3.training.run_folder import RunInterrupted, StopRequest

POLL = 1.0  # seconds
LOG = "log.txt"


@dataclass(frozen=True)
class Job:
    """One arm with one seed."""

    arm: str
    seed: int
    config: TrainConfig

    @property
    def folder(self) -> Path:
        return Path(self.config.out)

    def seen(self) -> int:
        """Samples that its metrics tell of."""
        try:
            rows = (self.folder / "metrics.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return 0
        marks = (row.partition('"samples_seen": ')[2].partition(",")[0] for row in reversed(rows))
        return next((int(mark) for mark in marks if mark.isdigit()), 0)


def jobs(claims: Sequence[Claim], seeds: int, length: Length, out: Path, precision: Precision) -> list[Job]:
    """The arms that the claims take, each once, seed by seed; those of one-seed claims with seed 0 alone."""
    every = {arm for claim in claims if not claim.one_seed for arm in claim.arms}
    needed = {arm: None for claim in claims for arm in claim.arms}  # in order
    return [
        Job(arm, seed, arm_config(arm, seed, length, out / f"{arm}-seed{seed}", precision))
        for seed in range(seeds)
        for arm in needed
        if seed == 0 or arm in every
    ]


def results(wanted: Sequence[Job]) -> dict[int, dict[str, Result]]:
    """What is finished, by seed and arm. Raises `OpenVisionError` where it is of another recipe."""
    found: dict[int, dict[str, Result]] = {}
    for job in wanted:
        result = finished(job.folder)
        if result is not None:
            _refuse_other(job, from_dict(TrainConfig, result["config"], str(job.folder / "result.json")))
            found.setdefault(job.seed, {})[job.arm] = result
    return found


def recorded_precision(out: Path) -> Precision | None:
    """That of the arms in a folder, which those to come must share; None: there are none yet."""
    for path in sorted(out.glob(f"*-seed*/{RECIPE}")):
        precision = load_json(TrainConfig, path).precision
        return "bf16" if precision == "bf16" else "fp32"
    return None


def run_jobs(wanted: Sequence[Job], at_once: int, device: str, say: Callable[[str], object]) -> None:
    """Trains what is not finished, `at_once` arms side by side, each on its share of the cores.

    Raises `OpenVisionError` where an arm fails (the others are stopped, with all saved), and `RunInterrupted` after a
    signal: the same call goes on.
    """
    done = results(wanted)
    waiting = [job for job in wanted if job.arm not in done.get(job.seed, {})]
    if kept := len(wanted) - len(waiting):
        say(f"{kept} of {len(wanted)} trainings are done already")
    for job in waiting:
        if (job.folder / RECIPE).exists():
            _refuse_other(job, load_json(TrainConfig, job.folder / RECIPE))
    threads = max(1, len(os.sched_getaffinity(0)) // at_once) if hasattr(os, "sched_getaffinity") else 1
    running: dict[str, tuple[Job, subprocess.Popen[bytes]]] = {}
    total, before = sum(job.config.stage1.samples for job in waiting), sum(job.seen() for job in waiting)
    started = last = time.monotonic()
    queue = list(waiting)
    with StopRequest() as stop:
        try:
            while (queue or running) and not stop:
                while queue and len(running) < at_once:
                    job = queue.pop(0)
                    running[str(job.folder)] = job, _start(job, device, threads)
                for name, (job, process) in list(running.items()):
                    if (code := process.poll()) is not None:
                        del running[name]
                        if code:
                            raise OpenVisionError(_reason(job, code))
                        say(f"done: {job.arm}, seed {job.seed}")
                if time.monotonic() - last >= 20:
                    last = time.monotonic()
                    say(_progress(waiting, total, before, last - started))
                time.sleep(POLL if running else 0)
        finally:
            for _, process in running.values():
                process.terminate()  # saves, and ends
            for _, process in running.values():
                process.wait()
        if stop:
            raise RunInterrupted("stopped, with all saved; the same command goes on from there", stop.signal_number)


def _start(job: Job, device: str, threads: int) -> "subprocess.Popen[bytes]":
    job.folder.mkdir(parents=True, exist_ok=True)
    save_json(job.config, job.folder / RECIPE)
    command = [sys.executable, "-m", "openvision3.reproduction.arm", str(job.folder), device]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with (job.folder / LOG).open("ab") as log:
        # a session of its own: a terminal's Ctrl-C reaches it through this process alone
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def _refuse_other(job: Job, recipe: TrainConfig) -> None:
    changed = [name for name, _, _, _ in differences(recipe, replace(job.config, out=recipe.out))]
    if changed:
        raise OpenVisionError(
            f"{job.folder} was begun with another {', '.join(changed)}: choose another folder (--out), or the same "
            "options as before"
        )


def _reason(job: Job, code: int) -> str:
    lines = (job.folder / LOG).read_text(errors="replace").splitlines()
    said = next((line for line in reversed(lines) if line.startswith("ov3: ")), "")[5:]
    return f"{job.arm}, seed {job.seed}: {said or f'exit code {code}'} (see {job.folder / LOG})"


def _progress(waiting: Sequence[Job], total: int, before: int, seconds: float) -> str:
    seen = sum(job.seen() for job in waiting)
    rate = (seen - before) / seconds
    left = f", {(total - seen) / rate / 60:.0f} min left" if rate > 0 else ""
    return f"{seen:,} of {total:,} scenes, {rate:.0f}/s{left}"


def by_seed(found: dict[int, dict[str, Result]], claim: Claim) -> Iterator[dict[str, Result]]:
    """The seeds that have all of a claim's arms; the first alone for one-seed claims."""
    complete = (found[seed] for seed in sorted(found) if all(arm in found[seed] for arm in claim.arms))
    for number, seed in enumerate(complete):
        if number == 0 or not claim.one_seed:
            yield seed
