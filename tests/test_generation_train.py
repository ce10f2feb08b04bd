"""Training of generators: exact to resume, the same in any micro-batches and processes, averages, folders."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_tars import picture, write_tar
from torch import Tensor

from openvision3 import cli
from openvision3.config import DataConfig, OpenVisionError, OptimizerConfig, SceneConfig
from openvision3.generation import gather
from openvision3.generation.config import GeneratorConfig, StackConfig
from openvision3.generation.data import open_batches
from openvision3.generation.dit import DiT
from openvision3.generation.folder import load_weights, read_description
from openvision3.generation.objective import FlowObjective
from openvision3.generation.space import PictureSpace
from openvision3.generation.statistics import Normalizer, TokenStatistics
from openvision3.generation.train import open_space, settled, train
from openvision3.generation.train_config import GeneratorTrainConfig, validate
from openvision3.training.checkpoint import checkpoints
from openvision3.training.ema import Average
from openvision3.training.monitor import read_records

SMALL = GeneratorConfig(
    name="small",
    token_width=32,
    grid=(4, 4),
    backbone=StackConfig(16, 2, 2),
    head=StackConfig(32, 1, 2),
    condition="text",
    text_embed_dim=16,
)


def small_config(model: Path, out: Path, **changes: object) -> GeneratorTrainConfig:
    values: dict[str, object] = {
        "generator": SMALL,
        "model": str(model),
        "data": DataConfig(scenes=SceneConfig(num_names=20, count_weights=(1, 0, 0, 0)), num_workers=0),
        "samples": 24,
        "batch_size": 4,
        "warmup_samples": 8,
        "peak_lr": 0.003,
        "optimizer": OptimizerConfig(weight_decay=0.0),
        "ema": 0.5,
        "statistics_samples": 8,
        "precision": "fp32",
        "sheet_steps": 2,
        "log_every": 1,
        "checkpoint_every": 12,
        "out": str(out),
    }
    return GeneratorTrainConfig("small", **(values | changes))  # type: ignore[arg-type]


def stored(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "generator" / "generator.safetensors")


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run."""
    return train(small_config(tiny_model, tmp_path_factory.mktemp("runs") / "whole"), "cpu")


def test_a_run_leaves_all_that_it_should(run: Path) -> None:
    rows = read_records(run / "metrics.jsonl")
    assert [row["samples_seen"] for row in rows] == [4, 8, 12, 16, 20, 24]
    assert all(row["total"] > 0 and "early" in row and "late" in row for row in rows)
    assert [path.name for path in checkpoints(run / "checkpoints")] == ["step_3", "step_6"]
    assert (run / "samples" / "step_6.png").is_file()
    assert {p.name for p in (run / "generator").iterdir()} == {"config.json", "generator.safetensors", "README.md"}
    description = read_description(run / "generator")
    assert description.text_fingerprint and len(description.names) == 20


def test_a_resumed_run_ends_as_an_unbroken_one(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    for at, kept in ((tmp_path / "a", "step_3"), (tmp_path / "b", None)):
        shutil.copytree(run, at)
        shutil.rmtree(at / "generator")
        for path in checkpoints(at / "checkpoints"):
            if path.name != kept:
                shutil.rmtree(path)
        train(small_config(tiny_model, at), "cpu")
        for name, tensor in stored(run).items():
            assert torch.equal(stored(at)[name], tensor), name
        assert [r["total"] for r in read_records(at / "metrics.jsonl")] == [
            r["total"] for r in read_records(run / "metrics.jsonl")
        ]


def test_what_a_run_was_given_must_stay(run: Path, tiny_model: Path) -> None:
    before = stored(run)
    assert train(small_config(tiny_model, run), "cpu") == run  # complete
    with pytest.raises(OpenVisionError, match="peak_lr"):
        train(small_config(tiny_model, run, peak_lr=0.5), "cpu")
    assert all(torch.equal(tensor, before[name]) for name, tensor in stored(run).items())


def objective(model: Path, config: GeneratorTrainConfig, **changes: object) -> tuple[FlowObjective, DiT]:
    config = replace(config, **changes)  # type: ignore[arg-type]
    space = open_space(config, "cpu")
    config = settled(config, space)
    torch.manual_seed(0)
    dit = DiT(config.generator)
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # modulations are 0 at first, and so would most gradients be
    tokens, width = space.grid[0] * space.grid[1], space.width
    normalizer = Normalizer(torch.zeros(tokens, width), torch.ones(tokens, width))
    return FlowObjective(dit, normalizer, space, config, "fp32"), dit


@pytest.mark.parametrize("space", ["tokens", "latents"])
def test_micro_batches_change_nothing(tiny_model: Path, tmp_path: Path, space: str) -> None:
    config = small_config(tiny_model, tmp_path, space=space, draws=2)
    if space == "latents":
        config = replace(config, generator=replace(SMALL, head=StackConfig(64, 1, 2)))
    found = []
    for size in (0, 1, 3):
        one, dit = objective(tiny_model, config, micro_batch=size)
        batch = next(iter(open_batches(one.config, one.space.model, tmp_path, start=0, stop=4)))
        losses = one.backward(batch)
        found.append((losses, [p.grad.clone() for p in dit.parameters() if p.grad is not None]))
    (losses, gradients), *others = found
    assert len(gradients) == len(list(dit.parameters()))
    for other, theirs in others:
        assert all(torch.allclose(losses[name], other[name], rtol=1e-5) for name in losses)
        for mine, their in zip(gradients, theirs, strict=True):
            assert torch.allclose(mine, their, rtol=1e-4, atol=1e-6)


def test_draws_depend_on_the_position_alone(tiny_model: Path, tmp_path: Path) -> None:
    from openvision3.generation.objective import flow_draws

    device = torch.device("cpu")
    noise, normal, uniform = flow_draws(3, [5, 9, 7], 2, (4, 3), device)
    again = flow_draws(3, [7], 2, (4, 3), device)
    for whole, part in zip((noise, normal, uniform), again, strict=True):
        assert torch.equal(whole[4:], part)
    assert len({float(value) for value in normal}) == 6


def test_the_learning_rate_warms_up_stays_and_falls() -> None:
    config = GeneratorTrainConfig(
        "x", SMALL, samples=100, batch_size=10, warmup_samples=20, decay_samples=40, peak_lr=1.0, final_lr=0.1
    )
    assert [round(config.learning_rate(seen), 3) for seen in (10, 20, 60, 80, 100)] == [0.5, 1, 1, 0.55, 0.1]
    with pytest.raises(OpenVisionError, match="warmup_samples"):
        validate(replace(config, warmup_samples=90))
    with pytest.raises(OpenVisionError, match="draws is 0"):
        validate(replace(config, draws=0))


def test_a_compiled_forward_sees_the_swapped_averages() -> None:
    layer = torch.nn.Linear(2, 2)
    average = Average(dict(layer.named_parameters()), 0.5)
    compiled = torch.compile(layer, backend="eager")
    x = torch.ones(1, 2)
    averaged = compiled(x).detach().clone()
    with torch.no_grad():
        layer.weight.add_(1.0)
    online = compiled(x).detach().clone()
    assert not torch.allclose(online, averaged)
    with average.swapped():
        assert torch.allclose(compiled(x), averaged)
    assert torch.equal(compiled(x), online)


def test_statistics_of_parts_are_those_of_the_whole(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stats(name: str, *more: object) -> Path:
        arguments = ["--model", tiny_model, "--samples", 30, "--data.num-workers", 0, *more]
        code = cli.main([str(part) for part in ("generate", "stats", tmp_path / name, *arguments)])
        assert code == 0, capsys.readouterr().err
        return tmp_path / name

    whole, _ = gather.load_statistics(stats("whole", "--batch-size", 7))
    parts = [stats(f"part{i}", "--shard", f"{i}/4", "--batch-size", 3 + i) for i in range(4)]
    capsys.readouterr()
    assert cli.main(["generate", "stats", str(tmp_path / "merged"), "--merge", *map(str, parts)]) == 0
    merged, _ = gather.load_statistics(tmp_path / "merged")
    assert merged.count == whole.count == 30
    assert torch.allclose(merged.mean, whole.mean, atol=1e-6) and torch.allclose(merged.std, whole.std, atol=1e-6)
    code = cli.main(["generate", "stats", str(tmp_path / "x"), "--merge", str(parts[0]), str(parts[0])])
    assert code == 2 and "overlap" in capsys.readouterr().err

    tokens = []  # against numpy's, of the same pictures in one piece
    config = settled_config(tiny_model, tmp_path)
    space = open_space(config, "cpu")
    for batch in open_batches(config, space.model, tmp_path, start=0, stop=30):
        tokens.append(space.encode(batch.images))
    values = torch.cat(tokens).double().numpy()
    assert abs(values.mean(axis=0) - whole.mean.numpy()).max() < 1e-6
    assert abs(values.std(axis=0) - whole.std.numpy()).max() < 1e-6


def settled_config(model: Path, out: Path) -> GeneratorTrainConfig:
    config = replace(small_config(model, out), data=DataConfig(num_workers=0), batch_size=5)
    return settled(config, open_space(config, "cpu"))


def test_stopped_statistics_go_on(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", tiny_model, "--samples", 12, "--data.num-workers", 0, "--batch-size", 4, "--save-every", 4]

    def stats(name: str) -> int:
        return cli.main([str(part) for part in ("generate", "stats", tmp_path / name, *arguments)])

    assert stats("whole") == 0
    calls, original = [], gather.add_batch

    def stopping(*args: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        original(*args)  # type: ignore[arg-type]

    gather.add_batch = stopping  # type: ignore[assignment]
    try:
        assert stats("broken") == 130
    finally:
        gather.add_batch = original
    _, record = gather.load_statistics(tmp_path / "broken")
    assert record["position"] == 4 and not record["done"]
    assert stats("broken") == 0
    broken, whole = (gather.load_statistics(tmp_path / name)[0] for name in ("broken", "whole"))
    assert broken.count == 12 and torch.allclose(broken.std, whole.std)
    assert cli.main(["generate", "stats", str(tmp_path / "whole"), "--model", str(tiny_model), "--samples", "9"]) == 2
    assert "other statistics" in capsys.readouterr().err


def test_statistics_of_another_model_are_refused(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    statistics, record = gather.load_statistics(run / "statistics.safetensors")
    gather.save_statistics(tmp_path / "other", statistics, {**record, "fingerprint": "0" * 64})
    with pytest.raises(OpenVisionError, match="fingerprint"):
        train(small_config(tiny_model, tmp_path / "out", statistics=str(tmp_path / "other")), "cpu")
    with pytest.raises(OpenVisionError, match="does not exist"):
        train(small_config(tiny_model, tmp_path / "out", statistics=str(tmp_path / "none")), "cpu")
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(OpenVisionError, match="no token statistics"):
        gather.load_statistics(tmp_path / "junk")


def test_a_folder_comes_back_and_only_for_its_own_model(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    from openvision3.hub.load import load

    description = read_description(run / "generator")
    model = load(tiny_model, device="cpu")
    space = PictureSpace(model, description.space, description.resolution)
    dit, normalizer = load_weights(run / "generator", description, space)
    tensors = stored(run)
    assert all(torch.equal(tensor, tensors[f"dit.{name}"]) for name, tensor in dit.state_dict().items())
    assert torch.equal(normalizer.mean, tensors["normalizer.mean"])
    with torch.no_grad():
        next(model.encoder.parameters()).add_(0.01)
    with pytest.raises(OpenVisionError, match="trained on other tokens"):
        load_weights(run / "generator", description, PictureSpace(model, "tokens", 64))
    (tmp_path / "empty").mkdir()
    with pytest.raises(OpenVisionError, match="no generator folder"):
        read_description(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text(json.dumps({"format_version": 9, "generator": {}}))
    with pytest.raises(OpenVisionError, match="format_version"):
        read_description(tmp_path / "empty")


def test_a_model_without_decoder_or_text_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    from openvision3.model.openvision3 import OpenVision3

    config = OpenVision3.load(tiny_model).config
    for part, message in (("decoder", "has no decoder"), ("text_encoder", "has no text encoder")):
        folder = tmp_path / part
        whole = OpenVision3.load(tiny_model)
        OpenVision3(replace(config, **{part: None}), whole.vae, whole.tokenizer).save(folder)
        with pytest.raises(OpenVisionError, match=message):
            train(small_config(folder, tmp_path / "out"), "cpu")


def test_other_statistics_at_a_resume_are_refused(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    at = tmp_path / "run"
    shutil.copytree(run, at)
    shutil.rmtree(at / "generator")
    statistics, record = gather.load_statistics(at / "statistics.safetensors")
    statistics.update(torch.ones(5, *statistics.mean.shape))
    gather.save_statistics(at / "statistics.safetensors", statistics, record)
    with pytest.raises(OpenVisionError, match="statistics: not what it was"):
        train(small_config(tiny_model, at), "cpu")


def test_empty_statistics_are_refused() -> None:
    with pytest.raises(OpenVisionError):
        gather.enough(TokenStatistics(), "a file")


def test_classes_come_from_tars(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    members = {}
    for number in range(8):
        members[f"{number:04d}.png"] = picture(colour=("red", "green", "blue")[number % 3])
        members[f"{number:04d}.cls"] = str(number % 3).encode()
    write_tar(tmp_path / "tars" / "000000.tar", members)
    data = DataConfig(source=str(tmp_path / "tars"), caption_field=".cls", crop_min_area=0.8, num_workers=0)
    generator = replace(SMALL, condition="class", num_classes=3, text_embed_dim=0)
    config = small_config(tiny_model, tmp_path / "run", data=data, generator=generator, samples=8)
    folder = train(config, "cpu")
    assert stored(folder)["dit.classes.weight"].shape == (4, 16)
    named = replace(config, classes=("cat", "dog", "owl"), out=str(tmp_path / "named"))
    with pytest.raises(OpenVisionError, match="is no class of this generator"):
        train(named, "cpu")
    with pytest.raises(OpenVisionError, match="is no class of this generator"):
        train(replace(config, generator=replace(generator, num_classes=2), out=str(tmp_path / "few")), "cpu")


def test_a_run_starts_from_another_generator(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    config = small_config(tiny_model, tmp_path / "on", init=str(run), peak_lr=0.0, final_lr=0.0, warmup_samples=0)
    before, after = stored(run), stored(train(replace(config, samples=4), "cpu"))
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    wider = replace(SMALL, backbone=StackConfig(32, 2, 2))
    with pytest.raises(OpenVisionError, match="differ in"):
        train(small_config(tiny_model, tmp_path / "wider", init=str(run), generator=wider), "cpu")
