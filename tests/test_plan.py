"What a run will cost: what a forecast says, and what then happens."
import json, subprocess, sys
from dataclasses import replace

import pytest
import torch

from test_resume import one_thread       # noqa: F401, the fixture holds here too
from tiny_llm.basics import UserError
from tiny_llm.deployment import cli
from tiny_llm.training.config import TrainConfig
from tiny_llm.training.plan import expected_loss, forecast, line_through, training_bytes
from tiny_llm.training.run import Run
from tiny_llm.transformer.model import Transformer, preset


def test_memory_on_paper_counts_each_part():
    cfg = preset("tiny", ctx=64)
    n = sum(p.numel() for p in Transformer(cfg).parameters())
    plain = TrainConfig(steps=1, batch=4, ctx=64, optimizer="adamw", dtype="float32")
    paper = training_bytes(cfg, plain)
    assert (paper["weights"], paper["gradients"], paper["optimizer"], paper["bfloat16 copies"]) == (4 * n, 4 * n, 8 * n, 0)
    muon, low, twice = (training_bytes(cfg, replace(plain, **c)) for c in (dict(optimizer="muon"), dict(dtype="bfloat16"), dict(batch=8)))
    assert 4 * n < muon["optimizer"] < 8 * n and low["bfloat16 copies"] == 2 * n
    assert twice["activations"] == 2 * paper["activations"] and twice["gradient of the logits"] == 2 * 4 * 4 * 64 * 1024


REAL = """
import sys, torch
torch.set_num_threads(1)
import numpy as np
from tiny_llm.training.plan import _random_tokens
from tiny_llm.training.config import TrainConfig
from tiny_llm.training.run import Clock, most_memory, resolved
from tiny_llm.training.train import Training
from tiny_llm.transformer.model import Transformer, preset
model = Transformer(preset("tiny", vocab_size=4000, ctx=128))
config = resolved(TrainConfig(steps=4, batch=24, dtype="float32"), model, "cpu")
t = Training(model, None, _random_tokens(model.cfg, 96, 128), config, clock=Clock(steps=4))
for k in range(4): t.advance(k / 4)
print(most_memory("cpu"))
"""


def test_a_forecast_is_of_this_memory():
    "A quarter of the rows is tried; the rest is a straight line. Against a process that takes real steps."
    real = int(subprocess.run([sys.executable, "-c", REAL], capture_output=True, text=True, check=True).stdout)
    f = forecast(preset("tiny", vocab_size=4000, ctx=128), TrainConfig(steps=4, batch=24, dtype="float32"), "cpu", 4)
    assert abs(f.memory / real - 1) < 0.2, (f.memory, real)
    assert f.steps == 4 and f.seconds == pytest.approx(4 * f.seconds_per_step)


def test_a_forecast_that_cannot_be_made_says_so():
    with pytest.raises(UserError, match="longer than the model"): forecast(preset("tiny", ctx=64), TrainConfig(steps=1, ctx=128), "cpu", 1)


def test_the_line_through_two_trials():
    assert [line_through(3.0, 9.0, 4, b) for b in (1, 4, 7)] == [3.0, 9.0, 15.0] and line_through(3.0, 0.0, 1, 9) == line_through(3.0, 2.0, 4, 9) == 3.0


def ended(N, P, loss, floor=None):
    return Run(None, metrics=[], summary=dict(stopped="finished", tokens=N, params=P, val=dict(nats_per_token=loss, floor_nats_per_token=floor)), config=TrainConfig())


def test_the_loss_to_expect_comes_from_past_runs():
    def law(N, P): return 0.25 + 50 * N ** -0.4 * P ** -0.1
    runs = [ended(N, P, law(N, P), 0.25) for N, P in ((1e4, 1e5), (4e4, 1e5), (4e4, 1e6), (1e5, 1e6))]
    low, likely, high = expected_loss(runs, 3e5, 2e5)
    assert likely == pytest.approx(law(2e5, 3e5), rel=1e-6) and low == pytest.approx(high)
    bent = [*runs[:3], ended(1e5, 1e6, 1.3 * law(1e5, 1e6), 0.25)]
    low, likely, high = expected_loss(bent, 3e5, 2e5)
    assert high / low > 1.2
    assert expected_loss(runs[:1], 1e5, 1e5) is None
    with pytest.raises(UserError, match="at its floor"): expected_loss([runs[0], ended(1e5, 1e5, 0.2, 0.25)], 1e5, 1e5)


def test_plan_prints_a_forecast():
    code, out, err = cli.try_line("plan --preset tiny --ctx 32 --batch 2 --steps 100 --dtype float32 --device cpu --seconds 1", show=False)
    assert code == 0 and all(word in out for word in ("tiny", "memory", "speed", "100 steps")), out + err
    code, out, err = cli.try_line("plan --preset tinny", show=False)
    assert code == 2 and "tiny" in err


# Slow: five presets as they come, each forecast and then trained for a few steps ------------------------------------

STEPS = """
import json, sys, time, statistics, torch
from tiny_llm.training.plan import _random_tokens
from tiny_llm.training.config import TrainConfig
from tiny_llm.training.run import most_memory, resolved
from tiny_llm.training.train import Training
from tiny_llm.transformer.model import Transformer, preset
from tiny_llm.training.run import Clock
name, ctx, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
model = Transformer(preset(name, ctx=ctx))
config = resolved(TrainConfig(steps=6), model, "cpu")
t = Training(model, None, _random_tokens(model.cfg, 6 * config.batch, ctx), config, clock=Clock(steps=6))
times = []
for k in range(6):
    start = time.perf_counter()
    t.advance(k / 6)
    times.append(time.perf_counter() - start)
print(json.dumps(dict(seconds=min(times[1:]), bytes=most_memory("cpu"))))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name, ctx", [("tiny", 128), ("quick", 256), ("story", 320), ("medium", 512), ("base", 512)])
def test_five_presets_take_the_memory_that_was_forecast(name, ctx):
    "Memory within a fifth. The seconds are printed: what they are depends on who else uses the machine."
    f = forecast(preset(name, ctx=ctx), TrainConfig(steps=6), "cpu", 20)
    said = subprocess.run([sys.executable, "-c", STEPS, name, str(ctx), str(torch.get_num_threads())], capture_output=True, text=True, check=True).stdout
    real = json.loads(said)
    print(f"{name}: {f.seconds_per_step:.3f} s forecast, {real['seconds']:.3f} s taken; {f.memory / 1e6:.0f} MB forecast, {real['bytes'] / 1e6:.0f} MB taken")
    assert abs(f.memory / real["bytes"] - 1) < 0.2
