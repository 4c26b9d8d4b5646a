"The loop and what is told of it: accumulation, averages, patience, steps that are no numbers, disks that are full, checkpoints that are damaged."
import errno, json, math, os, shutil, signal

import pytest
import torch
import torch.nn.functional as F

from test_resume import go, parts, weights
from test_training import begun
from tiny_llm.basics import UserError
from tiny_llm.text.batches import Batches, tokenize
from tiny_llm.training import folder as folders, run as around, train as trainer
from tiny_llm.training.config import TrainConfig
from tiny_llm.training.folder import load
from tiny_llm.training.run import COMPILE_FROM, Run, overfitting, resolved, total_operations
from tiny_llm.training.train import evaluate_loss, loss_of, train

pytestmark = pytest.mark.usefixtures("one_thread")


def gradient(t, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(t.opt, "step", lambda *args: None)
        t.advance(0)
    return torch.cat([w.grad.flatten() for w in t.model.parameters()])


def step_in(folder): return json.loads((folder/"state"/"state.json").read_text())["step"]


def same(a, b): return all(torch.equal(v, w) for v, w in zip(weights(a), weights(b)))


def talks(tok, n=40):
    "Conversations of very different lengths, of which only the answers count."
    return [tok.chat([dict(role="user", content="one two three " * (k % 7)), dict(role="assistant", content="Yes. " * (1 + k % 5))]) for k in range(n)]


# Gradients -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["stories", "conversations"])
def test_parts_of_a_batch_are_the_batch(kind, monkeypatch):
    "Four batches of two rows are one of eight, whatever counts in them; the loss that is logged, too."
    model, tok, docs = parts()
    text = tokenize([d[:40 + 15 * k] for k, d in enumerate(docs[:9])] if kind == "stories" else talks(tok), tok)
    def of(batch, accumulate):
        t = begun(batch=batch, accumulate=accumulate, clip=0.0)
        t.batches = Batches(text, 64, batch)
        return gradient(t, monkeypatch), t.loss_now, t.tokens
    (whole, loss, n), (summed, same_loss, same_n) = of(8, 1), of(2, 4)
    counted = [b.w.sum().item() for b in (Batches(text, 64, 2)[k] for k in range(4))]
    assert len(set(counted)) > 1, "else nothing is tested"
    assert (whole - summed).abs().max() < 1e-6 and abs(loss - same_loss) < 1e-6 and n == same_n


def test_accumulated_steps_go_through_the_text_like_large_ones():
    whole, summed = (torch.cat([p.detach().flatten() for p in after.model.parameters()]) for after in (run_steps(batch=6), run_steps(batch=2, accumulate=3)))
    assert (whole - summed).abs().max() < 1e-5


def run_steps(n=4, **settings):
    t = begun(**settings)
    for k in range(n): t.advance(k / n)
    return t


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recomputed_activations_give_the_same_gradients(dtype, monkeypatch):
    kept, again = (gradient(begun(recompute=on, dtype=dtype), monkeypatch) for on in (False, True))
    assert torch.equal(kept, again)


def test_recompute_leaves_the_model_as_it_was(tmp_path):
    model, tok, docs = parts()
    run = train(model, tok, docs, val=docs[:2], steps=3, batch=2, recompute=True, quiet=True)
    assert not any("forward" in vars(block) for block in run.model.blocks)
    assert same(run, go(steps=3, batch=2))


def test_label_smoothing_is_the_library_s():
    model, tok, docs = parts()
    for text in (tokenize(docs[:9], tok), tokenize(talks(tok), tok)):
        b = Batches(text, 64, 4)[0]
        logits = model(b.x, b.doc, b.pos)
        want = (F.cross_entropy(logits.flatten(0, 1), b.y.flatten(), reduction="none", label_smoothing=0.2) * b.w.flatten()).sum() / b.w.sum()
        torch.testing.assert_close(loss_of(model, b, smoothing=0.2), want)
        counts = b.w > 0
        if (b.w[counts] == 1).all(): torch.testing.assert_close(want, F.cross_entropy(logits[counts], b.y[counts], label_smoothing=0.2))


def test_smoothing_is_trained_and_not_measured():
    plain, smooth = run_steps(1), run_steps(1, smoothing=0.3)
    assert smooth.loss_now != plain.loss_now
    model, tok, docs = parts()
    first = [go(steps=2, batch=2, smoothing=s).metrics[0]["val"] for s in (0.0, 0.3)]
    assert first[0] == first[1]


def test_one_batch_again_and_again(monkeypatch):
    t, seen, real = begun(overfit_one_batch=True, accumulate=2), [], Batches.__getitem__
    monkeypatch.setattr(Batches, "__getitem__", lambda b, k: seen.append(k) or real(b, k))
    for _ in range(3): t.advance(0)
    assert seen == [0, 1] * 3


# Averages ------------------------------------------------------------------------------------------------------------

def test_the_average_is_a_sum_written_out():
    t, seen = begun(ema=0.9), []
    for k in range(5):
        t.advance(k / 5)
        seen.append([w.detach().clone() for w in t.model.parameters()])
    share = [0.9 ** 4, *(0.1 * 0.9 ** (4 - i) for i in range(1, 5))]      # the first weights are where it begins
    for j, mean in enumerate(t.opt.average.means.values()):
        torch.testing.assert_close(mean, sum(s * w[j] for s, w in zip(share, seen)))


def test_the_average_is_evaluated_and_kept_as_best(tmp_path):
    model, tok, docs = parts()
    run = go(tmp_path/"run", steps=8, batch=2, ema=0.5, eval_every=4, stop_at=4, dtype="float32")
    best, _ = load(tmp_path/"run"/"best", "cpu")
    assert evaluate_loss(best, tok, docs[:2])["nats_per_token"] == pytest.approx(run.metrics[-1]["val"], abs=1e-6)
    last, _ = load(tmp_path/"run"/"last", "cpu")
    assert not torch.equal(best.head.weight, last.head.weight), "last/ holds the weights that go on"
    rest = go(tmp_path/"run", resume=True)
    whole = go(steps=8, batch=2, ema=0.5, eval_every=4, dtype="float32")
    assert same(whole, rest) and whole.summary["val"] == rest.summary["val"]
    assert evaluate_loss(rest.model, tok, docs[:2])["nats_per_token"] == pytest.approx(rest.summary["val"]["nats_per_token"], abs=1e-6)


# Patience and over-fitting -------------------------------------------------------------------------------------------

def losses_are(monkeypatch, given):
    real, left = trainer.evaluate_loss, iter(given)
    monkeypatch.setattr(trainer, "evaluate_loss", lambda *args, **kw: real(*args, **kw) | dict(nats_per_token=next(left)))


def test_patience_ends_a_run_and_best_is_kept(tmp_path, monkeypatch):
    losses_are(monkeypatch, [6, 5, 4, 4.5, 4.2, 4.1, 3])
    run = go(tmp_path/"run", steps=20, batch=2, eval_every=2, patience=3)
    assert (run.summary["stopped"], run.summary["step"], run.summary["best"]) == ("patience", 10, dict(step=4, val=4))
    assert not (tmp_path/"run"/".previous").exists()
    assert step_in(tmp_path/"run"/"best") == 4 and step_in(tmp_path/"run"/"last") == 10
    again = go(tmp_path/"run", resume=True)
    assert (again.summary["stopped"], again.summary["step"]) == ("patience", 10), "it is over"
    losses_are(monkeypatch, [5] * 3)
    longer = go(tmp_path/"run", resume=True, patience=4)
    assert (longer.summary["stopped"], longer.summary["step"]) == ("patience", 12), "what was waited is remembered"


def test_over_fitting_is_said(tmp_path, monkeypatch):
    losses_are(monkeypatch, [6, 5, 5.2, 5.4, 5.6])
    run = go(tmp_path/"run", steps=40, batch=2, lr=1e-2, optimizer="adamw", eval_every=10, log_every=10)
    assert len(run.summary["warnings"]) == 1 and run.summary["warnings"][0].startswith("over-fitting: since step 10"), run.summary["warnings"]
    assert Run(tmp_path/"run").summary["warnings"] == run.summary["warnings"]
    rows = [dict(step=k, val=v, loss=x) for k, (v, x) in enumerate([(5, 5), (4, 4), (4.001, 3), (4.002, 2)])]
    assert overfitting(rows) == "", "a thousandth is noise"


# What is no number ---------------------------------------------------------------------------------------------------

def spoilt(monkeypatch, steps):
    "At these steps the loss is nan."
    real = trainer.loss_of
    whole = trainer.Training.advance
    def advance(t, share):
        t.loss = (lambda *args: real(*args) * math.nan) if t.step in steps else real
        return whole(t, share)
    monkeypatch.setattr(trainer.Training, "advance", advance)


def test_a_batch_that_is_no_number_is_passed_over(tmp_path, monkeypatch):
    settings = dict(steps=12, batch=2, log_every=1, eval_every=4, ema=0.8)
    spoilt(monkeypatch, {2, 6, 7})
    whole = go(**settings)
    assert (whole.summary["stopped"], whole.summary["step"], whole.summary["skipped"]) == ("finished", 12, 3)
    assert [r.get("skipped") for r in whole.metrics if r["step"] in (2, 3, 7, 8, 12)] == [None, 1, 2, 3, 3]
    assert "3 so far" in whole.summary["warnings"][0] and all(math.isfinite(r.get("grad_norm", 0)) for r in whole.metrics), "JSON has no nan"
    go(tmp_path/"run", stop_at=7, **settings)             # between two that are skipped
    rest = go(tmp_path/"run", resume=True)
    assert same(whole, rest) and rest.summary["skipped"] == 3
    rows = lambda run: [(r["step"], r.get("loss"), r.get("val")) for r in run.metrics]
    assert rows(whole) == rows(rest)


def test_many_in_a_row_stop_the_run(tmp_path, monkeypatch, capsys):
    spoilt(monkeypatch, {3, 6, 7, 8, 9, 10})
    model, tok, docs = parts()
    run = train(model, tok, docs, val=docs[:2], out=tmp_path/"run", steps=20, batch=2, eval_every=5, device="cpu", compile=False)
    assert (run.summary["stopped"], run.summary["step"], run.summary["skipped"]) == ("diverged", 11, 6)
    assert "stopped at step 11: 5 in a row" in run.summary["warnings"][-1] and "stopped at step 11" in capsys.readouterr().err
    assert step_in(tmp_path/"run"/"last") == 10 and all(w.isfinite().all() for w in load(tmp_path/"run"/"last", "cpu")[0].parameters())
    go(tmp_path/"run", resume=True)      # in a row are those before and after a pause


# Checkpoints ---------------------------------------------------------------------------------------------------------

SETTINGS = dict(steps=12, batch=2, eval_every=3, ema=0.5, accumulate=2, patience=9, dtype="float32")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "SHA256SUMS", "state/optimizer.safetensors", "state/state.json"])
@pytest.mark.parametrize("how", ["half", "one bit", "missing"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys, file, how):
    if not (base := tmp_path/"run").exists(): go(base, stop_at=6, **SETTINGS)
    if (file, how) == ("SHA256SUMS", "missing"): return          # folders of others have none
    broken = base/"last"/file
    data = broken.read_bytes()
    if how == "missing": broken.unlink()
    else: broken.write_bytes(data[:len(data)//2] + (bytes([data[len(data)//2] ^ 1]) + data[len(data)//2 + 1:] if how == "one bit" else b""))
    capsys.readouterr()
    rest = go(base, resume=True)
    assert "the run goes on from step 3" in capsys.readouterr().err
    assert same(rest, whole_run()) and [r["step"] for r in rest.metrics if "val" in r] == [0, 3, 6, 9, 12]
    assert not (base/".previous").exists(), "a finished run needs none"


WHOLE = []
def whole_run():
    if not WHOLE: WHOLE.append(go(**SETTINGS))
    return WHOLE[0]


def test_two_damaged_checkpoints_are_refused_and_left(tmp_path):
    go(tmp_path/"run", stop_at=6, **SETTINGS)
    for name in ("last", ".previous"): (tmp_path/"run"/name/"state"/"optimizer.safetensors").write_bytes(b"")
    before = sorted(p for p in (tmp_path/"run").rglob("*"))
    with pytest.raises(UserError, match="optimizer.safetensors is missing or damaged"): go(tmp_path/"run", resume=True)
    assert sorted(p for p in (tmp_path/"run").rglob("*")) == before


def test_a_kill_between_last_and_best(tmp_path, monkeypatch):
    "What was the best is written at the next start."
    class Kill(BaseException): pass
    write = around.write_checkpoint
    def killed(folder, model, tok, opt, state, *more):
        if folder.name == "best" and state["step"] == 6: raise Kill
        return write(folder, model, tok, opt, state, *more)
    with monkeypatch.context() as m:
        m.setattr(around, "write_checkpoint", killed)
        with pytest.raises(Kill): go(tmp_path/"run", **SETTINGS)
    assert (step_in(tmp_path/"run"/"last"), step_in(tmp_path/"run"/"best")) == (6, 3)
    go(tmp_path/"run", resume=True, stop_at=6)
    assert step_in(tmp_path/"run"/"best") == 6


def full_between(monkeypatch, tmp_path, first=2, last=8):
    "No room from one step to another; which step last/ held at the end of it."
    real, whole, steps = folders.write_file, trainer.Training.advance, []
    def full(*args): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    def advance(t, share):
        monkeypatch.setattr(folders, "write_file", full if first <= t.step < last else real)
        if t.step == last: steps.append(step_in(tmp_path/"run"/"last"))
        return whole(t, share)
    monkeypatch.setattr(trainer.Training, "advance", advance)
    return steps


def test_a_best_that_could_not_be_saved_is_not_the_best(tmp_path, monkeypatch):
    full_between(monkeypatch, tmp_path)
    losses_are(monkeypatch, [6, 4, 4.2, 4.5, 5])           # the lowest came when there was no room
    run = go(tmp_path/"run", steps=12, batch=2, eval_every=3)
    assert run.summary["best"] == dict(step=9, val=4.5) and step_in(tmp_path/"run"/"best") == 9


def test_a_disk_that_is_full_for_a_while(tmp_path, monkeypatch, capsys):
    "The run goes on, says so once, saves when there is room, and ends as if nothing had happened."
    steps = full_between(monkeypatch, tmp_path)
    model, tok, docs = parts()
    run = train(model, tok, docs, val=docs[:2], out=tmp_path/"run", device="cpu", compile=False, **SETTINGS)
    said = [line for line in capsys.readouterr().err.splitlines() if "could not be saved" in line]
    assert len(said) == 1 and "last holds step 0" in said[0] and steps == [0], said
    assert same(run, whole_run()) and step_in(tmp_path/"run"/"last") == 12 and any("could not be saved" in w for w in run.summary["warnings"])
    best = {r["step"]: r["val"] for r in run.metrics if "val" in r}
    assert best[step_in(tmp_path/"run"/"best")] == run.summary["best"]["val"], "best/ is what it is said to be"


def test_lines_that_could_not_be_written_are_written_later(tmp_path):
    t = begun(tmp_path/"run", val=True)
    t.log(note="one")
    file = tmp_path/"run"/"metrics.jsonl"
    file.rename(tmp_path/"away")
    file.mkdir()                                  # stands for what no one can write to
    with pytest.raises(OSError): t.log(note="two")
    file.rmdir()
    shutil.copy(tmp_path/"away", file)
    with open(file, "a") as f: f.write('{"step": 0, "no')        # cut short
    t.whole_file = False
    t.log(note="three")
    assert [json.loads(line)["note"] for line in file.read_text().splitlines()] == ["one", "two", "three"]


def test_rows_are_the_same_after_a_pause_anywhere(tmp_path):
    "The mean that a line holds goes on too: a checkpoint between two lines forgets no step of it."
    settings = dict(steps=20, batch=2, log_every=5, save_every=3, eval_every=20)
    class Kill(BaseException): pass
    def killed(event, t):
        if event == "save" and t.step == 12: raise Kill
    with pytest.raises(Kill): go(tmp_path/"run", callbacks=[killed], **settings)
    rows = lambda run: [(r["step"], r.get("loss"), r.get("update_ratio"), r.get("val")) for r in run.metrics]
    assert rows(go(tmp_path/"run", resume=True)) == rows(go(**settings))


@pytest.mark.skipif(os.name == "nt", reason="SIGTERM")
def test_sigterm_saves(tmp_path):
    def ends(event, t):
        if event == "step" and t.step == 5: signal.raise_signal(signal.SIGTERM)
    run = go(tmp_path/"run", callbacks=[ends], **SETTINGS)
    assert (run.summary["stopped"], run.summary["step"], step_in(tmp_path/"run"/"last")) == ("interrupted", 5, 5)
    assert same(go(tmp_path/"run", resume=True), whole_run())


def test_folders_of_before_go_on(tmp_path):
    "A run whose settings and state know nothing of what was added since."
    settings = dict(steps=6, batch=2, dtype="float32")
    go(tmp_path/"run", stop_at=3, **settings)
    new = "tokenizer accumulate smoothing ema recompute eval_tokens entropy patience overfit_one_batch".split()
    for file, names in ((tmp_path/"run"/"config.json", new), (tmp_path/"run"/"last"/"state"/"state.json", ["skipped", "in_a_row", "waited", "since"])):
        kept = {k: v for k, v in json.loads(file.read_text()).items() if k not in [*names, "sha256"]}
        file.write_text(json.dumps(kept))
    assert same(go(tmp_path/"run", resume=True), go(**settings))


# Callbacks and figures -----------------------------------------------------------------------------------------------

def test_events_come_in_order():
    heard = []
    run = go(steps=4, batch=2, eval_every=2, log_every=1, callbacks=[lambda event, t: heard.append((event, t.step))])
    assert heard == [("begin", 0), ("evaluate", 0), ("step", 1), ("log", 1), ("step", 2), ("evaluate", 2), ("step", 3), ("log", 3), ("step", 4), ("evaluate", 4), ("end", 4)]
    assert run.summary["stopped"] == "finished"


def test_events_of_a_run_with_a_folder(tmp_path):
    heard = []
    def listen(event, t):
        heard.append(event)
        if event == "save": assert step_in(tmp_path/"run"/"last") == t.step
        if event == "end": t.summary_of_end["more"] = t.stopped
    run = go(tmp_path/"run", steps=3, batch=2, eval_every=3, log_every=1, save_every=2, callbacks=[listen])
    assert heard == "begin evaluate save step log step log save step evaluate save end".split()
    assert json.loads((tmp_path/"run"/"summary.json").read_text())["more"] == "finished"


def test_a_callback_stops_a_run_and_an_error_in_one_ends_it(tmp_path):
    def stop(event, t):
        if event == "step" and t.step == 3: t.stop = "enough"
    run = go(tmp_path/"run", steps=9, batch=2, callbacks=[stop])
    assert (run.summary["stopped"], run.summary["step"]) == ("enough", 3)
    assert same(go(tmp_path/"run", resume=True), go(steps=9, batch=2))
    def fails(event, t): raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError): go(steps=9, batch=2, callbacks=[fails])


def test_what_a_line_holds():
    run = go(steps=4, batch=2, log_every=2, eval_every=2, entropy=True, eval_tokens=100)
    row = next(r for r in run.metrics if r["step"] == 2)
    assert set(row["update_ratio"]) == {"matrices", "tables", "gains"} and all(0 < x < 1 for x in row["update_ratio"].values())
    assert 0 < row["peak_share"] < 2 and row["memory"] > 10_000_000 and row["val_se"] > 0
    assert len(row["entropy"]) == 2 and all(0 < x < math.log(64) for x in row["entropy"])
    assert run.summary["peak_memory"] >= row["memory"] and run.summary["skipped"] == 0 and run.summary["warnings"] == []
    assert run.summary["val"]["tokens"] < 110 < go(steps=1, batch=2).summary["val"]["tokens"]
    assert "entropy" not in go(steps=2, batch=2).metrics[0]


def test_the_standard_error_covers():
    "Of 40 samples of documents about two thirds hold the mean of all within one standard error."
    model, tok, docs = parts()
    scores = [evaluate_loss(model, tok, docs[k:k + 8]) for k in range(0, 80, 8)]
    everything = evaluate_loss(model, tok, docs)["nats_per_token"]
    off = [abs(s["nats_per_token"] - everything) / s["se"] for s in scores]
    assert 0.3 <= sum(x < 1 for x in off) / len(off) <= 1 and max(off) < 5
    assert evaluate_loss(model, tok, [docs[0][:40]])["se"] is None


def test_rows_of_a_step_decide_what_is_compiled():
    model = parts()[0]
    few = int(COMPILE_FROM["cpu"] / total_operations(1, 2, 64, model.cfg) / 2)
    compiles = lambda **kw: resolved(TrainConfig(steps=few, batch=2, ctx=64, **kw), model, "cpu").compile
    assert (compiles(), compiles(accumulate=8)) == (False, around.can_compile("cpu"))


# Tokenizers by kind --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, size", [("bytes", 261), ("chars", 6 + len(set("a rose is a rose, said Ro\n")) + 1), ("folder", 270)])
def test_a_run_takes_the_tokenizer_that_was_asked_for(tmp_path, monkeypatch, kind, size):
    from tiny_llm.deployment.cli import try_line
    from tiny_llm.text.tokenizer import train_tokenizer
    monkeypatch.chdir(tmp_path)
    text = "a rose is a rose, said Ro\n" * 60
    (tmp_path/"roses.txt").write_text(text)
    train_tokenizer([text] * 2, 270).save(tmp_path/"tok", ctx=32)
    name = str(tmp_path/"tok") if kind == "folder" else kind
    code, _, err = try_line(f"train --data roses.txt --tokenizer {name} --preset tiny --ctx 32 --steps 2 --batch 2 --out r", show=False)
    assert code == 0, err
    model, tok = load(tmp_path/"r"/"last", "cpu")
    assert len(tok) == size and model.cfg.vocab_size == size and tok.decode(tok.encode("a rose")) == "a rose"
