"What a training does with its settings, and what it remembers across a pause."
import json, math, shutil

import pytest
import torch

from test_resume import go, parts, weights
from tiny_llm.basics import UserError
from tiny_llm.text.batches import tokenize
from tiny_llm.training.config import TrainConfig, changed
from tiny_llm.training.folder import load
from tiny_llm.training.config import resumed
from tiny_llm.training.run import Clock, Run, read_metrics, resolved
from tiny_llm.training.train import Training, evaluate_loss, glimpse, loss_of, train, train_and_val
from tiny_llm.transformer.model import Transformer, preset

pytestmark = pytest.mark.usefixtures("one_thread")

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


def test_a_run_is_evaluated_at_its_own_context():
    t = begun(val=True, ctx=16)
    t.evaluate()
    short, long = (evaluate_loss(t.model, t.tok, t.val, ctx=ctx, floor=1.0) for ctx in (16, 64))
    assert t.scores["nats_per_token"] == short["nats_per_token"] != long["nats_per_token"]
    assert short["gap"] == pytest.approx(short["nats_per_token"] - 1.0)


def test_an_evaluation_is_capped():
    "As many whole documents as fit, and their floor; of a first one that is too long, the beginning."
    _, tok, docs = parts()
    _, held, floor = train_and_val(docs, docs[:40], tok, 1000)
    assert 1 < len(held) < 40 and 500 < held.n_tokens <= 1000
    assert floor * held.n_tokens == pytest.approx(sum(d.nats for d in docs[:len(held)]))
    _, held, _ = train_and_val(docs, docs[:40], tok, 20)
    assert len(held) == 1 and held.n_tokens < 40


def test_a_sample_moves_no_random_state():
    model, tok, _ = parts()
    before = torch.get_rng_state()
    said = [glimpse(model, tok, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(before, torch.get_rng_state()) and said[0] == said[1] != said[2]


def test_fewer_threads_must_save_a_tenth(monkeypatch):
    from tiny_llm.training import run as runs
    t = begun()
    for fewest, seconds in (2, {4: 1.0, 2: 0.5, 1: 0.8}), (1, {4: 1.0, 2: 0.9, 1: 0.7}), (4, {4: 1.0, 2: 0.95, 1: 0.93}):
        monkeypatch.setattr(runs, "_timed_step", lambda t, loss, seconds=seconds: seconds[torch.get_num_threads()])
        torch.set_num_threads(4)
        assert runs._fastest_threads(t) == fewest


def test_a_run_goes_on_with_its_own_text_and_shape(tmp_path):
    go(tmp_path/"run", steps=4, batch=2, stop_at=2)
    model, tok, docs = parts()
    def again(model, docs): return train(model, tok, docs, val=False, out=tmp_path/"run", device="cpu", resume=True, quiet=True)
    with pytest.raises(UserError, match="the text is not the one that the run in .* was started with"): again(model, docs[1:])
    wide = Transformer(preset("tiny", vocab_size=len(tok), ctx=64, d_model=64))
    with pytest.raises(UserError, match="the model's d_model is 64, but the run in .* was started with 32"): again(wide, docs)
    memory = tmp_path/"run/last/state/optimizer.safetensors"
    shutil.rmtree(tmp_path/"run/.previous")            # a whole checkpoint before it would take its place
    memory.write_bytes(memory.read_bytes()[:-1] + bytes([memory.read_bytes()[-1] ^ 1]))
    with pytest.raises(UserError, match="optimizer.safetensors is missing or damaged"): again(model, docs)


def test_settings_of_a_run(tmp_path):
    "The batch follows from the run's context; how often is logged may change at a resume; a damaged line is no end."
    assert resolved(TrainConfig(steps=5, ctx=32), parts()[0], "cpu").batch == 2304 // 32
    assert resumed(TrainConfig(steps=5, log_every=2), dict(log_every=3), "r") == TrainConfig(steps=5, log_every=3)
    whole, cut = '{"step": 1}\n{"step": 2}\n{"st', '{"step": 1}\n{"st\n{"step": 2}\n'
    (tmp_path/"metrics.jsonl").write_text(whole)
    assert [r["step"] for r in read_metrics(tmp_path/"metrics.jsonl")] == [1, 2]
    (tmp_path/"metrics.jsonl").write_text(cut)
    with pytest.raises(UserError, match="line 2 of .* is damaged"): read_metrics(tmp_path/"metrics.jsonl")
    with pytest.raises(UserError, match="warmup is 1"): TrainConfig(warmup=1)
    assert changed(TrainConfig(minutes=3.0), steps=None) == TrainConfig(minutes=3.0)


def test_limit_holds_for_what_is_held_out(monkeypatch):
    from tiny_llm.text import large_corpora, sources
    model, tok, docs = parts()
    limits = []
    monkeypatch.setattr(large_corpora, "read", lambda *a, **kw: iter(docs))
    monkeypatch.setattr(sources, "held_out", lambda name, limit, *how: limits.append(limit) or docs[:2])
    train(model, tok, steps=1, batch=2, limit=60, device="cpu", compile=False, quiet=True)
    assert limits == [3]


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    for bad in (math.nan, math.inf):
        t = begun(tmp_path/"run")
        with torch.no_grad(): next(t.model.parameters())[0, 0] = bad
        with pytest.raises(UserError, match="weights are NaN or infinite and are not saved"): t.checkpoint(best=True)
        assert not list((tmp_path/"run").iterdir())


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
    for _ in range(2): t.advance(0.5)
    t.evaluate()
    t.log(note="at the checkpoint")
    t.advance(0.5)
    t.log(note="behind it")
    again = begun(tmp_path/"run", val=True)
    again.restore()
    assert (again.step, again.best, again.best_step, again.clock.lost, again.clock.reserve) == (2, t.best, 2, 7.0, 9.0) and again.clock.before >= 500
    assert 0 < again.tokens < t.tokens and again.tokens == t.metrics[0]["tokens"]
    lines = [json.loads(line) for line in (tmp_path/"run/metrics.jsonl").read_text().splitlines()]
    assert lines == again.metrics and [r["step"] for r in lines] == [2, 2]
    again.advance(0.5)
    assert all(torch.equal(a, b) for a, b in zip(t.model.parameters(), again.model.parameters()))


def test_a_pause_comes_at_its_step(tmp_path):
    run = go(tmp_path/"run", steps=6, batch=2, stop_at=3)
    assert (run.summary["stopped"], run.summary["step"]) == ("paused", 3)
    assert run.summary["train_loss"] == [r["loss"] for r in run.metrics if "loss" in r][-1]


def test_a_run_is_saved_when_asked(tmp_path, monkeypatch):
    from tiny_llm.training import run as runs
    saved, write = [], runs.write_checkpoint
    monkeypatch.setattr(runs, "write_checkpoint", lambda *a: a[0].name == "last" and saved.append(a[4]["step"]) or write(*a))
    run = go(tmp_path/"run", steps=9, batch=2, save_every=2, eval_every=5, log_every=3)
    assert saved == [0, 2, 4, 5, 6, 8, 9] and [r["step"] for r in run.metrics if "val" in r] == [0, 5, 9]
    assert [r["step"] for r in run.metrics if "loss" in r] == [3, 5, 6, 9]


def test_time_that_was_lost_before_a_pause_counts():
    t = begun()
    t.clock.lost = 7.0
    t.prepare()
    t.first_look()
    assert t.clock.lost > 7.0


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


# What a gap is made of ----------------------------------------------------------------------------------------------

def test_a_unit_is_of_the_kind_that_costs_most(monkeypatch):
    "Every character is made a word: those that one token spans are one unit, of the kind of the least likely."
    from tiny_llm.training import evaluate
    model, tok, docs = parts()
    text, costs = str(docs[0])[:60], [(7 * i) % 5 + i / 1000 for i in range(60)]
    monkeypatch.setattr(evaluate, "surprisals", lambda doc: [(i, i + 1, f"kind {i}", costs[i]) for i in range(len(doc))])
    model.train()
    row = evaluate.units(model, tok, [text])[0][:-1]
    assert model.training, "as it was"
    dearest = [max(range(a, b), key=lambda i: costs[i]) for a, b, *_ in row]
    assert [kind for _, _, kind, *_ in row] == [f"kind {i}" for i in dearest] and any(i > a for i, (a, *_) in zip(dearest, row))


def test_padding_is_no_token_of_a_story():
    from tiny_llm.training.evaluate import token_nats
    model, tok, docs = parts()
    texts = [str(docs[0])[:n] for n in (20, 60)]
    for text, together in zip(texts, token_nats(model, tok, texts)):
        alone, = token_nats(model, tok, [text])
        assert len(together) == len(alone) == len(tok.encode(text)) + 1 and torch.allclose(together, alone, atol=1e-4)


def test_gaps_are_summed_by_story():
    from tiny_llm.training.evaluate import sum_by_kind
    rows = [[(0, 1, "sure", 1.0, 0.5), (1, 2, "rare", 4.0, 1.0)], [(0, 1, "sure", 1.5, 0.5), (1, 2, "rare", 2.0, 1.0)], [(0, 1, "rare", 3.0, 1.0)]]
    first, second = sum_by_kind(rows)
    assert (first["kind"], first["gap"], first["words"]) == ("rare", pytest.approx(2.0), 1.0) and second["gap"] == pytest.approx(0.5)
    assert first["se"] == pytest.approx((1.0 / 3) ** 0.5), "gaps 3, 1, 2: their deviation is 1"


def test_what_an_audit_counts():
    import gzip
    from tiny_llm.training.audit import audit, compressed
    text = "a little duck went swimming " * 9
    assert compressed(text)["gzip"] == 8 * len(gzip.compress(text.encode(), 9)) / len(text)
    found = audit(perplexity=4, n_tokens=10, n_bytes=40, stride=8, ctx=64)
    assert found.bits_per_byte == 0.5 and found.epochs == 8 and any("is read 8 times" in d for d in found.doubts)
    assert not any("is read" in d for d in audit(perplexity=4, n_tokens=10, n_bytes=40, stride=16, ctx=64).doubts)


def test_a_run_of_minutes_is_repeated_bit_for_bit(tmp_path):
    "Paused and resumed on the way; the repeat is paused, too."
    go(tmp_path/"run", minutes=9, batch=2, dtype="float32", stop_at=4, eval_every=3)
    run = go(tmp_path/"run", seed=7, resume=True, stop_at=9)
    shares = json.loads((tmp_path/"run"/"last"/"state"/"state.json").read_text())["shares"]
    assert len(shares) == 9 and shares == sorted(shares) and shares != [k / 9 for k in range(9)]
    again = {name: tmp_path/name for name in ("whole", "paused")}
    whole = go(again["whole"], repeat=str(tmp_path/"run"))
    assert whole.summary["stopped"] == "finished" and whole.config.lr == run.config.lr and whole.config.minutes is None
    go(again["paused"], repeat=str(tmp_path/"run"), stop_at=5)
    rest = go(again["paused"], seed=7, resume=True)
    for other in (whole, rest):
        assert other.summary["step"] == 9 and all(torch.equal(a, b) for a, b in zip(weights(run), weights(other)))
    twice = go(repeat=str(again["whole"]), steps=4)       # the first steps of a repeat
    assert twice.summary["step"] == 4 and twice.metrics[-1]["lr"] != run.metrics[-1]["lr"]


def test_what_cannot_be_repeated_says_why(tmp_path):
    go(tmp_path/"steps", steps=3, batch=2)
    for wrong, words in ((dict(repeat=str(tmp_path/"steps")), "a run of steps is repeated with its settings alone"),
                         (dict(repeat=str(tmp_path/"none")), "none/config.json"),
                         (dict(repeat=str(tmp_path/"steps"), minutes=1), "minutes or repeat")):
        with pytest.raises(UserError, match=words): go(tmp_path/"new", **wrong)
        assert not (tmp_path/"new").exists()


def test_a_state_of_torchs_muon_goes_on_in_ours():
    "Folders of earlier versions hold its momentum under the same name; the steps after it agree to float32."
    from unittest.mock import patch
    from tiny_llm.training.optim import Muon, Optim
    if not hasattr(torch.optim, "Muon"): pytest.skip("this torch has no Muon")
    torch.manual_seed(0)
    theirs, grads = torch.nn.Linear(12, 6, bias=False), torch.randn(9, 6, 12)
    ours, weight = torch.nn.Linear(12, 6, bias=False), theirs.weight
    with patch.object(torch.Tensor, "bfloat16", torch.Tensor.float):      # it computes in bfloat16 only
        old = Optim(theirs, [torch.optim.Muon([weight], lr=0.02, weight_decay=0.1, ns_steps=3, adjust_lr_fn="match_rms_adamw")])
        for weight.grad in grads[:5]: old.step()
        ours.load_state_dict(theirs.state_dict())
        new = Optim(ours, [Muon(ours.parameters(), lr=0.02, ns_steps=3, dtype=torch.float32)])
        new.load_state_dict({name: x.clone() for name, x in old.state_dict().items()})
        for g in grads[5:]:
            weight.grad, ours.weight.grad = g, g.clone()
            old.step()
            new.step()
    torch.testing.assert_close(ours.weight, weight, atol=1e-6, rtol=0)


def test_the_average_comes_back_with_the_optimizer():
    from tiny_llm.training.optim import make_optimizer
    def stepped(opt, n):
        for i in range(n):
            for j, p in enumerate(opt.weights): p.grad = torch.full_like(p, 0.1 * (i + j + 1))
            opt.step()
    nets = [torch.nn.Linear(4, 3) for _ in range(2)]
    opts = [make_optimizer(net, "lion", 0.01, ema=0.9) for net in nets]
    for net, opt in zip(nets, opts): opt.weights = list(net.parameters())
    stepped(opts[0], 3)
    nets[1].load_state_dict(nets[0].state_dict())
    opts[1].load_state_dict({name: x.clone() for name, x in opts[0].state_dict().items()})
    for opt in opts: stepped(opt, 3)
    with opts[0].average.applied(), opts[1].average.applied():
        assert torch.equal(nets[0].weight, nets[1].weight)
    assert not torch.equal(nets[0].weight, opts[0].average.means["weight"])


def test_muon_stacks_only_what_is_alike():
    "Matrices of several shapes, one without a gradient: each moves as it would alone."
    from tiny_llm.training.optim import Muon
    torch.manual_seed(0)
    shapes = [(4, 6), (6, 4), (4, 6), (3, 8), (4, 6)]
    together = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in together]
    for p, q in zip(together[:-1], alone): p.grad = q.grad = torch.randn_like(p)
    before = together[-1].detach().clone()
    for weights in (together, *([q] for q in alone)): Muon(weights, lr=0.1, dtype=torch.float64).step()
    for p, q in zip(together, alone): torch.testing.assert_close(p, q, atol=1e-6, rtol=0)
    assert torch.equal(together[-1], before)
