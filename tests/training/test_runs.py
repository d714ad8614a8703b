"""Runs: settings and what is refused, the order of samples, states that go on bit by bit, metrics."""

import argparse
import errno
import json
import math
import signal

import pytest
import torch
from torch import nn

from joyedit.command import train
from joyedit.training.examples import Order
from joyedit.training.loop import generator, parts
from joyedit.training.run import Run, Stopping, rate_at
from joyedit.training.settings import Settings, read_settings, settle
from joyedit.training.systems import Sample
from joyedit.training.turns import turns

FOUND = {"model": "abc", "set": "3 examples, 12"}


def made(**changes):
    return Settings(**{"data": 'da"ta', "model": "m\\n", "basesize": [512, 768], "lr": 3e-5, **changes})


def test_settings_are_written_and_read(tmp_path):
    settings = made(full=True, trigger="ein größeres \x7f\n Bild", ema=0.999)
    settle(tmp_path, settings, FOUND)
    assert Settings(**read_settings(tmp_path / "run.toml")) == settings
    settle(tmp_path, settings, FOUND)  # the same command goes on


def test_other_settings_and_another_base_are_refused(tmp_path):
    settle(tmp_path, made(), FOUND)
    before = (tmp_path / "run.toml").read_bytes()
    with pytest.raises(ValueError, match=r"rank was 32 and is now 8; seed was 0 and is now 3"):
        settle(tmp_path, made(rank=8, seed=3), FOUND)
    with pytest.raises(ValueError, match="the model was abc and is now abd"):
        settle(tmp_path, made(), {**FOUND, "model": "abd"})
    with pytest.raises(ValueError, match="the set was 3 examples, 12 and is now 4 examples, 13"):
        settle(tmp_path, made(), {**FOUND, "set": "4 examples, 13"})
    assert (tmp_path / "run.toml").read_bytes() == before
    settle(tmp_path, made(device="cpu", save_every=7, steps=4000), FOUND)
    settle(tmp_path / "2", made(lr_schedule="cosine"), FOUND)
    with pytest.raises(ValueError, match="steps was 2000 and is now 4000"):  # the rate depends on it
        settle(tmp_path / "2", made(lr_schedule="cosine", steps=4000), FOUND)


@pytest.mark.parametrize(
    "changes",
    [
        {"rank": 0},
        {"steps": 0},
        {"batch": 4, "accumulate": 3},
        {"lr": 0.0},
        {"lr": math.nan},
        {"base": "int4"},
        {"sigma": "cosine"},
        {"dropout": 1.0},
        {"ema": -0.1},
        {"frames": 12},
        {"basesize": (500,)},
        {"full": True, "base": "bf16"},
    ],
)
def test_values_that_are_refused(changes):
    with pytest.raises(ValueError, match=next(reversed(changes))):
        made(**changes)


def test_kinds_that_are_refused(tmp_path):
    for changes in ({"rank": "8"}, {"rank": True}, {"full": 1}, {"clip": None}):
        with pytest.raises(TypeError, match=next(iter(changes))):
            made(**changes)
    (tmp_path / "run.toml").write_text("rnak = 3\n")
    with pytest.raises(ValueError, match="did you mean 'rank'|rank"):
        read_settings(tmp_path / "run.toml")


def test_every_sample_comes_once_in_an_epoch_and_alike_ones_together():
    forms = ["a"] * 7 + ["b"] * 5 + ["c"]
    order = Order(forms, 3, seed=1)
    assert len(order) == 5
    epochs = [[order[step] for step in range(5 * epoch, 5 * epoch + 5)] for epoch in range(3)]
    for batches in epochs:
        assert {sample for batch in batches for sample in batch} == set(range(13))
        assert all(len(batch) == 3 for batch in batches)
        assert sum(len({forms[sample] for sample in batch}) == 1 for batch in batches) >= 3
    assert epochs[0] != epochs[1]
    assert [Order(forms, 3, seed=1)[step] for step in (14, 3, 0)] == [
        epochs[2][4],
        epochs[0][3],
        epochs[0][0],
    ]
    assert Order(forms, 3, seed=2)[0] != order[0] or Order(forms, 3, seed=2)[1] != order[1]
    assert all(len(Order(["a"], 4, 0)[step]) == 4 for step in range(3))


def test_what_is_drawn_depends_on_the_place_alone():
    def draw(*place):
        return torch.randn(3, generator=generator(*place)).tolist()

    assert draw(0, 5, 1) == draw(0, 5, 1)
    assert len({tuple(draw(*place)) for place in [(0, 5, 1), (0, 5, 2), (0, 6, 1), (1, 5, 1)]}) == 4


def test_parts_hold_samples_of_one_form():
    def sample(width, length):
        return Sample(torch.zeros(1, width), torch.zeros(1), torch.zeros(()), {"prompt": torch.zeros(length)})

    samples = [sample(2, 3), sample(2, 4), sample(2, 3), sample(5, 3), sample(2, 3)]
    found = parts(samples, 2)
    assert sorted(len(part) for part in found) == [1, 1, 1, 2]
    assert sorted(map(id, samples)) == sorted(id(one) for part in found for one in part)
    assert all(len({(p.latents.shape, p.given["prompt"].shape) for p in part}) == 1 for part in found)


def test_rates():
    assert [rate_at(step, 10, 1.0, "constant", 4) for step in (0, 1, 3, 4, 9)] == [0.25, 0.5, 1, 1, 1]
    assert rate_at(7, 10, 2.0, "linear", 4) == pytest.approx(1.0)
    assert rate_at(5, 9, 2.0, "cosine", 1) == pytest.approx(1 + math.cos(math.pi / 2))
    held = [rate_at(step, 8, 2.0, "cosine", 1, held=0.5, least=0.1) for step in range(9)]
    fall = [2 * (0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2) for share in (0, 0.25, 0.5, 0.75, 1)]
    assert held == pytest.approx([2, 2, 2, 2, *fall])
    assert rate_at(6, 8, 1.0, "linear", 0, held=0.5, least=0.5) == pytest.approx(0.75)


class Toy:
    """A training of one small layer: what a step sees depends on the step alone."""

    def __init__(self, folder, decay=0.9):
        torch.manual_seed(3)
        self.layer = nn.Linear(5, 4)
        self.optimizer = torch.optim.AdamW(self.layer.parameters(), lr=0.01)
        self.run = Run(folder, dict(self.layer.named_parameters()), self.optimizer, decay)

    def steps(self, until, save_at=()):
        while self.run.step < until:
            x = torch.randn(6, 5, generator=generator("toy", self.run.step)) + torch.rand(())
            loss = self.layer(x).square().mean()
            loss.backward()
            self.run.update(1.0)
            self.run.log(loss=loss.item())
            if self.run.step in save_at:
                self.run.save()
        return self

    def facts(self):
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        average = list(self.run.average.values())
        return [*self.layer.parameters(), *average, *moments, torch.get_rng_state()]


def test_a_run_goes_on_bit_by_bit(tmp_path):
    whole = Toy(tmp_path / "whole").steps(9)
    wanted = [fact.clone() for fact in whole.facts()]
    Toy(tmp_path / "cut").steps(6, save_at=[4])  # dies at 6
    again = Toy(tmp_path / "cut")
    assert again.run.step == 4 and again.run.resumed
    again.steps(9)
    assert all(torch.equal(a, b) for a, b in zip(wanted, again.facts(), strict=True))
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "cut")]
    assert lines[0] == lines[1] and lines[0].count("\n") == 9


def test_metrics_are_cut_back_to_the_state(tmp_path):
    Toy(tmp_path).steps(3)
    Toy(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == ""  # nothing was saved
    Toy(tmp_path).steps(4, save_at=[2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "sigma": 0.5, "valid_loss": 1.0}\n{"step": 5, "lo')
    Toy(tmp_path)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 2]


def test_a_state_is_tensors_and_numbers_alone(tmp_path):
    Toy(tmp_path).steps(2, save_at=[2])
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["step"] == 2 and set(state["parameters"]) == {"weight", "bias"}


def test_a_full_disk_leaves_the_last_state(tmp_path, monkeypatch):
    toy = Toy(tmp_path).steps(3, save_at=[3])
    before = (tmp_path / "state.pt").read_bytes()

    def fill(state, path):
        path.write_bytes(before[: len(before) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", fill)
    toy.steps(4)
    with pytest.raises(OSError, match=r"No space left on device: .*state\.pt cannot be written"):
        toy.run.save()
    monkeypatch.undo()
    assert (tmp_path / "state.pt").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "state.pt"]
    assert Toy(tmp_path).run.step == 3


def test_a_state_of_other_parameters_is_refused(tmp_path):
    Toy(tmp_path).steps(1, save_at=[1])
    layer = nn.Linear(5, 3)
    with pytest.raises(ValueError, match="is of 2 parameters"):
        Run(tmp_path, dict(layer.named_parameters()), torch.optim.AdamW(layer.parameters()))


def test_the_average_stands_in_and_goes_away_again(tmp_path):
    toy = Toy(tmp_path).steps(5)
    live = toy.layer.weight.detach().clone()
    with toy.run.averaged():
        assert torch.equal(toy.layer.weight, toy.run.average["weight"])
        assert not torch.equal(toy.layer.weight, live)
    assert torch.equal(toy.layer.weight, live)
    assert toy.layer.weight.requires_grad


def test_the_average_is_that_of_the_formula(tmp_path):
    toy = Toy(tmp_path, decay=0.75)
    mean, torch_mean = toy.layer.weight.detach().double().clone(), None
    for step in range(1, 30):
        toy.steps(step)
        decay = min(0.75, step / (9 + step))
        mean = decay * mean + (1 - decay) * toy.layer.weight.detach().double()
        torch_mean = toy.run.average["weight"]
    assert torch.allclose(torch_mean.double(), mean, atol=1e-6)


@pytest.fixture
def signals():
    """The SIGTERMs that would have ended the process."""
    noted = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: noted.append(number))
    yield noted
    signal.signal(signal.SIGTERM, before)


def test_signals_wait_for_the_loop(signals):
    with Stopping() as stopping:
        signal.raise_signal(signal.SIGTERM)
        assert stopping.number == signal.SIGTERM and not signals
    assert signals == [signal.SIGTERM]
    with pytest.raises(KeyError), Stopping():
        signal.raise_signal(signal.SIGTERM)
        raise KeyError  # what went wrong is what is told
    signal.raise_signal(signal.SIGTERM)
    assert len(signals) == 2


def looks(folder, steps, stop_at=None):
    """What was due in each turn of a training: v every 3 steps, s saved every 4."""
    found, run = [], Toy(folder).run
    with Stopping() as stopping:
        for turn in turns(run, steps, stopping, disable_progress=True):
            saved = turn.saves(4)
            found.append(f"{turn.step}{'v' * turn.due(3)}{'s' * saved}{'n' * turn.due(0)}")
            if saved:
                run.save()
            if turn.ends:
                break
            run.step += 1
            if run.step == stop_at:
                signal.raise_signal(signal.SIGTERM)
    return found


def test_there_is_a_turn_before_each_step_and_one_after_the_last(tmp_path, signals):
    assert looks(tmp_path, 7) == ["0v", "1", "2", "3v", "4s", "5", "6v", "7vs"]
    assert looks(tmp_path, 7) == ["7"]
    assert looks(tmp_path, 9) == ["7", "8s", "9vs"]
    assert looks(tmp_path / "stopped", 9, stop_at=3) == ["0v", "1", "2", "3vs"] and signals
    assert looks(tmp_path / "stopped", 4) == ["3", "4vs"]


def test_every_setting_is_an_option():
    parser = argparse.ArgumentParser()
    train.add_options(parser)
    options = {action.dest for action in parser._actions}
    assert options == {*Settings.names(), "help", "out", "config", "check"}
