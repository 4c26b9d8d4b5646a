"Texts that are written together: each is what it would have been alone, and nobody's trouble is another's."
import math, random, threading
from types import SimpleNamespace

import pytest
import torch

from serving import noise
from tiny_llm.assistant.engine import Busy, Engine, Order, Seat, advance, by_rows, steady
from tiny_llm.assistant.generate import stream
from tiny_llm.basics import UserError
from tiny_llm.transformer.model import ModelConfig, Transformer, preset

pytestmark = pytest.mark.usefixtures("one_thread")
MODEL, TOK = noise()


def order(told, model=MODEL, prompt="", score=None, **settings):
    return Order(stream(Seat(model), TOK, prompt, **settings), told.append, score=score)


def texts(n, seed=0):
    "Settings of all kinds."
    draw, out = random.Random(seed), []
    for k in range(n):
        ids = [draw.randrange(256) + 5 for _ in range(draw.choice([1, 2, 17, 70]))]
        out.append(dict(prompt=ids, seed=k, max_tokens=draw.randrange(1, 60), temperature=draw.choice([0, 0.8, 1.5]), top_k=draw.choice([0, 20]),
                        top_p=draw.choice([1.0, 0.9]), repetition_penalty=draw.choice([1.0, 1.2]), stop=draw.choice([[], ["e"], ["th"]]), top=draw.choice([0, 3])))
    return out


def run(engine, settings, gaps=None, model=MODEL):
    "The events of each; `gaps`: steps between one arrival and the next."
    told = [[] for _ in settings]
    for k, s in enumerate(settings):
        engine.submit(order(told[k], model, **s))
        for _ in range(gaps.randrange(4) if gaps else 0): engine.step()
    while engine.step(): pass
    return [[(e.id, e.logprob, e.entropy, e.top, e.text, e.reason) for e in t] for t in told]


@pytest.mark.parametrize("slots, rows", [(1, 8), (5, 4), (16, 8), (3, 1)])
def test_company_changes_no_bit(slots, rows):
    some, engine = texts(30), Engine(MODEL, TOK, slots=slots, rows=rows, chunk=16)
    alone = [run(engine, [s])[0] for s in some]
    assert run(engine, some, random.Random(1)) == alone
    assert run(engine, some[::-1]) == alone[::-1]


def test_each_is_what_stream_writes():
    some = texts(40, seed=2)
    for s, told in zip(some, run(Engine(MODEL, TOK, slots=7), some)):
        want = list(stream(MODEL, TOK, **s).events)
        assert [(e.id, e.text, e.reason) for e in want] == [(e[0], e[4], e[5]) for e in told]
        for a, b in zip(want, told):
            if a.id is not None: assert abs(a.logprob - b[1]) < 1e-4


@pytest.mark.parametrize("shape", [dict(), dict(window=7), dict(n_kv_heads=1), dict(norm="layer", ffn="gelu", positions="learned", bias=True, norm_bias=True),
                                   dict(parallel=True), dict(norm_place="post"), dict(positions="none"), dict(qk_norm=False, rotary=0.5),
                                   dict(rope_scaling=dict(rope_type="yarn", factor=2.0))], ids=lambda s: "-".join(s) or "plain")
def test_rows_of_every_architecture(shape):
    "A step of rows against the model on each text, and not a bit of difference between places."
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=50, ctx=32, d_model=32, n_layers=2, n_heads=2, **shape)).eval()
    some = [torch.randint(50, (1, n)) for n in (1, 4, 11, 20)]
    caches = [model.cache(1, 32, slide=True) for _ in some]
    with torch.no_grad():
        for ids, cache in zip(some, caches):
            if ids.shape[1] > 1: model(ids[:, :-1], cache=cache)
        logits = advance(by_rows(model), [int(ids[0, -1]) for ids in some], caches, 6)
        for row, ids in zip(logits, some): torch.testing.assert_close(row[0], model(ids)[0, -1], atol=2e-5, rtol=1e-4)
    assert [c.length for c in caches] == [1, 4, 11, 20] and steady(model, 6)


def test_steady_sees_what_it_should(monkeypatch):
    "A group whose rows are mixed a little is not steady, and the engine takes another size."
    import tiny_llm.assistant.engine as module
    real = advance
    def leaky(view, last, caches, m):
        out = real(view, last, caches, m)
        return out + 1e-7 * out.mean(0, keepdim=True) if m == 8 else out
    monkeypatch.setattr(module, "advance", leaky)
    assert not steady(MODEL, 8) and steady(MODEL, 4)
    assert Engine(MODEL, TOK, rows=8).rows == 4


def test_the_view_leaves_the_model_as_it_is():
    before = {name: type(m) for name, m in MODEL.named_modules()}
    view = by_rows(MODEL)
    assert {name: type(m) for name, m in MODEL.named_modules()} == before
    assert {p.data_ptr() for p in view.parameters()} == {p.data_ptr() for p in MODEL.parameters()}


def test_a_prompt_is_scored_across_pieces():
    told, ids = [], [7, 8, 9] * 20
    one = order(told, prompt=ids, score=2, max_tokens=1, seed=0)
    engine = Engine(MODEL, TOK, chunk=16)
    engine.submit(one)
    while engine.step(): pass
    with torch.no_grad(): log_q = MODEL(torch.tensor([ids]))[0].index_fill(-1, one.stream.nameless(), -torch.inf).log_softmax(-1)
    assert len(one.scores) == len(ids) and one.scores[0] is None
    for t, (x, top) in enumerate(one.scores[1:]):
        assert abs(x - log_q[t, ids[t + 1]]) < 1e-4 and len(top) == 2 and top[0][1] >= top[1][1]


def test_seats_queue_and_who_comes_when():
    engine, told = Engine(MODEL, TOK, slots=2, queue=3), [[] for _ in range(6)]
    for k in range(5): engine.submit(order(told[k], seed=k, max_tokens=4))
    with pytest.raises(Busy) as e: engine.submit(order(told[5]))
    assert e.value.seconds > 0 and len(engine.waiting) == 5
    most, engine.waiting[3].stream.interrupt = 0, threading.Event()
    engine.waiting[3].stream.interrupt.set()                     # it has gone from the queue
    while engine.step(): most = max(most, len(engine.seated))
    assert most == 2 and [t[-1].reason for t in told[:5]] == ["length"] * 3 + ["interrupted", "length"]
    with pytest.raises(Busy): engine.submit(*(order([]) for _ in range(6)))
    assert not engine.waiting, "all or none"


def test_pace_is_of_the_seat_and_not_of_the_queue(monkeypatch):
    "Three texts for one seat, and a clock that goes on by a second with each step: none takes longer because it has waited."
    import tiny_llm.assistant.engine as module
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    engine, told = Engine(MODEL, TOK, slots=1), [[] for _ in range(3)]
    for k in range(3): engine.submit(order(told[k], seed=k, max_tokens=4))
    for one in engine.waiting: one.asked = 0.0
    while engine.step(): clock.now += 1
    assert [t[-1].reason for t in told] == ["length"] * 3
    pace = 1.0
    for _ in told: pace += 0.1 * (3.0 - pace)        # four tokens, the first of them in the second in which it sat down
    assert engine.pace == pytest.approx(pace)


def test_long_prompts_are_read_between_steps():
    "A text that is being written gets a token while a long prompt is read."
    engine, first, long = Engine(MODEL, TOK, chunk=8), [], []
    engine.submit(order(first, seed=0, max_tokens=30, temperature=1.5))
    engine.step()
    engine.submit(order(long, prompt=[9] * 64, seed=0, max_tokens=2))
    seen = []
    while not long:
        engine.step()
        seen.append(len(first))
    assert len(seen) == 8 and all(b == a + 1 for a, b in zip(seen, seen[1:]))


def test_what_ends_and_what_fails_is_told_to_one():
    engine, fine, late, bad, lost = Engine(MODEL, TOK, slots=4), [], [], [], []
    engine.submit(order(fine, seed=0, max_tokens=20))
    slow, broken, deaf = order(late, max_tokens=60), order(bad, max_tokens=60, seed=1), order(lost, max_tokens=60)
    engine.submit(slow, broken, deaf)
    for _ in range(3): engine.step()
    slow.seconds, deaf.tell = 0.0, lambda event: 1 / 0
    broken.stream.draws = iter(())                               # its next draw raises
    while engine.step(): pass
    assert [fine[-1].reason, late[-1].reason, slow.late, deaf.stream.reason] == ["length", "interrupted", True, "interrupted"]
    assert isinstance(bad[-1], Exception) and not engine.seated
    assert fine == [*(e for e in fine)] and [e.id for e in fine][:20] == [e.id for e in stream(MODEL, TOK, "", seed=0, max_tokens=20).events][:20]


def test_a_step_that_fails_leaves_an_engine_that_works(monkeypatch):
    engine, told = Engine(MODEL, TOK), []
    engine.submit(order(told, max_tokens=5, seed=0))
    engine.step()
    monkeypatch.setattr(engine.view, "hidden_states", lambda *a, **k: 1 / 0, raising=False)
    engine.step()
    assert isinstance(told[-1], ZeroDivisionError) and not engine.seated
    monkeypatch.undo()
    assert run(engine, [dict(seed=0, max_tokens=5)])[0][-1][-1] == "length"


def test_logits_that_are_no_numbers():
    model, tok = noise()
    with torch.no_grad(): model.norm.weight.fill_(math.nan)
    told = []
    engine = Engine(model, tok)
    engine.submit(order(told, model))
    while engine.step(): pass
    assert isinstance(told[-1], UserError) and "not finite" in str(told[-1])


def test_closing_ends_what_is_written_and_takes_nothing():
    engine, told, begun = Engine(MODEL, TOK).start(), [], threading.Event()
    one = order(told, max_tokens=90, temperature=1.5)
    one.tell = lambda event: (told.append(event), begun.set())
    engine.submit(one)
    assert begun.wait(60)
    engine.close()
    assert not engine.thread.is_alive() and told[-1].reason
    with pytest.raises(Busy): engine.submit(order([]))


def test_caches_are_given_back():
    engine, one = Engine(MODEL, TOK), order([], max_tokens=3)
    engine.submit(one)
    engine.step()
    assert one.stream.model.kv is not None
    while engine.step(): pass
    assert one.stream.model.kv is None


@pytest.mark.parametrize("wrong", [dict(slots=0), dict(rows=1.5), dict(queue=True), dict(chunk=-1)])
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))): Engine(MODEL, TOK, **wrong)


def test_dropout_is_off():
    model = Transformer(preset("tiny", vocab_size=len(TOK), ctx=64, dropout=0.5)).train()
    some = [dict(seed=0, max_tokens=10)]
    assert run(Engine(model, TOK), some, model=model) == run(Engine(model, TOK), some, model=model)
