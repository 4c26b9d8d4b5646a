"What a training does with its settings, and what it remembers across a pause."
import json, math

import pytest
import torch

from test_resume import go, one_thread, parts, weights       # noqa: F401, the fixture holds here too
from tiny_llm.basics import UserError
from tiny_llm.text.batches import tokenize
from tiny_llm.training.config import TrainConfig, changed
from tiny_llm.training.folder import load
from tiny_llm.training.run import Clock, Run, resolved
from tiny_llm.training.train import Training, evaluate_loss, loss_of, train, train_and_val

PLAIN = TrainConfig(steps=9, batch=2, ctx=64, lr=1e-2, optimizer="adamw", weight_decay=0.01, dtype="float32", compile=False)


def begun(folder=None, val=None, **settings):
    model, tok, docs = parts()
    if folder: folder.mkdir(exist_ok=True)
    return Training(model, tok, tokenize(docs, tok), changed(PLAIN, **settings), folder, val and tokenize(docs[:2], tok), None, Clock(steps=9))


def after(n=3, **settings):
    "The weights after some steps."
    t = begun(**settings)
    for k in range(n): t.advance(k / n)
    return torch.cat([w.detach().flatten() for w in t.model.parameters()])


def test_every_setting_of_a_step_is_heeded():
    plain = after()
    assert torch.equal(plain, after())
    for name, value in dict(seed=1, lr=2e-2, weight_decay=0.5, betas=(0.5, 0.5), optimizer="muon", warmup=0.9, decay="constant", clip=1e-3, batch=3, dtype="bfloat16").items():
        assert not torch.equal(plain, after(**{name: value})), name


def test_a_step_along_what_is_no_number_is_not_taken():
    t = begun()
    before = [w.detach().clone() for w in t.model.parameters()]
    for bad in (math.nan, math.inf):
        def loss(model, b, dtype):
            loss = loss_of(model, b)
            next(model.parameters()).register_hook(lambda g: torch.full_like(g, bad))
            return loss
        t.loss = loss
        t.advance(0)
        assert all(torch.equal(a, b) for a, b in zip(before, t.model.parameters())) and not t.opt.state_dict()
        assert "no step was taken" in t.warnings["skipped"] and t.tokens == 0
    assert (t.step, t.skipped, t.stop) == (2, 2, None)


def test_an_evaluation_leaves_the_model_as_it_was():
    model, tok, docs = parts()
    for training in (True, False):
        model.train(training)
        exact, rounded = (evaluate_loss(model, tok, docs[:4], dtype=dtype)["nats_per_token"] for dtype in (torch.float32, torch.bfloat16))
        assert model.training == training and exact != rounded and abs(exact - rounded) < 0.05
    with torch.no_grad(): next(model.parameters())[:] = math.nan
    with pytest.raises(UserError, match="NaN or infinite"): evaluate_loss(model, tok, docs[:4])


def test_best_is_the_lowest_loss(tmp_path, monkeypatch):
    "Also across a pause; what is kept beside it is the last."
    from tiny_llm.training import train as trainer
    given, dtypes, real = [6.0, 4.0, 5.0, 4.5, 4.2, 4.4], [], trainer.evaluate_loss
    def evaluate(*args, dtype=torch.float32, **kw):
        dtypes.append(dtype)
        return real(*args, dtype=dtype, **kw) | dict(nats_per_token=given[len(dtypes) - 1])
    monkeypatch.setattr(trainer, "evaluate_loss", evaluate)
    settings = dict(steps=5, batch=2, eval_every=1, dtype="bfloat16")
    go(tmp_path/"run", stop_at=2, **settings)
    steps = [json.loads((tmp_path/"run"/name/"state/state.json").read_text())["step"] for name in ("best", "last")]
    assert steps == [1, 2]
    run = go(tmp_path/"run", resume=True)
    state = {name: json.loads((tmp_path/"run"/name/"state/state.json").read_text()) for name in ("best", "last")}
    assert (state["best"]["step"], state["last"]["step"], state["last"]["best"], state["last"]["best_step"]) == (1, 5, 4.0, 1)
    assert dtypes[-1] == torch.float32 and set(dtypes[:-1]) == {torch.bfloat16}, "the last figures are exact"
    assert [r["val"] for r in run.metrics if "val" in r][0] == 6.0 and run.metrics[0]["step"] == 0


def test_what_is_remembered_across_a_pause(tmp_path):
    "Tokens, time, budget, best loss and lines; those logged behind the checkpoint are taken out."
    t = begun(tmp_path/"run", val=True)
    t.clock.before, t.clock.lost, t.clock.reserve = 500.0, 7.0, 9.0
    for _ in range(2): t.advance(0)
    t.evaluate()
    t.log(note="at the checkpoint")
    t.advance(0)
    t.log(note="behind it")
    again = begun(tmp_path/"run", val=True)
    again.restore()
    assert (again.step, again.best, again.best_step, again.clock.lost, again.clock.reserve) == (2, t.best, 2, 7.0, 9.0) and again.clock.before >= 500
    assert 0 < again.tokens < t.tokens and again.tokens == t.metrics[0]["tokens"]
    lines = [json.loads(line) for line in (tmp_path/"run/metrics.jsonl").read_text().splitlines()]
    assert lines == again.metrics and [r["step"] for r in lines] == [2, 2]
    again.advance(0)
    assert all(torch.equal(a, b) for a, b in zip(t.model.parameters(), again.model.parameters()))


def test_a_pause_comes_at_its_step(tmp_path):
    run = go(tmp_path/"run", steps=6, batch=2, stop_at=3)
    assert (run.summary["stopped"], run.summary["step"]) == ("paused", 3)


def test_conversations_are_held_out_by_the_seed():
    _, tok, _ = parts()
    talks = [tok.chat([dict(role="user", content=f"{n}"), dict(role="assistant", content=f"{n}.")]) for n in range(60)]
    def held(seed): return train_and_val(talks, None, tok, 10_000, seed)[1].sha256()
    first = tokenize(talks[:3], tok).sha256()
    assert held(1) == held(1) and len({held(seed) for seed in range(4)} | {first}) > 3


def test_threads_are_put_back():
    before = torch.get_num_threads()
    go(steps=1, batch=2, threads=before + 1)
    assert torch.get_num_threads() == before


def test_muon_looks_ahead_and_multiplies_the_short_side():
    from torch.utils.flop_counter import FlopCounterMode
    from tiny_llm.training.optim import Muon, newton_schulz
    torch.manual_seed(0)
    p, first, second = torch.nn.Parameter(torch.randn(6, 4)), torch.randn(6, 4), torch.randn(6, 4)
    want = p.detach() - 0.02 * 6 ** 0.5 * newton_schulz(first.lerp(0.05 * first, 0.95), 5)
    mean = 0.95 * 0.05 * first + 0.05 * second
    want = want - 0.02 * 6 ** 0.5 * newton_schulz(0.05 * second + 0.95 * mean, 5)
    opt = Muon([p], lr=0.1, weight_decay=0.0)
    for p.grad in (first, second): opt.step()
    torch.testing.assert_close(p.detach(), want, atol=2e-3, rtol=0)
    def products(*shape):
        with FlopCounterMode(display=False) as count: newton_schulz(torch.randn(shape), 1)
        return count.get_total_flops()
    assert products(8, 64) == products(64, 8) < products(64, 64) / 8


def test_rare_words_move_little_beside_muon():
    "At a gradient of 1e-6 Adam would take whole steps; the tables' epsilon of 1e-3 makes them a thousandth."
    from tiny_llm.training.optim import make_optimizer
    model, _, _ = parts()
    table = next(m for m in model.modules() if isinstance(m, torch.nn.Embedding)).weight
    before, opt = table.detach().clone(), make_optimizer(model, "muon", 0.01)
    for w in model.parameters(): w.grad = torch.full_like(w, 1e-6)
    opt.step(1.0)
    assert 0 < (table - before).abs().max() < 1e-4
