"What a run will cost: what a forecast says, and what then happens."
import json, subprocess, sys
from dataclasses import replace

import pytest
import torch

from tiny_llm.basics import UserError
from tiny_llm.deployment import cli
from tiny_llm.training.config import TrainConfig
from tiny_llm.training.plan import expected_loss, forecast, line_through, on_gpus, training_bytes
from tiny_llm.training.run import Run
from tiny_llm.training.scale import on_paper
from tiny_llm.transformer.model import Transformer, preset

pytestmark = pytest.mark.usefixtures("one_thread")


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


# On paper ------------------------------------------------------------------------------------------------------------

def test_on_gpus_is_what_the_arithmetic_says():
    "Each setting reaches `on_paper`; days for given steps, or for 20 tokens per weight."
    config = TrainConfig(preset="small-llm-4b", batch=3, ctx=1024, recompute=True)
    lines = on_gpus(config, "8, 64", "memory=24e9,peak=1e14,parallel=ddp,node=4,size=2", vocab_size=32_000).splitlines()
    cfg = preset("small-llm-4b", ctx=1024, vocab_size=32_000)
    for n, line in zip((8, 64), lines[-2:], strict=True):
        p = on_paper(cfg, n, 3, "ddp", True, peak=1e14, memory=24e9, node=4, size=2)
        assert line.split() == [str(n), f"{p['total'] / 1e9:,.1f}", "no", f"{p['seconds']:.3g}", f"{p['messages'] / p['products']:.2f}", f"{p['of_peak']:.0%}",
                                f"{p['tokens_per_s']:,.0f}", f"{20 * p['params'] / p['tokens_per_s'] / 86_400:,.3g}"]
    assert f"{p['params']:,} parameters, 3 x 1,024 tokens" in lines[0] and "recomputed" in lines[0] and "node 4" in lines[1]
    steps = on_gpus(replace(config, steps=1000), "64").splitlines()[-1].split()
    assert float(steps[-1]) == pytest.approx(1000 * on_paper(preset("small-llm-4b", ctx=1024), 64, 3, recompute=True)["seconds"] / 86_400, rel=5e-3)
    shape = on_gpus(TrainConfig(model=dict(vocab_size=300, ctx=32, d_model=16, n_layers=1, n_heads=2)), "1").splitlines()
    assert "1 x 32 tokens" in shape[0] and shape[-1].split()[2] == "yes"


@pytest.mark.parametrize("gpus, gpu, more, words", [
    ("8", None, dict(preset=None), "name a preset"), ("8,x", None, {}, "give numbers with commas"), ("0", None, {}, "gpus is 0"), (None, "node=4", {}, "say with gpus how many"),
    ("8", "memroy=8e9", {}, "Did you mean 'memory'"), ("8", "memory=80GB", {}, "give a number"), ("8", "node=1.5", {}, "whole number"), ("8", "peak=-1", {}, "peak is -1"),
    ("8", "parallel=dpp", {}, "choose one of ddp, fsdp"), ("8", None, dict(accumulate=2), "leave accumulate out")])
def test_a_table_that_cannot_be_made_says_so(gpus, gpu, more, words):
    with pytest.raises(UserError, match=words): on_gpus(TrainConfig(**dict(preset="tiny") | more), gpus, gpu)


def test_plan_on_paper_measures_nothing(monkeypatch):
    import tiny_llm.training.plan as module
    for name in ("forecast", "plan", "trial"): monkeypatch.setattr(module, name, None)
    code, out, err = cli.try_line("plan --preset small-llm-7b --ctx 512 --batch 2 --gpus 8,512 --gpu reached=0.5 --vocab_size 1000", show=False)
    assert code == 0, err
    want = on_gpus(TrainConfig(preset="small-llm-7b", ctx=512, batch=2), "8,512", "reached=0.5", 1000)
    assert out == want + "\n"
    assert cli.try_line("plan --preset tiny --gpu node=4", show=False)[0] == 2
