"""One process of a small training run that several share: `shared_run.py OUT VAE STEPS WORKERS PRECISION KIND`.

It is started with the variables that torchrun sets. Each batch's positions and keys are added to OUT-ids.jsonl before
the batch is used.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tiny_run import tiny_config

from openvision3.config import OpenVisionError, VAEConfig
from openvision3.data.batches import Batch
from openvision3.training import loop
from openvision3.training.run_folder import RunInterrupted
from openvision3.training.step import Objective


def main() -> int:
    torch.set_num_threads(1)
    out, vae, steps, workers, precision, kind = sys.argv[1:]
    config = tiny_config(Path(out), VAEConfig(kind="tiny", source=vae), int(steps), precision=precision, parallel=kind)
    config = replace(config, data=replace(config.data, num_workers=int(workers)), keep_checkpoints=3, ema=0.9)
    config = replace(config, background_saves=os.environ.get("SAVES") == "background")
    if os.environ.get("SPOIL"):
        config = replace(config, meter_samples=0)  # calls are counted below
    open_stream = loop.open_stream

    def recorded(*args: Any) -> Iterator[Batch]:
        for batch in open_stream(*args):
            row = json.dumps({"positions": batch.positions, "keys": batch.keys}) + "\n"
            with open(f"{out}-ids.jsonl", "a") as file:  # one write, which the system does not mix with others'
                file.write(row)
            time.sleep(float(os.environ.get("PAUSE") or 0))
            yield batch

    loop.open_stream = recorded  # type: ignore[assignment]
    if os.environ.get("SPOIL") == os.environ["RANK"]:
        reconstruction, calls = Objective._reconstruction, []

        def spoilt(self: Objective, *args: Any) -> Any:
            found = reconstruction(self, *args)
            calls.append(found)
            return {name: loss * float("nan") for name, loss in found.items()} if len(calls) == 3 else found

        Objective._reconstruction = spoilt  # type: ignore[method-assign]
    try:
        loop.train(config, device="cpu")
    except RunInterrupted as stop:
        print(stop, file=sys.stderr)
        return 0
    except OpenVisionError as error:
        print(f"ov3: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as `ov3` does after an error: the usual end can abort where another process is gone already
