"""Makes the embedded demo generator, openvision3/weights/demo_generator, from a run of `ov3 generate train`.

    python benchmarks/embed_generator.py runs/demo_generator [--figures figures.json] [--guidance 1.5] [--steps 50]

Writes the weights in fp16, the run's metrics.jsonl and a card. `--figures`: what `generation_quality.py --json` wrote
of the stored weights, so that it is run after this and this once more.
"""

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from generation_quality import table

from openvision3.generation.folder import load_weights, read_description, save_generator
from openvision3.generation.generator import DEMO_GENERATOR, load_generator
from openvision3.generation.space import PictureSpace
from openvision3.hub.load import load
from openvision3.training.monitor import read_records

CARD = """# The demo generator

Draws what `ov3 generate sample --prompt "a lion by the water"` asks for: a DiT-DH of {parameters:.1f} M parameters in
fp16 on the unified tokens of the embedded demo model, {size} px.

**It knows single things of {names} names (fruit, animals, tools ...), with or without a word on where they are, as the
demo's captions say it, and no other words; what it draws is often blurred or broken.**

| | |
|---|---|
| made by | `ov3 generate train {recipe}`, seed {seed}: {samples:,} scenes, each with {draws} times and noises{start} |
| machine | {machine} |
| sampler | Euler, {steps} steps, guidance {guidance:g} |
| licence | MIT |
{figures}
"""


def main() -> None:
    """Writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--figures", type=Path)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    run: Path = options.run
    config = json.loads((run / "config.json").read_text())
    environment = json.loads((run / "environment.json").read_text())
    description = read_description(run / "generator")
    space = PictureSpace(load(description.model, device="cpu"), description.space, description.resolution)
    dit, normalizer = load_weights(run / "generator", description, space)
    described = replace(description, guidance=options.guidance, steps=options.steps)
    save_generator(DEMO_GENERATOR, dit, normalizer, described, torch.float16)
    shutil.copyfile(run / "metrics.jsonl", DEMO_GENERATOR / "metrics.jsonl")
    rows = [row for row in read_records(run / "metrics.jsonl") if row["kind"] == "train"]
    measured = ""
    if options.figures:
        shutil.copyfile(options.figures, DEMO_GENERATOR / "figures.json")
        measured = "\n" + table(json.loads(options.figures.read_text())) + "\n"
    card = CARD.format(
        parameters=sum(parameter.numel() for parameter in load_generator("demo", device="cpu").dit.parameters()) / 1e6,
        size=described.resolution,
        names=config["data"]["scenes"]["num_names"],
        recipe=config["recipe"],
        seed=config["seed"],
        samples=rows[-1]["samples_seen"],
        draws=config["draws"],
        start=", on from the weights of an earlier run" if config.get("init") else "",
        machine=f"{environment['processors']} processors, {environment['platform']}, torch "
        f"{environment['packages']['torch']}",
        steps=options.steps,
        guidance=options.guidance,
        figures=measured,
    )
    (DEMO_GENERATOR / "README.md").write_text(card)
    print(card)


if __name__ == "__main__":
    main()
