"""`ov3 generate stats|train|sample`: token statistics, training, and pictures from a trained generator."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from openvision3.commands import common
from openvision3.config import DataConfig, OpenVisionError, to_dict

if TYPE_CHECKING:
    from openvision3.generation.train_config import GeneratorTrainConfig


def train(args: list[str]) -> int:
    """Trains the recipe that `args` begins with; the same command run again resumes. Returns the exit code."""
    from openvision3.commands.train import chosen_recipe, resolve, run_to_end
    from openvision3.generation.recipes import GENERATOR_RECIPES

    recipe = chosen_recipe("ov3 generate train", GENERATOR_RECIPES, args)
    if isinstance(recipe, int):
        return recipe
    run = resolve(recipe, args[1:], f"ov3 generate train {args[0]}")
    if run.dry_run:
        print(_dry_run(run.config))
        return 0
    from openvision3.generation.train import train as train_generator

    return run_to_end(lambda: train_generator(run.config, run.device) / "generator")


def _dry_run(config: "GeneratorTrainConfig") -> str:
    """The resolved recipe, the generator's size and a sample's operations; nothing is fetched or written."""
    import torch

    from openvision3.generation.dit import DiT, flops
    from openvision3.generation.train_config import validate

    validate(config)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in DiT(config.generator).parameters())
    forward = flops(config.generator)
    return "\n".join(
        [
            json.dumps(to_dict(config), indent=2),
            "",
            f"{config.generator.name}: {count / 1e6:.1f} million parameters, {forward / 1e9:.2f} GFLOPs forward",
            f"{config.steps:,} steps of {config.batch_size}, {3 * config.draws * forward * config.samples / 1e18:.3g} "
            "EFLOPs without the frozen model's",
        ]
    )


@dataclass(frozen=True)
class StatsOptions:
    """Whose tokens, of which pictures."""

    model: str = "demo"  # the frozen model: folder, or hub id
    space: Literal["tokens", "latents"] = "tokens"  # unified tokens, or the VAE's latents in patches
    data: DataConfig = DataConfig()
    resolution: int = 0  # pixels; 0: the model's own
    samples: int = 50_000  # positions 0 to this of the data's own order
    shard: str = "0/1"  # "I/N": the I-th of N parts of the samples, to be merged
    batch_size: int = 64
    device: str = "auto"
    save_every: int = 20_000  # samples between saves of what is done, from which the same command goes on


def stats(
    out: Annotated[Path, tyro.conf.Positional],
    options: Annotated[StatsOptions, tyro.conf.arg(name="")] = StatsOptions(),
    merge: tuple[Path, ...] = (),
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> int:
    """Exact mean and standard deviation of a data set's tokens, for `ov3 generate train --statistics OUT`.

    out: file to write. merge: files of other parts to put together instead.
    """
    from openvision3.generation import gather

    if merge:
        common.refuse_existing(out, overwrite)
        loaded = [gather.load_statistics(path) for path in merge]
        records = [{k: v for k, v in record.items() if k not in ("shard", "done", "position")} for _, record in loaded]
        for path, record, whole in zip(merge, records, loaded, strict=True):
            if record != records[0]:
                raise OpenVisionError(f"{path} holds statistics of other tokens or data than {merge[0]}")
            if not whole[1].get("done"):
                raise OpenVisionError(f"{path} is not complete: run its command again")
        shards = [str(record.get("shard")) for _, record in loaded]
        if len(set(shards)) < len(shards) or len({shard.partition("/")[2] for shard in shards}) > 1:
            raise OpenVisionError(f"the parts overlap: their shards are {', '.join(shards)}")
        total = gather.merged([statistics for statistics, _ in loaded])
        gather.save_statistics(out, total, {**records[0], "shard": "+".join(shards), "done": True})
        print(f"{out}: {int(total.count):,} samples")
        return 0
    return _gather(out, options, overwrite)


def _gather(out: Path, options: StatsOptions, overwrite: bool) -> int:
    from openvision3.generation import gather
    from openvision3.generation.data import open_batches
    from openvision3.generation.recipes import demo_generator
    from openvision3.generation.space import PictureSpace
    from openvision3.generation.statistics import TokenStatistics
    from openvision3.hub.load import load
    from openvision3.training.precision import resolve_device

    start, stop = _shard(options)
    space = PictureSpace(load(options.model, device=resolve_device(options.device)), options.space, options.resolution)
    described = gather.describe(space, data=to_dict(options.data), of=options.samples)
    described["data"] = {k: v for k, v in to_dict(options.data).items() if k != "num_workers"}  # type: ignore[index]
    statistics, position = TokenStatistics(), start
    if out.exists() and not overwrite:
        statistics, record = gather.load_statistics(out)
        same = {k: v for k, v in record.items() if k not in ("done", "position")}
        if same != json.loads(json.dumps({**described, "shard": options.shard})):
            raise OpenVisionError(f"{out} holds other statistics; pass --overwrite to replace it")
        if record.get("done"):
            print(f"{out} is complete: {int(statistics.count):,} samples")
            return 0
        position = int(str(record["position"]))
    template = demo_generator()
    config = replace(
        template,
        generator=replace(template.generator, condition="class"),
        data=options.data,
        resolution=space.resolution,
        samples=max(1, options.samples),
        batch_size=options.batch_size,
    )
    batches = open_batches(config, space.model, out.parent / ".index", start=position, stop=stop)
    saved = position
    with common.Progress(stop - start, "samples") as progress:
        progress.advance(position - start)
        for batch in batches:
            gather.add_batch(statistics, space, batch)
            position += len(batch.positions)
            progress.advance(len(batch.positions))
            if position - saved >= options.save_every or position == stop:
                record = {**described, "shard": options.shard, "position": position, "done": position == stop}
                gather.save_statistics(out, statistics, record)
                saved = position
    gather.enough(statistics, str(out))
    print(f"{out}: {int(statistics.count):,} samples")
    return 0


def _shard(options: StatsOptions) -> tuple[int, int]:
    """First and last position of a part, "I/N" of the samples."""
    index, _, count = options.shard.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise OpenVisionError(f"shard is {options.shard!r}: expected I/N with I from 0 to N - 1, such as 0/4")
    part, parts = int(index), int(count)
    if options.samples < parts or options.batch_size < 1:
        raise OpenVisionError(f"samples is {options.samples}, batch_size {options.batch_size}: too few")
    return options.samples * part // parts, options.samples * (part + 1) // parts
