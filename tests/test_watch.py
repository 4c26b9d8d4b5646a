"""Watching a run: signs of life beside busy loops, a plot that redraws in a real JupyterLab, and what TensorBoard, Weights & Biases and MLflow were told,
read back from their own files, over kills and resumes."""
import io, json, os, re, signal, subprocess, sys, threading
from types import SimpleNamespace
from unittest.mock import patch as replaced

import pytest
import torch

import tiny_llm.basics as basics
from tiny_llm.basics import PAUSE, UserError, alive, note
from tiny_llm.text.stories import stories
from tiny_llm.text.tokenizer import train_tokenizer
from tiny_llm.training import watch
from tiny_llm.training.config import to_dict
from tiny_llm.training.run import Run
from tiny_llm.training.train import train
from tiny_llm.training.watch import LivePlot, Pace, Tracker, best_beta, draw_live, flat, numbers, smooth, thin, tracker, untold
from tiny_llm.transformer.model import Transformer, preset

pytestmark = pytest.mark.usefixtures("one_thread")

try:
    import test_chat_browser as browser
    from test_chat_browser import lab  # noqa: F401, the fixture: a JupyterLab of our own
except pytest.skip.Exception: browser = None

DOCS, HELD = [str(d) for d in stories(120, seed=5)], stories(6, seed=5, split="val")
TOK = train_tokenizer(DOCS, 300)


def run(out=None, callbacks=(), steps=24, **how):
    torch.manual_seed(0)
    model = Transformer(preset("tiny", vocab_size=len(TOK), ctx=32, d_model=16))
    how = dict(batch=2, log_every=2, eval_every=8, save_every=6, dtype="float32", compile=False, device="cpu", quiet=True, entropy=True) | how
    return train(model, TOK, DOCS, val=HELD, out=out, steps=steps, callbacks=callbacks, **how)


# Signs of life

@pytest.fixture(autouse=True)
def signs(monkeypatch): monkeypatch.delenv("TINY_LLM_SIGNS", raising=False)        # conftest asks for silence


class Seconds:
    now = 100.0
    def __call__(self): return self.now


@pytest.fixture
def said(monkeypatch):
    "A clock that the test moves, no thread, nobody who watches: (clock, lines and when they came)."
    seconds, lines = Seconds(), []
    class Out(io.StringIO):
        def write(self, text):
            if text.strip(): lines.append((round(seconds.now - 100, 3), text.strip()))
    monkeypatch.setattr(basics, "_signs", basics._Signs(seconds))
    monkeypatch.setattr(basics, "_watched", lambda: False)
    monkeypatch.setattr(basics, "threading", SimpleNamespace(Thread=lambda **_: SimpleNamespace(start=lambda: None)))
    monkeypatch.setattr(basics, "sys", SimpleNamespace(stderr=Out(), modules=sys.modules))
    return seconds, lines


def gaps(lines, end): return [b - a for a, b in zip([0.0, *(at for at, _ in lines)], [*(at for at, _ in lines), end])]


@pytest.mark.parametrize("piece", [0.01, 0.1, 0.37])
def test_no_silence_of_two_seconds(said, piece):
    "By one task that counts, by many short ones, and by one inside another."
    seconds, lines = said
    def work(n):
        with alive("counting", n, "things") as count:
            for _ in range(n):
                seconds.now += piece
                count()
    work(int(10 / piece))
    for _ in range(30): work(max(1, int(0.4 / piece)))        # none of them long enough for a sign of its own
    with alive("all of it"): work(int(10 / piece))
    assert max(gaps(lines, seconds.now - 100)) < 2 and min(gaps(lines, lines[-1][0])[:-1]) > PAUSE - 1e-6, lines
    assert any("all of it: counting" in text for _, text in lines)


def test_the_thread_speaks_for_one_long_call(said):
    seconds, lines = said
    with alive("compiling"):
        for _ in range(100):          # what the thread does, on the clock of the test
            seconds.now += 0.2
            basics._signs.sign()
    assert max(gaps(lines, 20)) < 2 and len(lines) >= 10
    assert lines[0][1] == "compiling, 1 s" and lines[-1][1].startswith("compiling, 1")


def test_short_tasks_say_nothing(said):
    seconds, lines = said
    for _ in range(5):
        with alive("quick", 2) as count:
            seconds.now += 0.7
            count()
        seconds.now += 60                    # somebody thinks, and begins the next
    assert not lines


def test_quiet_holds_for_what_is_inside_and_lets_the_outside_speak(said):
    seconds, lines = said
    def work(**how):
        with alive("inside", 9, **how) as count:
            for _ in range(9):
                seconds.now += 0.5
                count()
    with alive("outside", quiet=True): work()
    assert not lines
    with alive("outside"): work(quiet=True)
    assert [text.split(",")[0] for _, text in lines] == ["outside"] * len(lines) and lines


def test_a_note_is_a_sign_too(said):
    seconds, lines = said
    with alive("work") as count:
        for i in range(30):
            seconds.now += 0.1
            if i == 14: note("half of it")
            count()
    assert [text for _, text in lines] == ["half of it"]


@pytest.mark.parametrize("name, value", [("RANK", "1"), ("TINY_LLM_SIGNS", "0")])
def test_who_is_to_be_silent_is(said, monkeypatch, name, value):
    seconds, lines = said
    monkeypatch.setenv(name, value)
    with alive("work") as count:
        for _ in range(30):
            seconds.now += 0.1
            count()
    assert not lines


def test_an_error_closes_what_was_open(said):
    with pytest.raises(ZeroDivisionError), alive("a"), alive("b"): 1 / 0
    assert not basics._signs.open
    items = alive("a").each(iter(range(3)))
    with alive("b"):
        next(items)
        items.close()                        # a generator that is left alone is not the innermost one
        assert [one.text for one in basics._signs.open] == ["b"]


def test_shares_of_phases(said):
    whole, part = alive("whole"), alive("part", 10)
    whole.at(0.4, "second", ends=0.9)
    with whole, part:
        part(5)
        assert whole.share([part]) == pytest.approx(0.65) and part.share([]) == 0.5
        part(50)
        assert whole.share([part]) == pytest.approx(0.9)
    assert whole.share([]) == pytest.approx(0.4) and whole.words() == "second"
    assert alive("unknown").share([]) is None


BUSY = """
import sys, threading
from tiny_llm.basics import alive
def spin():
    while not over: pass
over, signs = [], []
class Err:
    def isatty(self): return False
    def write(self, text): signs.append(text.strip())
    def flush(self): pass
sys.stderr = Err()
for _ in range(2): threading.Thread(target=spin, daemon=True).start()
with alive("one long call"):
    n = 0
    while len([s for s in signs if s]) < 3: n += 1       # a loop that tells nobody how far it is; without signs it has no end
over.append(True)
print([s for s in signs if s])
"""


def test_signs_beside_two_busy_loops():
    "Two in the process, and two processes that keep both cores busy."
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try: out = subprocess.run([sys.executable, "-c", BUSY], capture_output=True, text=True, timeout=120)
    finally:
        for p in busy: p.kill()
    assert out.returncode == 0, out.stderr
    assert out.stdout.count("one long call, ") == 3


BAR = """
from tiny_llm.basics import alive, note
import tiny_llm.basics as b
class Clock:
    now = 0.0
    def __call__(self): return self.now
b._signs.clock = Clock()
with alive("whole") as whole:
    for i, name in enumerate(("first", "second")):
        whole.at(i / 2, name, ends=(i + 1) / 2)
        with alive("counting", 400, "things") as count:
            for n in range(400):
                b._signs.clock.now += 0.01
                count()
        note("a line of its own")
print("the end")
"""


@pytest.mark.skipif(os.name != "posix", reason="terminals of POSIX")
def test_a_bar_in_a_terminal():
    import fcntl, pty, struct, termios
    pid, fd = pty.fork()
    if not pid: os.execvp(sys.executable, [sys.executable, "-c", BAR])
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 90, 0, 0))
    out = b""
    while True:
        try: piece = os.read(fd, 4096)
        except OSError: break
        if not piece: break
        out += piece
    assert os.waitpid(pid, 0)[1] == 0, out.decode()
    shown = [s.strip() for s in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "\n", out.decode()))]
    shares = [int(m[1]) for s in shown if (m := re.match(r"(\d+)%\|.*\| (first|second): counting: \d+ of 400 things", s))]
    assert len(shares) > 4 and shares == sorted(shares) and shares[0] < 50 < shares[-1]
    assert shown.count("a line of its own") == 2 and shown[-1 if shown[-1] else -2] == "the end"


# The plot

def test_smooth_and_thin():
    values = [5 - 0.01 * i + (-1) ** i for i in range(100)]
    assert smooth([3.0], 0.9) == [3.0] and smooth([], 0.9) == [] and best_beta(values[:7]) == 0.0
    assert abs(smooth(values)[-1] - 4.01) < 0.3 and best_beta(values) > 0.7
    assert best_beta([5 - 0.1 * i for i in range(100)]) < 0.2            # no noise: the value itself
    kept = thin(values * 50)
    assert len(kept) <= 400 and list(kept) == sorted(kept) and max(values) in [values[i % 100] for i in kept]


@pytest.mark.parametrize("rows", [[], [dict(step=0, val=3.0)], [dict(step=1, loss=2.0)], [dict(step=1, loss=2.0, lr=0.1, grad_norm=0.0, tokens_per_s=9)],
                                  [dict(step=0, sample="x")], [dict(step=1, loss=2.0, update_ratio={}), dict(step=2, loss=1.0, update_ratio=dict(gains=0.1))]])
def test_few_rows_can_be_drawn(rows): assert watch.png_of(draw_live(rows))[:4] == b"\x89PNG"


def test_the_plot_keeps_to_its_share(tmp_path):
    seconds, drawn = Seconds(), []
    live = LivePlot(0.1, tmp_path/"live.png")
    live.pace = Pace(0.1, seconds)
    def draw(t):
        drawn.append(seconds.now)
        seconds.now += 1.0
    live.draw = draw
    t = SimpleNamespace(group=SimpleNamespace(rank=0), metrics=[dict(step=1, loss=1.0)], floor=None)
    for _ in range(1000):
        seconds.now += 0.1
        live("step", t)
        live("log", t)
    assert len(drawn) == 11 and all(b - a >= 10 - 1e-6 for a, b in zip(drawn, drawn[1:]))
    live("end", t)
    assert len(drawn) == 12                                                # the end is always drawn
    t.group.rank = 1
    live("end", t)
    assert len(drawn) == 12


def test_a_plot_in_a_file(tmp_path):
    live = LivePlot(file=tmp_path/"some"/"live.png")
    run(callbacks=[live])
    assert (tmp_path/"some/live.png").read_bytes() == live.png == live._repr_png_() and live.png[:4] == b"\x89PNG"
    with replaced.dict(sys.modules):
        sys.modules.pop("ipykernel", None)
        with pytest.raises(UserError, match="give a file"): LivePlot()
    with pytest.raises(UserError, match="between 0 and 1"): LivePlot(1.5)


SETUP = """
import time, torch
from tiny_llm.training.watch import LivePlot
from tiny_llm.text.stories import stories
from tiny_llm.text.tokenizer import train_tokenizer
from tiny_llm.training.train import train
from tiny_llm.transformer.model import Transformer, preset
torch.set_num_threads(1)
docs = [str(d) for d in stories(200)]
tok = train_tokenizer(docs, 300)
model = Transformer(preset("tiny", vocab_size=len(tok), ctx=32, d_model=16))
def slowly(event, t):
    if event == "step": time.sleep(0.05)
"""
CELL = """live = LivePlot(share=0.5)
ended = train(model, tok, docs, val=stories(6, split="val"), steps=150, batch=2, log_every=2, eval_every=15, dtype="float32", compile=False,
              device="cpu", callbacks=[live, slowly])"""


@pytest.mark.timeout(300)
@pytest.mark.skipif(browser is None or not browser.chromium(), reason="no Chromium here: apt install chromium")
def test_the_plot_redraws_in_place_in_jupyterlab(lab, tmp_path):       # noqa: F811
    (tmp_path/"work/chat.ipynb").write_text(browser.notebook(SETUP.strip(), CELL, "live"))
    with browser.playwright.sync_playwright() as p:
        page = p.chromium.launch(executable_path=browser.chromium(), args=browser.FLAGS).new_page(viewport=dict(width=1200, height=1000))
        page.set_default_timeout(browser.WAIT)
        page.goto(lab)
        page.wait_for_function("() => window.jupyterapp?.shell?.currentWidget?.context?.sessionContext?.session?.kernel?.status === 'idle'")
        page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
        seen, shot = [], False
        picture, ready = page.locator("img.widget-image"), page.locator(".jp-OutputArea-output img[src^='data:image/png']")
        page.wait_for_selector("img.widget-image")
        while not ready.count():                                          # the last cell shows the plot as a plain picture
            source = picture.evaluate("img => img.src + img.naturalWidth") if picture.count() else None
            if source and source not in seen: seen.append(source)
            if len(seen) == 4 and not shot:
                page.screenshot(path=tmp_path/"live.png")
                shot = True
            page.wait_for_timeout(50)
        page.screenshot(path=tmp_path/"end.png")
        assert picture.count() == 1, "one picture, redrawn, and no second one"
        assert len(seen) >= 4, f"{len(seen)} states of the picture were seen"
        assert picture.evaluate("img => img.naturalWidth") > 900
        page.context.browser.close()


# Trackers

@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def curves(rows):
    "name: [(step, number)] of rows, as a tracker should have it."
    found = {}
    for row in rows:
        for name, x in numbers(row).items():
            if name != "step": found.setdefault(name, []).append((row["step"], x))
    return found


def same(got, want):
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    for name in want: assert got[name] == [(step, pytest.approx(x, rel=1e-6)) for step, x in want[name]], name


def from_tensorboard(out):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(out/"tensorboard"), size_guidance=dict(scalars=0, tensors=0))
    events.Reload()
    found = {tag: sorted((e.step, e.value) for e in events.Scalars(tag)) for tag in events.Tags()["scalars"]}    # files of one second lie in any order
    texts = {tag: [e.tensor_proto.string_val[0].decode() for e in events.Tensors(tag)] for tag in events.Tags()["tensors"]}
    rows = {tag: points for tag, points in found.items() if not tag.startswith("summary/")}
    return rows, {tag: points for tag, points in found.items() if tag not in rows}, texts


def test_tensorboard_reads_what_was_told(tmp_path):
    done = run(tmp_path/"run", tracker("tensorboard"))
    rows, summary, texts = from_tensorboard(tmp_path/"run")
    same(rows, curves(done.metrics))
    assert summary["summary/step"][0][1] == 24 and summary["summary/val/nats_per_token"][0][1] == pytest.approx(done.summary["val"]["nats_per_token"])
    settings = json.loads(texts["settings/text_summary"][0].removeprefix("```json").removesuffix("```"))
    assert settings == json.loads(json.dumps(to_dict(done.config)))
    assert texts["sample/text_summary"] == [r["sample"] for r in done.metrics if r.get("sample")]
    assert json.loads(texts["summary/text_summary"][0].removeprefix("```json").removesuffix("```"))["stopped"] == "finished"


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, "tests")
import test_watch as here
here.torch.set_num_threads(1)
def die(event, t):
    if event == "step" and t.step == 17: os.kill(os.getpid(), signal.SIGKILL)
here.run(Path(sys.argv[1]), [*here.tracker(sys.argv[2]), die])
"""


def killed_and_resumed(out, kind, root):
    "A run that is killed at step 17, after rows that its checkpoint of step 12 knows nothing of, and goes on."
    env = {n: v for n, v in os.environ.items() if n != "WANDB_SERVICE"}        # of this process: the other one has its own
    env |= {"WANDB_MODE": "offline", "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    end = subprocess.run([sys.executable, "-c", KILLED, str(out), kind], cwd=root, env=env, capture_output=True, text=True, timeout=300)
    assert end.returncode == -signal.SIGKILL, end.stderr[-2000:]
    told = json.loads((out/"tracker.json").read_text())[kind]
    if kind != "wandb": assert told["last"][0] == 16           # further than the checkpoint
    done = run(out, tracker(kind), resume=True)
    after = json.loads((out/"tracker.json").read_text())[kind]
    assert after["id"] == told["id"] and after["last"][0] == 24
    return done, after["id"]


def by_value(rows):
    "Curves without what differs when a step is taken twice: its time."
    return {n: points for n, points in rows.items() if n not in ("seconds", "tokens_per_s", "peak_share", "memory")}


def test_tensorboard_over_a_kill(tmp_path, root):
    done, _ = killed_and_resumed(tmp_path/"run", "tensorboard", root)
    rows, _, texts = from_tensorboard(tmp_path/"run")
    same(by_value(rows), by_value(curves(done.metrics)))
    assert len(texts["settings/text_summary"]) == 1


def log_records(data):
    "The records of a log in LevelDB's format, behind W&B's own head of 7 bytes: blocks of 32 KiB, in them pieces with checksum, length and kind."
    at, record = 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7: at += left
        size, kind = int.from_bytes(data[at + 4:at + 6], "little"), data[at + 6]
        if not kind: break
        record += data[at + 7:at + 7 + size]
        at += 7 + size
        if kind in (1, 4):                     # whole, or its last piece
            yield record
            record = b""


def from_wandb(out):
    "(rows, settings, summary) of the records that lie below a run folder."
    from wandb.proto import wandb_internal_pb2
    rows, settings, summary, ids = [], {}, {}, set()
    for file in sorted(out.glob("wandb/offline-run-*/run-*.wandb"), key=lambda p: p.stat().st_mtime_ns):
        for data in log_records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("run"): ids.add(record.run.run_id)
            updates = [*record.config.update, *record.run.config.update]
            settings |= {u.key or "/".join(u.nested_key): json.loads(u.value_json) for u in updates}
            summary |= {u.key or "/".join(u.nested_key): json.loads(u.value_json) for u in record.summary.update}
            if record.HasField("history"):
                rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
    return rows, settings, summary, ids


def wandb_curves(rows):
    found = {}
    for row in rows:
        for name, x in row.items():
            if name[0] != "_" and name not in ("step", "sample"): found.setdefault(name, []).append((row["_step"], x))
    return found


def merged(rows):
    "Rows of one step as one: W&B has one entry for each."
    found = {}
    for row in rows: found.setdefault(row["step"], {}).update(row)
    return list(found.values())


def test_wandb_offline(tmp_path):
    done = run(tmp_path/"run", tracker("wandb"))
    rows, settings, summary, ids = from_wandb(tmp_path/"run")
    same(wandb_curves(rows), curves(merged(done.metrics)))
    assert [r["sample"] for r in rows if r.get("sample")] == [r["sample"] for r in done.metrics if r.get("sample")]
    want = json.loads(json.dumps(to_dict(done.config)))
    assert {n: settings.get(n) for n in want} == want
    assert summary["summary/stopped"] == "finished" and summary["summary/val/nats_per_token"] == pytest.approx(done.summary["val"]["nats_per_token"])
    assert len(ids) == 1


@pytest.mark.slow
def test_wandb_over_a_kill(tmp_path, root):
    done, id = killed_and_resumed(tmp_path/"run", "wandb", root)
    rows, _, _, ids = from_wandb(tmp_path/"run")
    assert ids == {id} and len(list((tmp_path/"run/wandb").glob("offline-run-*"))) == 2
    once = {name: sorted(set(points)) for name, points in by_value(wandb_curves(rows)).items()}     # a row may stand there twice, but as it was
    same(once, by_value(curves(merged(done.metrics))))


def test_a_row_is_safe_when_it_is_written_down(tmp_path, monkeypatch):
    "What a program still buffers is told again after a kill: it counts as told only when its time is over."
    class Buffers:
        settles = 5.0
        def open(self, *what): return "one"
        def row(self, row): pass
        def close(self, summary): pass
    kept, now = [], Seconds()
    def look(event, t):
        now.now += 1.0 if event == "log" else 0.0
        if event == "log": kept.append((t.step, json.loads((tmp_path/"run/tracker.json").read_text())["buffers"]["last"]))
    monkeypatch.setitem(watch.TRACKERS, "buffers", Buffers)
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=now))
    run(tmp_path/"run", [*tracker("buffers"), look], eval_every=1000)
    steps = [step for step, _ in kept]
    assert [last and last[0] for _, last in kept[:4]] == [None] * 4
    assert all(last[0] == steps[i - 5] for i, (_, last) in enumerate(kept) if i > 6), kept
    assert json.loads((tmp_path/"run/tracker.json").read_text())["buffers"]["last"][0] == 24


def from_mlflow(out, id):
    import mlflow
    client = mlflow.MlflowClient(f"sqlite:///{out.parent/'mlflow.db'}")
    data = client.get_run(id)
    found = {name: [(m.step, m.value) for m in client.get_metric_history(id, name)] for name in data.data.metrics}
    return {n: p for n, p in found.items() if not n.startswith("summary/")}, data, client


@pytest.mark.slow
def test_mlflow_in_a_file_over_a_kill(tmp_path, root):
    done, id = killed_and_resumed(tmp_path/"run", "mlflow", root)
    rows, data, client = from_mlflow(tmp_path/"run", id)
    same(by_value(rows), by_value(curves(done.metrics)))
    assert data.info.status == "FINISHED" and data.info.run_name == "run"
    assert data.data.params == {n: str(v)[:500] for n, v in flat(to_dict(done.config)).items() if v is not None}
    assert data.data.metrics["summary/val/nats_per_token"] == pytest.approx(done.summary["val"]["nats_per_token"])
    assert len(client.list_artifacts(id, "samples")) == sum(bool(r.get("sample")) for r in done.metrics)
    assert len(client.search_runs([data.info.experiment_id])) == 1
    run(tmp_path/"other", tracker("mlflow"), stop_at=10)                              # beside it, in the same data base
    two = client.search_runs([data.info.experiment_id])
    assert sorted((r.info.run_name, r.info.status) for r in two) == [("other", "KILLED"), ("run", "FINISHED")]


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path, monkeypatch):
    class Fails:
        rows, ends = [], []
        def open(self, *what): return "one"
        def row(self, row):
            if 4 < row["step"] < 12: raise ConnectionError("no network")
            self.rows.append(row)
        def close(self, summary): self.ends.append(summary["stopped"])
    monkeypatch.setitem(watch.TRACKERS, "fails", Fails)
    done = run(tmp_path/"run", tracker("fails"))
    assert done.summary["stopped"] == "finished" and "could not be told (no network)" in " ".join(done.summary["warnings"])


def test_rows_that_could_not_be_told_are_told_later(tmp_path, monkeypatch):
    class Away:
        rows, there = [], True
        def open(self, *what): return "one"
        def row(self, row):
            if not Away.there: raise ConnectionError("no network")
            self.rows.append(row)
        def close(self, summary): pass
    def network(event, t):
        if event == "step": Away.there = not 5 < t.step < 13
    monkeypatch.setitem(watch.TRACKERS, "away", Away)
    done = run(tmp_path/"run", [network, *tracker("away")])
    assert Away.rows == done.metrics


def test_a_tracker_begun_later_is_told_all(tmp_path, monkeypatch):
    told = []
    monkeypatch.setitem(watch.TRACKERS, "new", type("New", (), dict(open=lambda s, *w: "one", row=lambda s, r: told.append(r), close=lambda s, e: None)))
    run(tmp_path/"run", stop_at=10)
    done = run(tmp_path/"run", tracker("new"), resume=True)
    assert told == done.metrics == Run(tmp_path/"run").metrics


def test_what_is_missing_is_said_before_the_first_step(tmp_path):
    steps = []
    def count(event, t): steps.append(event)
    for module, kind in (("tensorboard", "tensorboard"), ("wandb", "wandb"), ("mlflow", "mlflow")):
        gone = {name: None for name in [module, *sys.modules] if name.split(".")[0] == module or name.startswith("torch.utils.tensorboard")}
        with replaced.dict(sys.modules, gone), pytest.raises(UserError, match=rf"pip install 'tiny_llm\[{kind}\]'"):
            run(tmp_path/kind, [*tracker(kind), count])
    assert "step" not in steps
    with pytest.raises(UserError, match="give out"): run(callbacks=tracker("tensorboard"))
    with pytest.raises(UserError, match="Did you mean 'mlflow'"): tracker("tensorboard,mlfow")


def test_untold_rows():
    rows = [dict(step=2), dict(step=4), dict(step=4, val=1.0), dict(step=6)]
    assert [key for key, _ in untold(rows, (4, 1))] == [(4, 2), (6, 1)] and not untold(rows, (6, 1)) and len(untold(rows, None)) == 4
