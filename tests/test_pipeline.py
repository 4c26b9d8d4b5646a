"A chain of runs: killed or stopped in any stage, the same line with --resume ends with the same weights; what does not fit is refused."
import json, os, signal, subprocess, sys, time
from pathlib import Path

import pytest
import torch

from house import environment
from tiny_llm.assistant.pipeline import parse_changes, pipeline, plot_stages, read_stages, stage_rows, steps_of
from tiny_llm.assistant.finetune import to_learn
from tiny_llm.basics import UserError, owned
from tiny_llm.deployment import cli
from tiny_llm.text.batches import tokenize
from tiny_llm.text.large_corpora import LargeBatches
from tiny_llm.text.stories import stories
from tiny_llm.text.tokenizer import train_tokenizer
from tiny_llm.training.folder import load
from tiny_llm.training.run import Run

pytestmark = pytest.mark.usefixtures("one_thread")

PLAN = """
preset: tiny
model: {dropout: 0.1}
vocab_size: 300
dtype: float32
compile: false
batch: 2
log_every: 1
save_every: 2
stages:
  - {name: read, kind: train, data: stories, limit: 60, steps: 16, ctx: 64, lr: 1e-2}
  - {name: more, kind: train, data: stories, limit: 40, seed: 3, epochs: 0.1, ctx: 96, optimizer: adamw}
  - {name: talk, kind: finetune, data: talks.jsonl, epochs: 4, accumulate: 2, ctx: 96}
"""


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    "A plan, its conversations, and the pipeline that nothing disturbed."
    d = tmp_path_factory.mktemp("pipeline")
    (d/"plan.yaml").write_text(PLAN)
    (d/"talks.jsonl").write_text("".join(json.dumps(dict(instruction=f"Say {n}.", output=f"It is {n}!")) + "\n" for n in range(40)))
    done = start(d, "whole")
    assert done.wait(300) == 0, done.stderr.read()
    return d


def start(desk, out, *more):
    line = [sys.executable, "-m", "tiny_llm", "pipeline", "plan.yaml", "--out", out, "--device", "cpu", *more]
    return subprocess.Popen(line, cwd=desk, env=environment(OMP_NUM_THREADS="1"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def disturbed(process, run, step, kind):
    "Send a signal once a run has logged a step; the exit code and what was said."
    file, end = run/"metrics.jsonl", time.monotonic() + 300
    while process.poll() is None and time.monotonic() < end:
        if file.exists() and f'"step": {step},' in file.read_text(): break
        time.sleep(0.01)
    assert process.poll() is None, process.stderr.read()
    os.kill(process.pid, kind)
    out, err = process.communicate(timeout=120)
    return process.returncode, err


def same(a, b):
    a, b = (load(x, "cpu")[0].state_dict() for x in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="kill -9")
def test_killed_and_stopped_in_every_stage(desk):
    "Killed in the first and the third stage, asked to stop in the second: bit by bit what it would have been."
    code, _ = disturbed(start(desk, "cut"), desk/"cut"/"read", 7, signal.SIGKILL)
    assert code == -signal.SIGKILL and not (desk/"cut"/"more").exists()
    code, said = disturbed(start(desk, "cut", "--resume"), desk/"cut"/"more", 2, signal.SIGTERM)
    assert code == 130 and "of stage more; the same line with --resume goes on" in said
    code, _ = disturbed(start(desk, "cut", "--resume"), desk/"cut"/"talk", 5, signal.SIGKILL)
    assert code == -signal.SIGKILL and not (desk/"cut"/"model").exists()
    last = start(desk, "cut", "--resume")
    out, err = last.communicate(timeout=300)
    assert last.returncode == 0 and out.splitlines()[0].startswith("stage") and "talk " in out, err
    for stage in ("read", "more", "talk"):
        assert same(desk/"whole"/stage/"last", desk/"cut"/stage/"last") and same(desk/"whole"/stage/"best", desk/"cut"/stage/"best"), stage
        steps = [r["step"] for r in Run(desk/"cut"/stage).metrics if "loss" in r]
        assert steps == list(range(1, len(steps) + 1)) and len(steps) == Run(desk/"whole"/stage).summary["step"]
    assert same(desk/"whole"/"model", desk/"cut"/"model")
    again = start(desk, "cut", "--resume")
    assert again.wait(120) == 2 and "is finished; its model is in" in again.stderr.read()


def test_each_stage_begins_with_the_best_of_the_one_before(desk):
    for before, stage in ("read", "more"), ("more", "talk"):
        run = Run(desk/"whole"/stage)
        assert Path(run.made["began_with"]) == desk/"whole"/before/"best"
        assert run.made["tokenizer"] == Run(desk/"whole"/before).made["tokenizer"]
    assert same(desk/"whole"/"model", desk/"whole"/"talk"/"best") and not same(desk/"whole"/"model", desk/"whole"/"more"/"best")
    names = {p.name for p in (desk/"whole").iterdir()}
    assert names - {".lock"} == {"read", "more", "talk", "model", "pipeline.json", "plots.png", "summary.json"}


def test_the_settings_reach_their_runs(desk):
    read, more, talk = (Run(desk/"whole"/s).config for s in ("read", "more", "talk"))
    assert (read.lr, read.optimizer, read.ctx, read.steps, read.data) == (0.01, "muon", 64, 16, "stories")
    assert (more.lr, more.optimizer, more.ctx, more.seed, more.limit) == (0.004, "adamw", 96, 3, 40)
    assert (talk.accumulate, talk.batch, talk.data, talk.model["ctx"], talk.model["dropout"]) == (2, 2, "talks.jsonl", 96, 0.1)


def test_epochs_read_each_row_so_often(desk):
    talk = Run(desk/"whole"/"talk")
    words, *_ = to_learn(str(desk/"talks.jsonl"), load(desk/"whole"/"talk"/"best", "cpu")[1], 96, quiet=True)
    rows, batches = [0] * (b := LargeBatches(words, 96, 2)).n_rows, talk.summary["step"] * 2
    for k in range(batches):
        for row in b.rows(k): rows[row] += 1
    assert min(rows) == 4 and sum(rows) - 4 * len(rows) < 4, "each row four times, and less than a step besides"
    tokens = tokenize(stories(40, seed=3), train_tokenizer(stories(40), 300))
    assert steps_of(tokens, 96, 2, 1, epochs=2) in (2 * steps_of(tokens, 96, 2, 1, epochs=1) - 1, 2 * steps_of(tokens, 96, 2, 1, epochs=1))
    assert steps_of(tokens, 96, 2, 3, predictions=tokens.n_tokens) == steps_of(tokens, 96, 6, 1, epochs=1)
    assert steps_of(tokens, 96, 64, 64, epochs=0.001) == 1


def refused(words, plan, out, **kw):
    with pytest.raises(UserError) as e: pipeline(plan, out, quiet=True, **kw)
    assert words in str(e.value), e.value


def half(desk, tmp_path):
    "A pipeline that was begun and is not finished."
    def stops(event, t):
        if event == "step" and t.step == 2: t.stop = "interrupted"
    with pytest.raises(KeyboardInterrupt, match="stopped at step 2 of stage read"): pipeline("plan.yaml", tmp_path/"half", quiet=True, callbacks=[stops])
    return tmp_path/"half"


def test_other_wishes_and_damaged_records_are_refused(desk, tmp_path, monkeypatch):
    monkeypatch.chdir(desk)
    out = half(desk, tmp_path)
    go = dict(plan="plan.yaml", out=out, resume=True)
    refused("stage talk: lr is 0.5, but the pipeline in", change=dict(talk=dict(lr=0.5)), **go)
    refused("was begun without it", change=dict(talk=dict(lr=0.5)), **go)
    refused("stage talk: epochs is 5, but", change=dict(talk=dict(epochs=5)), **go)
    short = read_stages("plan.yaml")
    refused("the stages are read, more, but", dict(stages=[s.given for s in short[:2]]), out, resume=True)
    refused("already holds a pipeline; go on with it (--resume)", "plan.yaml", out)
    record = out/"pipeline.json"
    whole = record.read_text()
    record.write_text(whole.replace("0.01", "0.02"))
    refused("pipeline.json is damaged", **go)
    record.write_text(whole)
    (tmp_path/"less.yaml").write_text(PLAN.replace(", lr: 1e-2", ""))
    refused("stage read: lr is not given, but the pipeline in", tmp_path/"less.yaml", out, resume=True)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    refused("stage talk: 'gone.jsonl' does not exist", change=dict(talk=dict(data="gone.jsonl")), plan="plan.yaml", out=tmp_path/"new")
    assert not (tmp_path/"new").exists() and before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_patience_ends_a_stage_and_not_the_pipeline(tmp_path):
    rough = dict(name="a", kind="train", data="stories", limit=30, steps=40, lr=2.0, optimizer="adamw", warmup=0, patience=1, eval_every=1)
    plan = dict(stages=[rough, dict(name="b", kind="train", data="stories", limit=30, steps=2)], preset="tiny", vocab_size=300, ctx=32, batch=2)
    try: a, b = pipeline(plan, tmp_path/"out", quiet=True, device="cpu")
    except KeyboardInterrupt as e: pytest.fail(f"the second stage did not begin: {e}")
    assert a.summary["stopped"] == "patience" and a.summary["step"] < 40 and (b.summary["stopped"], b.summary["step"]) == ("finished", 2)
    assert b.metrics[0]["val"] < max(r["val"] for r in a.metrics if "val" in r), "it begins with the best weights, not the last"


def test_the_plot_puts_stages_behind_one_another(desk):
    runs = [Run(desk/"whole"/s) for s in ("read", "more", "talk")]
    ends = [sum(r.summary["tokens"] for r in runs[:n]) / 1e6 for n in (1, 2, 3)]
    ax = plot_stages(runs).axes[0]
    borders = [l.get_xdata()[0] for l in ax.lines if l.get_linestyle() == ":"]
    assert borders == ends[:2] and max(max(l.get_xdata()) for l in ax.lines) == ends[2]
    rows = stage_rows(runs)
    assert [r["tokens"] for r in rows] == [r.summary["tokens"] for r in runs] and [r["steps"] for r in rows][0] == 16
    assert [round(r["best_val"], 6) for r in rows] == [round(min(m["val"] for m in r.metrics if "val" in m), 6) for r in runs]


def test_one_process_owns_the_folder(desk, tmp_path):
    out = tmp_path/"mine"
    with owned(out):
        other = start(desk, out)
        assert other.wait(120) == 2
        assert "is in use by process" in other.stderr.read() and not (out/"pipeline.json").exists()
    (tmp_path/"full").mkdir()
    (tmp_path/"full"/"thesis.txt").write_text("x")
    refused("holds something else", desk/"plan.yaml", tmp_path/"full")
    refused("holds something else", desk/"plan.yaml", tmp_path/"full", resume=True)
    refused("holds no pipeline to resume", desk/"plan.yaml", tmp_path/"none", resume=True)


def test_a_kill_before_the_record_is_no_reason_to_complain(desk, tmp_path, monkeypatch):
    "An empty folder, as a kill leaves it that came first, is begun by --resume."
    monkeypatch.chdir(desk)
    (tmp_path/"early").mkdir()
    (tmp_path/"early"/".lock").touch()
    plan = dict(stages=[dict(name="a", kind="train", data="stories", limit=20, steps=1, preset="tiny", vocab_size=300, ctx=32, batch=2)])
    assert [r.summary["stopped"] for r in pipeline(plan, tmp_path/"early", resume=True, quiet=True, device="cpu")] == ["finished"]


@pytest.mark.parametrize("change, words", [
    (dict(read=dict(stesp=3)), "stage read has no field 'stesp'. Did you mean 'steps'?"),
    (dict(raed=dict(steps=3)), "has no stage 'raed' to change. Did you mean 'read'?"),
    (dict(read=dict(steps=3, epochs=2)), "stage read has steps and epochs; give one of"),
    (dict(more=dict(preset="tiny")), "stage more has preset, but it begins with the model of the stage before"),
    (dict(more=dict(ctx=96), read=dict(model=dict(ctx=64))), "stage more reads rows of 96, but the model's ctx is 64"),
    (dict(read=dict(kind="finetune")), "stage read is the first, so there is no model to finetune"),
    (dict(read=dict(warmup=2)), "stage read: warmup is 2"),
    (dict(read=dict(repeat="runs/x")), "stage read has no field 'repeat'"),
])
def test_a_plan_that_does_not_fit(desk, tmp_path, change, words):
    refused(words, desk/"plan.yaml", tmp_path/"out", change=change)
    assert not (tmp_path/"out").exists()


@pytest.mark.parametrize("text, words", [
    ("lr: 1", "has no stages"), ("stages: []", "has no stages"), ("stages: {a: 1}", "has no stages"), ("stages: [1]", "stage 1 is 1; write names"),
    ("stages: [{kind: train, data: stories, steps: 3}]", "stage 1 has the name"),
    ("stages: [{name: a, kind: train, data: stories, steps: 3}, {name: a, kind: train, data: stories, steps: 3}]", "two stages named a"),
    ("stages: [{name: model, kind: train, data: stories, steps: 3}]", "stage model has the name 'model'"),
    ("stages: [{name: a, kind: train, steps: 3}]", "stage a names no data"), ("stages: [{name: a, kind: train, data: stories}]", "stage a has no budget"),
])
def test_a_file_that_is_no_plan(tmp_path, text, words):
    (tmp_path/"p.yaml").write_text(text)
    refused(words, tmp_path/"p.yaml", tmp_path/"out")


def test_options_reach_the_pipeline(monkeypatch):
    import tiny_llm.assistant.pipeline as module
    seen = []
    monkeypatch.setattr(module, "pipeline", lambda plan, out, **kw: seen.append((plan, out, kw)) or [])
    monkeypatch.setattr(module, "stage_table", lambda rows: "table")
    code, out, err = cli.try_line("pipeline p.yaml --out o --change a.steps=4,b.data=stories=3,python=1 --device cpu --resume", show=False)
    assert code == 0 and out.startswith("table"), err
    (plan, where, kw), = seen
    assert (plan, where, kw["change"], kw["resume"], kw["device"]) == ("p.yaml", "o", dict(a=dict(steps=4), b=dict(data="stories=3,python=1")), True, "cpu")
    assert [f.__name__ for f in kw["callbacks"]] == ["doctor_callback"]
    with pytest.raises(UserError, match="write stage.field=value"): parse_changes("steps=4")
