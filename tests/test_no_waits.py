"""What is skipped is decided on the device: the step asks it nothing, and is the same to the last bit."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from tiny_run import make_vae, tiny_config
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from openvision3.config import OptimizerConfig, VAEConfig
from openvision3.training import loop
from openvision3.training.ema import Average
from openvision3.training.optimizer import build_optimizer, set_learning_rate, step_unless

WAITS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)


class Asked(TorchDispatchMode):
    """Counts the operators that a host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.settling = 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in WAITS and not self.settling
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> VAEConfig:
    return make_vae(tmp_path_factory.mktemp("vae"))


def test_a_step_waits_for_the_one_before_alone(tmp_path: Path, vae: VAEConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole texts, as packing looks at ids, which are on the host."""
    with Asked() as control:
        assert bool(torch.ones(())) and float(torch.ones(())) == 1
    assert control.count == 2
    train_step, settle, counts, settled = loop.train_step, loop.settle, [], []

    def counted(*arguments: Any) -> dict[str, Tensor]:
        with Asked() as asked:

            def apart(watch: Any, *rest: Any) -> None:
                settled.append(watch._seen.step if watch._seen else 0)
                asked.settling = True
                settle(watch, *rest)
                asked.settling = False

            monkeypatch.setattr(loop, "settle", apart)
            found = train_step(*arguments)
        monkeypatch.setattr(loop, "settle", settle)
        counts.append(asked.count)
        return found

    monkeypatch.setattr(loop, "train_step", counted)
    config = tiny_config(tmp_path / "run", vae, 4, ema=0.5, log_every=100, checkpoint_every=0, eval_every=0)
    stage1, stage2 = replace(config.stage1, samples=16), replace(config.stage2, samples=0)
    loop.train(replace(config, stage1=stage1, stage2=stage2, pack_text=False, meter_samples=0), "cpu")
    assert counts == [0] * 4
    assert settled == [0, 0, 2, 3]  # the first step is logged, and so settled


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_flag_of_one_changes_nothing_and_of_zero_is_a_step(kind: Literal["adamw", "muon"]) -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    optimizers = [build_optimizer(model, OptimizerConfig(kind=kind)) for model in models]
    averages = [Average(dict(model.named_parameters()), 0.5) for model in models]
    zero, one = torch.zeros(()), torch.ones(())
    for step in (1, 2, 3):
        for model, optimizer, average in zip(models, optimizers, averages, strict=True):
            set_learning_rate(optimizer, 0.1)
            model(torch.ones(2, 4) * step).square().sum().backward()
            if model is models[0]:
                optimizer.step()
            else:
                step_unless(optimizer, zero)
            average.update(step, zero)
            optimizer.zero_grad()
        model, optimizer, average = models[1], optimizers[1], averages[1]
        before = everything(model, optimizer, average)
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, float("nan"))
        step_unless(optimizer, one)
        average.update(step, one)
        optimizer.zero_grad()
        after = everything(model, optimizer, average)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) and len(before) >= 16
    both = [everything(*parts) for parts in zip(models, optimizers, averages, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))
    assert not torch.equal(averages[0].values()["0.weight"], models[0].get_parameter("0.weight"))


def everything(model: nn.Module, optimizer: torch.optim.Optimizer, average: Average) -> list[Tensor]:
    """Copies of weights, averages and the optimizer's state."""
    state = [value for group in optimizer.state.values() for value in group.values() if isinstance(value, Tensor)]
    return [tensor.detach().clone() for tensor in (*model.parameters(), *average.values().values(), *state)]
