"""Runs arms side by side, each in a process of its own, and goes on where it was stopped, arm by arm."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openvision3.config import OpenVisionError, TrainConfig, differences, from_dict, load_json, save_json
from openvision3.reproduction.arm import RECIPE, finished
from openvision3.reproduction.arms import (
    ARMS,
    CLASSIFIER,
    RECIPES,
    ClassifierRecipe,
    GenerationRecipe,
    Kind,
    Length,
    Precision,
    QuestionsRecipe,
    Recipe,
    folder_of,
    recipe,
)
from openvision3.reproduction.claims import Claim, Result
from openvision3.training.run_folder import RunInterrupted, StopRequest

POLL = 1.0  # seconds
LOG = "log.txt"
# seconds of a core that a sample takes, about: by them a share of the whole is told
COST: dict[Kind, float] = {"encoder": 0.03, "generation": 0.06, "questions": 1.0, "classifier": 0.01}
WHERE = ("out", "train.out", "train.model", "train.tower", "classifier")  # fields that follow from the folder


@dataclass(frozen=True)
class Job:
    """One arm with one seed."""

    arm: str
    seed: int
    recipe: Recipe

    @property
    def folder(self) -> Path:
        return Path(self.recipe.out)

    @property
    def kind(self) -> Kind:
        return ARMS[self.arm].kind

    @property
    def needs(self) -> list[Path]:
        """The folders of the arms that must be finished before it begins."""
        return [folder_of(self.folder.parent, arm, self.seed) for arm in ARMS[self.arm].needs]

    def samples(self) -> int:
        """Samples of its training; of a language model's, those of its second stage."""
        match self.recipe:
            case TrainConfig():
                return self.recipe.stage1.samples
            case QuestionsRecipe():
                return self.recipe.train.stage2.samples
            case GenerationRecipe():
                return self.recipe.train.samples
            case ClassifierRecipe():
                return self.recipe.samples

    def seen(self) -> int:
        """Samples that its metrics tell of."""
        stage = "stage2" if self.kind == "questions" else ""
        try:
            rows = (self.folder / stage / "metrics.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return 0
        marks = (row.partition('"samples_seen": ')[2].partition(",")[0] for row in reversed(rows))
        return next((int(mark) for mark in marks if mark.isdigit()), 0)


def jobs(
    claims: Sequence[Claim], seeds: int, length: Length, out: Path, precision: Precision, uses: Precision = "fp32"
) -> list[Job]:
    """The arms that the claims take, and those they need, each once, seed by seed; of one-seed claims seed 0 alone."""
    every = set(_with_needs(arm for claim in claims if not claim.one_seed for arm in claim.arms))
    needed = _with_needs(arm for claim in claims for arm in claim.arms)
    return [
        Job(arm, seed, recipe(arm, seed, length, out, precision, uses))
        for seed in range(seeds)
        # those that others need come first, then the longest
        for arm in sorted(needed, key=lambda arm: (bool(ARMS[arm].needs), -COST[ARMS[arm].kind]))
        if seed == 0 or (arm in every and arm != CLASSIFIER)
    ]


def _with_needs(arms: Iterable[str]) -> list[str]:
    """Arms with those that they need, each once, in order."""
    return list(dict.fromkeys(name for arm in arms for name in (*ARMS[arm].needs, arm)))


def results(wanted: Sequence[Job]) -> dict[int, dict[str, Result]]:
    """What is finished, by seed and arm. Raises `OpenVisionError` where it is of another recipe."""
    found: dict[int, dict[str, Result]] = {}
    for job in wanted:
        result = finished(job.folder)
        if result is not None:
            _refuse_other(job, from_dict(RECIPES[job.kind], result["config"], str(job.folder / "result.json")))
            found.setdefault(job.seed, {})[job.arm] = result
    return found


def recorded_precision(out: Path, kinds: Sequence[Kind]) -> Precision | None:
    """That of the arms of these kinds in a folder, which those to come must share; None: there are none yet."""
    for arm in (arm for arm in ARMS.values() if arm.kind in kinds):
        for path in sorted(out.glob(f"{arm.name}-seed*/{RECIPE}")):
            found: Any = load_json(RECIPES[arm.kind], path)
            precision = (found if isinstance(found, TrainConfig) else found.train).precision
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
            _refuse_other(job, load_json(RECIPES[job.kind], job.folder / RECIPE))
    threads = max(1, cores() // at_once)
    running: dict[str, tuple[Job, subprocess.Popen[bytes]]] = {}
    before, started = _work_done(waiting), time.monotonic()
    last = started
    queue = list(waiting)
    with StopRequest(hangup=True) as stop:
        try:
            while (queue or running) and not stop:
                while len(running) < at_once and (job := _next(queue)) is not None:
                    queue.remove(job)
                    running[str(job.folder)] = job, _start(job, device, threads)
                if not running:
                    raise OpenVisionError(f"{queue[0].arm}: what it needs is neither finished nor among the trainings")
                for name, (job, process) in list(running.items()):
                    if (code := process.poll()) is not None:
                        del running[name]
                        if code:
                            raise OpenVisionError(_reason(job, code))
                        say(f"done: {job.arm}, seed {job.seed}")
                if time.monotonic() - last >= 20:
                    last = time.monotonic()
                    say(_progress(waiting, [job for job, _ in running.values()], before, last - started))
                time.sleep(POLL if running else 0)
        finally:
            for _, process in running.values():
                process.terminate()  # saves, and ends
            for _, process in running.values():
                process.wait()
        if stop:
            raise RunInterrupted("stopped, with all saved; the same command goes on from there", stop.signal_number)


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _next(queue: Sequence[Job]) -> Job | None:
    """The first that can begin; None: those that are running must end first, or nothing is left."""
    return next((job for job in queue if all(finished(folder) is not None for folder in job.needs)), None)


def _start(job: Job, device: str, threads: int) -> "subprocess.Popen[bytes]":
    job.folder.mkdir(parents=True, exist_ok=True)
    save_json(job.recipe, job.folder / RECIPE)
    command = [sys.executable, "-m", "openvision3.reproduction.arm", str(job.folder), job.kind, device]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with (job.folder / LOG).open("wb") as log:  # of this start: what an earlier one died of is no longer so
        # a session of its own: a terminal's Ctrl-C reaches it through this process alone
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def _refuse_other(job: Job, found: Recipe) -> None:
    changed = [name for name, _, _, _ in differences(found, job.recipe) if name not in WHERE]
    if changed:
        raise OpenVisionError(
            f"{job.folder} was begun with another {', '.join(changed)}: choose another folder (--out), or the same "
            "options as before"
        )


def _reason(job: Job, code: int) -> str:
    lines = (job.folder / LOG).read_text(errors="replace").splitlines()
    said = next((line for line in reversed(lines) if line.startswith("ov3: ")), "")[5:]
    return f"{job.arm}, seed {job.seed}: {said or f'exit code {code}'} (see {job.folder / LOG})"


def _work_done(waiting: Sequence[Job]) -> float:
    """Seconds of a core, about, of what is done."""
    done = (job.samples() if finished(job.folder) else min(job.seen(), job.samples()) for job in waiting)
    return sum(COST[job.kind] * samples for job, samples in zip(waiting, done, strict=True))


def _progress(waiting: Sequence[Job], running: Sequence[Job], before: float, seconds: float) -> str:
    total, done = sum(COST[job.kind] * job.samples() for job in waiting), _work_done(waiting)
    now = ", ".join(f"{job.arm} seed {job.seed} {job.seen():,}/{job.samples():,}" for job in running)
    left = f"about {(total - done) * seconds / (done - before) / 60:.0f} min left; " if done > before else ""
    return f"{100 * done / total:.0f} %, {left}{now}"


def by_seed(found: dict[int, dict[str, Result]], claim: Claim) -> Iterator[dict[str, Result]]:
    """The seeds that have all of a claim's arms; the first alone for one-seed claims."""
    complete = (found[seed] for seed in sorted(found) if all(arm in found[seed] for arm in claim.arms))
    for number, seed in enumerate(complete):
        if number == 0 or not claim.one_seed:
            yield seed
