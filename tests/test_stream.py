"A text that is read while a model trains: a bounded reading before the first step, the same batches in whatever order, nothing held out is learnt."
import json, os, signal, subprocess, sys, time
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
import torch

from house import ROOT, environment
from tiny_llm.assistant.pipeline import pipeline, read_stages
from tiny_llm.basics import UserError
from tiny_llm.deployment import cli
from tiny_llm.text import large_corpora, sources
from tiny_llm.text.batches import Batches, tokenize
from tiny_llm.text.large_corpora import START, StreamBatches, TextStream, text_of, tokenized
from tiny_llm.text.sources import documents, read
from tiny_llm.text.stories import stories
from tiny_llm.text.tokenizer import train_tokenizer
from tiny_llm.training.doctor import doctor
from tiny_llm.training.folder import load
from tiny_llm.training.run import Run
from tiny_llm.training.train import train
from tiny_llm.transformer.model import Transformer, preset

pytestmark = pytest.mark.usefixtures("one_thread")

FIELDS = ("x", "y", "w", "doc", "pos")
QUICK = dict(batch=2, dtype="float32", compile=False, device="cpu", quiet=True, eval_tokens=500)


class Endless:
    "A source without end. `read` counts its documents, whoever reads them."
    def __init__(self, words="boats"): self.read, self.words = 0, words
    def __call__(self):
        for n in count():
            self.read += 1
            yield f"On day {n} a duck saw {n * n} {self.words} and swam past {7 * n % 101} of them."


TOK = train_tokenizer(islice(Endless()(), 500), 290)
def model(seed=0):
    torch.manual_seed(seed)
    return Transformer(preset("tiny", vocab_size=len(TOK), ctx=64, d_model=32))
def weights(m): return [p.detach().clone() for p in m.parameters()]
def equal(a, b): return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
def same(a, b): return all(torch.equal(getattr(a, n), getattr(b, n)) for n in FIELDS)


# What is read before the first step ----------------------------------------------------------------------------------

def test_an_endless_source_is_read_a_little(tmp_path):
    "For the documents held out at most twice what (2.11.4) says; for three steps two parts of the text, and one ahead."
    endless = Endless()
    run = train(model(), TOK, TextStream(endless, part=20_000), steps=3, out=tmp_path/"run", **QUICK)
    mean = len(next(endless()))
    assert endless.read * mean < 2 * 8 * 500 / 0.05 + 4 * 20_000 + 100 * mean
    assert run.summary["stopped"] == "finished" and run.config.stream is True and run.made["held_out"] > 0
    assert run.summary["stream"]["documents"] * mean < 2 * 20_000 + 100 * mean and run.summary["stream"]["epoch"] == 0


@pytest.fixture
def crawl(tmp_path, monkeypatch):
    "A folder of Parquet files of which training may read little, and what was read of it."
    import pyarrow as pa, pyarrow.parquet as pq
    (tmp_path/"crawl").mkdir()
    docs = list(islice(Endless()(), 40_000))
    for i in range(20): pq.write_table(pa.table(dict(text=docs[i * 2000:][:2000])), tmp_path/"crawl"/f"{i:02}.parquet", row_group_size=500)
    rows, seen = sources.parquet_rows, []
    def counted(*args):
        for row in rows(*args):
            seen.append(row["text"])
            yield row
    monkeypatch.setattr(sources, "parquet_rows", counted)
    monkeypatch.setattr(large_corpora, "WHOLE", 30_000)
    monkeypatch.setattr(large_corpora, "PART", 20_000)
    monkeypatch.setattr(TextStream.head, "__defaults__", (40_000,))
    monkeypatch.chdir(tmp_path)
    return docs, seen


LINE = "train --preset tiny --ctx 32 --vocab_size 300 --batch 2 --dtype float32 --no_compile --eval_tokens 500 --device cpu --data crawl"


def test_a_large_folder_begins_at_once(crawl, tmp_path):
    "The rule, the tokenizer, what is held out and the parts: each reads a little. The same line with --no_stream reads all, more than once."
    docs, seen = crawl
    code, out, err = cli.try_line(f"{LINE} --steps 3 --out a", show=False)
    assert code == 0 and "more than 30,000 characters; read while the model trains" in err and "and more as it comes" in err, err
    assert sum(map(len, seen)) < 30_000 + 40_000 + 2 * 8 * 500 / 0.05 + 5 * 20_000 < sum(map(len, docs)) / 5
    assert Run(tmp_path/"a").config.stream is True
    seen.clear()
    code, out, err = cli.try_line(f"{LINE} --steps 3 --no_stream --out b", show=False)
    assert code == 0 and len(seen) >= 40_000 and Run(tmp_path/"b").config.stream is False and "more as it comes" not in err, err
    assert Run(tmp_path/"b").made["documents"] == len(documents("crawl")) > 30_000


def test_what_was_read_is_what_the_record_says(crawl, tmp_path):
    "Of the whole text nobody knows the fingerprint: the record has that of the first part, the summary that of all that was read so far."
    import hashlib
    assert cli.try_line(f"{LINE} --steps 120 --batch 16 --out a", show=False)[0] == 0
    run = Run(tmp_path/"a")
    told, digest = run.summary["stream"], hashlib.sha256()
    trained = documents("crawl")
    first = tokenize(list(sources.up_to(read("crawl"), 20_000)), run.tok)
    assert (run.made["documents"], run.made["bytes"], run.made["sha256"]) == (len(first), first.n_bytes, first.sha256())
    assert told["documents"] > run.made["documents"] and told["bytes"] == sum(len(d.encode()) for d in trained[:told["documents"]])
    for d in trained[:told["documents"]]: digest.update(b"%d\n" % len(d) + d.encode())
    assert told["sha256"] == digest.hexdigest()
    assert run.summary["tokens"] <= told["tokens"] and told["part"] > 3
    assert not [f for f in doctor(tmp_path/"a") if f.name == "data repeats"]


# What fits stays as it was -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("source, limit, seed", [("stories", 60, 3), ("few.txt", None, 0), ("many.jsonl", None, 0), ("many.jsonl", 150, 0), ("stories=3,many.jsonl=1", None, 1)])
def test_a_small_source_is_what_it_was(tmp_path, monkeypatch, source, limit, seed):
    monkeypatch.chdir(tmp_path)
    Path("few.txt").write_text("A duck. " * 400)
    Path("many.jsonl").write_text("".join(json.dumps(dict(text=d)) + "\n" for d in islice(Endless()(), 900)))
    assert text_of(source, limit, seed) == documents(source, "train", limit, seed)


def test_stories_without_end(tmp_path, monkeypatch):
    "Streamed if that is asked for: past the 20,000, with their floor; cut at 20,000 else."
    monkeypatch.setitem(sources.LIMITS, "train", 30)
    assert len(text_of("stories")) == 30
    flow = text_of("stories", stream=True)
    assert len(set(islice(flow.read(), 100))) == 100
    tok = train_tokenizer(stories(60), 300)
    torch.manual_seed(0)
    run = train(Transformer(preset("tiny", vocab_size=len(tok), ctx=64, d_model=32)), tok, "stories", stream=True, steps=2, **QUICK)
    assert run.floor is not None and run.config.stream is True and run.config.data == "stories"


def test_the_hub_is_not_cut(monkeypatch):
    "A dataset of the hub has 20,000 documents for `documents`, and all for a run, that many or not."
    rows = [dict(text=d) for d in islice(Endless()(), 3000)]
    monkeypatch.setattr(sources, "_place", lambda name, pick=None: (name, {"train": lambda: [(name, iter(rows))]}, True))
    monkeypatch.setitem(sources.LIMITS, "train", 1000)
    whole = len(documents([r["text"] for r in rows]))
    assert len(documents("owner/name")) == 1000 and len(text_of("owner/name")) == whole > 2000
    monkeypatch.setattr(large_corpora, "WHOLE", 30_000)
    assert len(list(text_of("owner/name").read())) == whole
    assert len(text_of("owner/name", stream=False)) == 1000


def test_one_pass_is_not_enough():
    with pytest.raises(UserError, match="give the function that opens it"): TextStream(Endless()())


# The batches ---------------------------------------------------------------------------------------------------------

def plainly(docs, part, ctx, seed, readings=2):
    "The rows of a finite stream, as the definition has them: (batches of a part, number of a row) one by one."
    rows, n = [], 0
    for _ in range(readings):
        left = list(docs)
        while left:
            some = list(sources.up_to(left, part))
            left, b = left[len(some):], Batches(tokenize(some, TOK), ctx, 1, seed)
            rows += [(b, r) for r in b.order(n, np.arange(b.n_rows)).tolist()]
            n += 1
    return rows


@pytest.mark.parametrize("case", range(12))
def test_batches_are_those_of_the_definition(case):
    "Whatever was asked before; the processes' shares side by side; over the ends of parts and of the source."
    r = np.random.default_rng(case)
    docs = list(islice(Endless()(), int(r.integers(201, 400))))
    part, ctx, B, world = int(r.integers(200, 9000)), int(r.integers(8, 90)), int(r.integers(2, 7)), int(r.integers(1, 3))
    flow = TextStream(docs, tok=TOK, part=part)
    rows = plainly(list(flow.read()), part, ctx, case)
    shares = [StreamBatches(flow, ctx, B, case, rank, world) for rank in range(world)]
    for k in r.permutation(len(rows) // B)[:8].tolist():
        got = [b[k] for b in shares]
        want = [b.take([i]) for b, i in rows[k * B:(k + 1) * B]]
        for name in FIELDS: assert torch.equal(torch.cat([getattr(g, name) for g in got]), torch.cat([getattr(w, name) for w in want])), (k, name)
        again = StreamBatches(flow, ctx, B, case)
        again.go_to(json.loads(json.dumps(shares[0].mark_of(k))))          # a checkpoint holds it as JSON
        if world == 1: assert same(again[k], got[0])


def test_a_mark_passes_over_what_was_read():
    "Without tokenizing it, and only if it is the same text."
    flow = TextStream(Endless(), tok=TOK, part=9000)
    b = StreamBatches(flow, 64, 4)
    b[300]
    mark, tokens = b.mark_of(300), []
    real, large_corpora.tokenize = large_corpora.tokenize, lambda docs, *args, **kw: tokens.append(docs) or real(docs, *args, **kw)
    try:
        again = StreamBatches(flow, 64, 4)
        again.go_to(mark)
        assert same(again[300], b[300]) and mark["part"] > 5
        again.worker.shutdown()
    finally: large_corpora.tokenize = real
    assert 1 <= len(tokens) <= 3, "the part with the batch, the next one if the batch reaches into it, one ahead"
    again = StreamBatches(TextStream(Endless("ships"), tok=TOK, part=9000), 64, 4)
    again.go_to(mark)
    with pytest.raises(UserError, match="is not the one that the run has read"): again[300]
    again = StreamBatches(TextStream(list(islice(Endless()(), 100)), tok=TOK, part=9000), 64, 4)
    again.go_to(mark)
    with pytest.raises(UserError, match="is not the one that the run has read"): again[300]


# What is held out ----------------------------------------------------------------------------------------------------

def learnt(monkeypatch, go):
    "The documents that a run has tokenized to train on, and those on which it was evaluated."
    parts, held = [], []
    real, find = large_corpora.tokenize, TextStream.held
    monkeypatch.setattr(large_corpora, "tokenize", lambda docs, *args, **kw: parts.extend(docs) or real(docs, *args, **kw))
    monkeypatch.setattr(TextStream, "held", lambda self, chars: held.extend(found := find(self, chars)) or found)
    go()
    return parts, held


def test_nothing_held_out_is_learnt(monkeypatch):
    "Split by hash; long enough that all that is held out has passed by."
    endless = Endless()
    parts, held = learnt(monkeypatch, lambda: train(model(), TOK, TextStream(endless, part=20_000), steps=400, **QUICK | dict(eval_tokens=100, batch=8)))
    passed = list(islice(Endless()(), int(parts[-1].split()[2])))
    assert len(held) > 8 and {*held} <= {*passed}, "the run went past all that is held out"
    assert not {*parts} & {*held}
    assert 0.88 < len(parts) / len(passed) < 0.92, "all of the rest, but the test split"


def test_the_source_s_own_validation_split(monkeypatch, tmp_path):
    for name, words in ("train", "boats"), ("validation", "clouds"):
        (tmp_path/f"{name}.jsonl").write_text("".join(json.dumps(dict(text=d)) + "\n" for d in islice(Endless(words)(), 2000)))
    parts, held = learnt(monkeypatch, lambda: train(model(), TOK, str(tmp_path), stream=True, steps=30, **QUICK))
    assert parts and held and all("boats" in d for d in parts) and all("clouds" in d for d in held)


# A run that goes on --------------------------------------------------------------------------------------------------

SESSION = """
import sys; sys.path.insert(0, sys.argv[3])
import torch; torch.set_num_threads(1)
from test_stream import go
go(sys.argv[1], resume=sys.argv[2] == "resume")
"""

def go(out=None, seed=0, **kw):
    settings = {} if kw.get("resume") else dict(steps=240, save_every=7, eval_every=60, log_every=1, accumulate=2)
    return train(model(seed), TOK, TextStream(Endless(), part=8000), out=out, **{n: v for n, v in QUICK.items() if not kw.get("resume") or n in ("device", "quiet", "eval_tokens")},
                 **settings, **kw)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="kill -9")
def test_killed_in_the_middle_of_a_stream(tmp_path):
    "Killed twice, parts apart; then the same weights, lines and fingerprint as if nothing had happened."
    for step in (60, 160, None):
        p = subprocess.Popen([sys.executable, "-c", SESSION, tmp_path/"run", "resume" if (tmp_path/"run"/"config.json").exists() else "new", Path(__file__).parent],
                             stderr=subprocess.PIPE, text=True, env=environment(PYTHONPATH=str(ROOT)))
        while step and p.poll() is None and f'"step": {step},' not in (f.read_text() if (f := tmp_path/"run"/"metrics.jsonl").exists() else ""): time.sleep(0.01)
        if step: os.kill(p.pid, signal.SIGKILL)
        said = p.communicate(timeout=300)[1]
        assert p.returncode == (-signal.SIGKILL if step else 0), said
    state = json.loads((tmp_path/"run"/"last"/"state"/"state.json").read_text())
    assert state["stream"]["part"] > 3 and "documents that were read before are passed over" in said
    whole, killed = go(), Run(tmp_path/"run")
    assert equal(weights(whole.model), weights(load(tmp_path/"run"/"last")[0]))
    def losses(run): return [(r["step"], r["loss"], r["lr"], r["tokens"]) for r in run.metrics if "loss" in r]
    assert losses(whole) == losses(killed) and len(losses(killed)) == 240
    assert whole.summary["stream"] == killed.summary["stream"]


def test_another_text_does_not_go_on(tmp_path):
    train(model(), TOK, TextStream(Endless(), part=8000), steps=20, stop_at=10, out=tmp_path/"run", **QUICK)
    with pytest.raises(UserError, match="the text is not the one that the run in"):
        train(model(), TOK, TextStream(Endless("ships"), part=8000), resume=True, out=tmp_path/"run", device="cpu", quiet=True)
    with pytest.raises(UserError, match="stream is False, but the run in .* was started with True"):
        train(model(), TOK, TextStream(Endless(), part=8000), resume=True, stream=False, out=tmp_path/"run", device="cpu", quiet=True)


def test_the_command_goes_on_and_repeats(crawl, tmp_path):
    "Without saying how the text is read: the folder knows. A repeated run takes the same steps."
    assert cli.try_line(f"{LINE} --steps 60 --save_every 10 --out a", show=False)[0] == 0
    from tiny_llm.training import train as module
    ends, run_steps = [], module.run_steps
    def cut(t, asked=(), stop_at=None): return run_steps(t, asked, 30 if not ends else stop_at)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "run_steps", cut)
        assert cli.try_line(f"{LINE} --steps 60 --save_every 10 --out b", show=False)[0] == 130
    large_corpora.WHOLE = 10 ** 9          # the rule would now read it whole
    code, out, err = cli.try_line("train --resume --out b --device cpu", show=False)
    assert code == 0, err
    assert cli.try_line("train --repeat a --out c --device cpu", show=False)[0] == 2, "of a run of steps the settings are enough"
    assert cli.try_line("train --config a/config.json --out c --device cpu", show=False)[0] == 0
    for name in "bc": assert equal(weights(load(tmp_path/"a"/"last")[0]), weights(load(tmp_path/name/"last")[0])), name
    assert cli.try_line("train --config a/config.json --data crawl/00.parquet --steps 2 --out d --device cpu", show=False)[0] == 0
    assert Run(tmp_path/"d").config.stream is False, "another text is looked at anew"


def test_a_text_that_ended_is_named_when_it_repeats(tmp_path):
    "A stream whose end was met says how large it is, and the doctor compares."
    docs = list(islice(Endless()(), 300))
    run = train(model(), TOK, TextStream(docs, part=4000), steps=400, out=tmp_path/"run", **QUICK)
    told = run.summary["stream"]
    whole = tokenize(list(TextStream(docs).read()), TOK)
    assert told["size"] == whole.n_tokens and told["epoch"] == run.summary["tokens"] // whole.n_tokens


# Stages and searches -------------------------------------------------------------------------------------------------

STAGE = dict(name="a", kind="train", data="crawl", stream=True, steps=3)
SHARED = dict(preset="tiny", vocab_size=300, ctx=32, batch=2, dtype="float32", compile=False, eval_tokens=500)


def test_a_stage_of_a_pipeline_streams(crawl, tmp_path):
    docs, seen = crawl
    run, = pipeline(SHARED | dict(stages=[STAGE]), tmp_path/"p", device="cpu", quiet=True)
    assert run.config.stream is True and len(seen) < len(docs) / 4
    seen.clear()
    run, = pipeline(SHARED | dict(stages=[dict(name="a", kind="train", data="crawl", tokens=300)]), tmp_path/"q", device="cpu", quiet=True)
    assert run.config.stream is False and len(seen) >= len(docs), "what is counted in epochs or tokens is read whole"
    for more in dict(epochs=1), dict(tokens=99):
        with pytest.raises(UserError, match="has stream, which is for stages of kind train with steps or minutes"):
            read_stages(SHARED | dict(stages=[{n: v for n, v in STAGE.items() if n != "steps"} | more]))
