"Every option reaches the function that obeys it: commands, quickstart and finetune with recorders in place of what takes long."
import importlib, json
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import pytest

from tiny_llm.basics import UserError
from tiny_llm.deployment import cli, quickstart as quick
from tiny_llm.training.config import TrainConfig, to_dict
from tiny_llm.training.watch import run_folders
import tiny_llm.assistant.chat, tiny_llm.assistant.finetune, tiny_llm.text.cleaning, tiny_llm.training.doctor     # whole, before a recorder takes the place of a part

DONE = dict(stopped="finished", dtype="float32", compiled=False, device="cpu", params=1, tokens=8, step=2, seconds=30.0, tokens_per_s=1.0)
TOLD, TALKED = dict(n=7, ok=0.0, kinds={}, tokens_per_second=1.0), dict(n=7, share=0.0, faults={})
DUCKS = [f"{n} little ducks went swimming one day" for n in range(40)]
SHAPE = dict(vocab_size=300, ctx=32, d_model=16, n_layers=1, n_heads=2)


def run(folder="r", **more): return SimpleNamespace(folder=Path(folder), summary=DONE | more, metrics=[], config=TrainConfig(), made={}, model=None)


class Words(list):
    "A tokenizer as far as its length matters."
    template, hash = "a template", "0" * 64


class Pieces(list):
    tokens_per_second = 2.0


@pytest.fixture
def watch(monkeypatch, tmp_path):
    "watch(module, name=what it gives, ...) -> list of (name, arguments by name), in the order of the calls."
    monkeypatch.chdir(tmp_path)
    calls = []
    def put(module, **gives):
        module = importlib.import_module(f"tiny_llm.{module}")
        for name, gift in gives.items():
            def recorder(*args, it=signature(getattr(module, name)), name=name, gift=gift, **kw):
                given = it.bind(*args, **kw)
                given.apply_defaults()
                calls.append((name, given.arguments | given.arguments.pop("kwargs", {})))
                return gift(**given.arguments) if callable(gift) else gift
            monkeypatch.setattr(module, name, recorder)
        return calls
    return put


def fine(line):
    code, out, err = cli.try_line(line, show=False)
    assert code == 0, out + err
    return out + err


def agrees(call, **wanted): assert {n: call.get(n) for n in wanted} == wanted


# Commands ------------------------------------------------------------------------------------------------------------

DRAWS = dict(max_tokens=9, temperature=0.5, top_k=4, top_p=0.75, min_p=0.25, repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=-0.5, seed=6)
DRAWN = " ".join(f"--{name} {value}" for name, value in DRAWS.items()) + " --stop 'a b' --stop=é"
DRAWS["stop"] = ["a b", "é"]


def test_every_setting_of_a_draw_is_an_option():
    from tiny_llm.assistant.generate import DEFAULTS, generate
    given = {*signature(generate).parameters} - {"model", "tok", "prompt", "interrupt", "top"}
    assert given == {*DRAWS} == {*DEFAULTS, "seed", "stop"}
    for command in (cli.generate, cli.chat): assert given <= {*signature(command).parameters}


def test_generate(watch):
    watch("deployment.cli", open_model=("net", "tok"))
    calls = watch("assistant.generate", stream=["x"])
    assert fine(f"generate --model M --prompt Hi --device cpu {DRAWN}") == "Hix\n"
    agrees(dict(calls)["open_model"], path="M", device="cpu")
    agrees(dict(calls)["stream"], model="net", tok="tok", prompt="Hi", **DRAWS)


def test_chat(watch):
    watch("deployment.cli", open_model=("net", "tok"))
    calls = watch("assistant.chat", ChatSession="session", talk=None)
    fine(f"chat --model M --system 'Be brief.' --device cpu {DRAWN}")
    agrees(dict(calls)["open_model"], path="M", device="cpu")
    agrees(dict(calls)["ChatSession"], model="net", tok="tok", system="Be brief.", **DRAWS)
    agrees(dict(calls)["talk"], session="session")


def test_data(watch):
    watch("deployment.cli", open_model=("net", "tok"))
    calls = watch("text.cleaning", data_card=SimpleNamespace(to_dict=dict))
    fine("data --data d.txt --model M --out card.json --seed 6 --limit 9 --column text")
    agrees(dict(calls)["data_card"], source="d.txt", tok="tok", seed=6, limit=9, column="text")


def test_eval(watch):
    watch("deployment.cli", open_model=(SimpleNamespace(cfg=SimpleNamespace(ctx=100)), Words()))
    watch("assistant.generate", grade_stories=TOLD)
    watch("assistant.finetune", grade_chat=TALKED)
    watch("training.benchmarks", benchmark=dict(text=None, tasks={}))
    calls = watch("text.sources", documents=["a", "b"])
    fine("eval --model M --split test --n 7 --temperature 0.5 --ctx 50 --stride 5 --batch 3 --seed 6 --device cpu --limit 9 --column text --tasks blimp --baseline N")
    agrees(dict(calls)["documents"], source="stories", split="test", limit=9, seed=6, column="text")
    agrees(dict(calls)["benchmark"], docs=["a", "b"], tasks="blimp", limit=9, windows=dict(ctx=50, stride=5, batch=3))
    assert [given["path"] for name, given in calls if name == "open_model"] == ["M", "N"]
    agrees(dict(calls)["grade_stories"], n=7, seed=6, temperature=0.5)
    agrees(dict(calls)["grade_chat"], n=7, seed=6, temperature=0.0, max_tokens=50)
    calls.clear()
    fine("eval --model M --data stories --n 0")
    assert "grade_stories" not in dict(calls) and "grade_chat" not in dict(calls)


def test_quickstart_command(watch):
    calls = watch("deployment.quickstart", quickstart={})
    fine("quickstart --minutes 0.5 --out q --seed 6 --device cpu --preset tiny --resume")
    agrees(dict(calls)["quickstart"], minutes=0.5, out="q", seed=6, device="cpu", preset="tiny", resume=True)


def test_the_chat_after_a_quickstart(watch, monkeypatch):
    watch("deployment.quickstart", quickstart={})
    calls, tty = watch("deployment.cli", chat=None), SimpleNamespace(isatty=lambda: True)
    monkeypatch.setattr(cli, "sys", SimpleNamespace(stdin=tty, stdout=tty))
    cli.quickstart(out="q", device="cpu")
    agrees(dict(calls)["chat"], model=str(Path("q")/"model"), device="cpu")


def test_info_and_plot(watch, tmp_path):
    assert "vocabulary 300, context 64" in fine("info --preset tiny --vocab_size 300 --ctx 64")
    for name in ("stories", "chat"): (tmp_path/"q"/name).mkdir(parents=True)
    for name in ("stories", "chat"): (tmp_path/"q"/name/"metrics.jsonl").touch()
    assert [p.name for p in run_folders("q")] == ["stories", "chat"]


def test_plan(watch):
    calls = watch("training.plan", forecast=SimpleNamespace(rows=lambda: [("memory", "7 MB")]))
    assert "7 MB" in fine("plan --preset tiny --ctx 32 --vocab_size 300 --batch 3 --steps 5 --device cpu --seconds 2.5 --past a,b")
    call = dict(calls)["forecast"]
    agrees(to_dict(call["config"]), preset="tiny", ctx=32, vocab_size=300, batch=3, steps=5)
    agrees(call, device="cpu", seconds=2.5, past=["a", "b"])
    assert (call["cfg"].d_model, call["cfg"].ctx, call["cfg"].vocab_size) == (64, 32, 300)


def test_tune(watch):
    watch("text.large_corpora", read=lambda **kw: iter(DUCKS))
    watch("text.sources", held_out=["held"])
    calls = watch("training.tune", tune=SimpleNamespace(rows=lambda: [("best trial", "7")]))
    assert "best trial" in fine("tune --data d.txt --preset tiny --ctx 32 --vocab_size 300 --batch 3 --seed 6 --device cpu --out r --minutes 2 --trials 9 "
                                "--trial_steps 11 --trial_minutes 0.5 --search lr --sampler random")
    call = dict(calls)["tune"]
    agrees(call, val=["held"], device="cpu", out="r", minutes=2.0, trials=9, trial_steps=11, trial_minutes=0.5, search="lr", sampler="random", seed=6, resume=False)
    agrees(to_dict(call["config"]), data="d.txt", preset="tiny", ctx=32, vocab_size=300, batch=3, seed=6, minutes=None, steps=None)
    assert call["began"] > 0 and (call["cfg"].d_model, call["cfg"].ctx) == (64, 32)


def test_the_setting_reaches_whoever_reads(monkeypatch, tmp_path):
    from tiny_llm.text import large_corpora
    asked = []
    def told(*args): asked.append(args) or (_ for _ in ()).throw(UserError("read"))
    monkeypatch.setattr(large_corpora, "text_of", told)
    for line in ("train --stream", "train --no_stream", "train", "tune --stream"):
        assert cli.try_line(f"{line} --data d --limit 7 --seed 3 --column c --preset tiny --out nowhere/r --device cpu", show=False)[0] == 2
    assert asked == [("d", 7, 3, "c", stream) for stream in (True, False, None, True)]
    past = to_dict(TrainConfig(steps=5, stream=False, model=SHAPE, vocab_size=300, data="e"))
    (tmp_path/"config.json").write_text(json.dumps(past | dict(made=dict(source="e"))))
    for line in ("", "--data d", "--limit 7"): assert cli.try_line(f"train --config {tmp_path}/config.json {line} --out nowhere/r --device cpu", show=False)[0] == 2
    assert [a[-1] for a in asked[4:]] == [False, None, None], "another text is looked at anew"


def test_words_of_the_line():
    assert cli.parse_options(cli.train, ["--no_compile"]) == cli.parse_options(cli.train, ["--no-compile"]) == dict(compile=False)
    assert cli.parse_options(cli.train, ["--compile", "--steps", "3"]) == dict(compile=True, steps=3)


def test_text_on_a_line_is_read_whatever_the_locale(monkeypatch):
    monkeypatch.setattr(cli, "as_typed", str.upper)
    assert cli.parse_options(cli.train, ["--column", "x", "--data", "y"]) == dict(column="X", data="y")
    assert cli.parse_options(cli.generate, ["--prompt", "x", "--model", "y"]) == dict(prompt="X", model="y")
    assert cli.parse_options(cli.chat, ["--system", "x", "--stop", "y", "--stop", "z"]) == dict(system="X", stop=["Y", "Z"])


@pytest.fixture
def fit(watch):
    "What `train` of the command line calls; its text is 40 documents, and one held out."
    watch("text.large_corpora", read=lambda **kw: iter(DUCKS))
    watch("text.sources", held_out=["held"])
    return watch("training.train", train=run())


def test_train(fit, watch):
    import torch
    from tiny_llm.transformer.model import Transformer
    assert "is not the one of" not in fine("train --data d.txt --steps 5 --preset tiny --ctx 32 --vocab_size 300 --batch 3 --lr 0.5 --seed 6 --limit 45 --column text --device cpu --out r")
    calls = dict(fit)
    agrees(calls["read"], source="d.txt", split="train", limit=45, seed=6, column="text")
    agrees(calls["held_out"], source="d.txt", limit=2, seed=6, column="text")
    agrees(calls["train"], val=["held"], device="cpu", resume=False)
    agrees(to_dict(calls["train"]["config"]), data="d.txt", steps=5, minutes=None, preset="tiny", ctx=32, vocab_size=300, batch=3, lr=0.5, seed=6, limit=45, column="text")
    made = calls["train"]["model"]
    torch.manual_seed(6)
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), Transformer(made.cfg).parameters())), "the seed of the weights"
    assert made.cfg.ctx == 32 and calls["train"]["began"] > 0


def test_train_from_a_run_s_settings(fit, tmp_path):
    "Options on the line win, what followed from others is derived anew, and another text is told."
    past = to_dict(TrainConfig(steps=5, lr=0.02, batch=7, ctx=32, model=SHAPE, vocab_size=300, data="d.txt"))
    (tmp_path/"config.json").write_text(json.dumps(past | dict(made=dict(source="file", sha256="0" * 64))))
    assert "the text is not the one of config.json" in fine("train --config config.json --optimizer adamw --seed 6 --device cpu --out r")
    agrees(to_dict(dict(fit)["train"]["config"]), steps=5, optimizer="adamw", lr=None, batch=7, seed=6)
    fine("train --config config.json --preset tiny --device cpu --out r")
    agrees(to_dict(fit[-1][1]["config"]), preset="tiny", ctx=None, batch=None, model=None)
    fine("train --config config.json --ctx 16 --device cpu --out r")
    assert fit[-1][1]["model"].cfg.ctx == 16 and fit[-1][1]["config"].batch is None


def test_train_goes_on(fit, watch):
    watch("training.run", past_run=(TrainConfig(steps=5, model=SHAPE, vocab_size=300, data="d.txt", seed=6), {}))
    fine("train --out r --resume --log_every 3 --save_every 4 --device cpu")
    agrees(dict(fit)["train"], resume=True, log_every=3, save_every=4, config=None)
    agrees(dict(fit)["read"], seed=6)


@pytest.mark.parametrize("past", [None, (TrainConfig(steps=5, seed=6, data="c.jsonl", limit=45), dict(began_with="S"))], ids=["new", "goes on"])
def test_finetune(watch, past):
    watch("training.run", past_run=past)
    watch("deployment.cli", open_model=("net", "tok"))
    calls = watch("assistant.finetune", finetune=run(), read_conversations=lambda source, split, limit, seed: [split] * 3)
    more = "--resume" if past else "--model M --data c.jsonl --seed 6 --limit 45 --steps 5 --lr 0.5"
    fine(f"finetune --out r --device cpu {more}")
    read = [given for name, given in calls if name == "read_conversations"]
    assert [(r["source"], r["split"], r["limit"], r["seed"]) for r in read] == [("c.jsonl", "train", 45, 6), ("c.jsonl", "val", 2, 6)]
    agrees(dict(calls)["open_model"], path="S" if past else "M", device="cpu")
    agrees(dict(calls)["finetune"], model="net", tok="tok", conversations=["train"] * 3, val=["val"] * 3, device="cpu", resume=bool(past))
    if not past: agrees(to_dict(dict(calls)["finetune"]["config"]), data="c.jsonl", steps=5, lr=0.5, seed=6, limit=45)


def test_mistakes_have_a_code_of_their_own(watch, capsys):
    def stop(**given): raise KeyboardInterrupt("stopped at step 7")
    def refuse(**given): raise UserError("no")
    watch("deployment.quickstart", quickstart=stop)
    assert cli.try_line("quickstart", show=False) == (130, "", "tiny_llm: stopped at step 7\n")
    watch("deployment.quickstart", quickstart=refuse)
    assert cli.try_line("quickstart", show=False) == (2, "", "tiny_llm: no\n")


# The functions behind them -------------------------------------------------------------------------------------------

@pytest.fixture
def both(watch):
    "What both trainings of the quickstart call; texts say their split."
    watch("text.stories", stories=lambda n, seed, split: [f"a story, {split}"] * n)
    watch("text.dialogues", conversations=lambda n, seed, split: [[f"a talk, {split}"]] * n)
    watch("text.tokenizer", tokenizer_for=Words([0] * 300))
    watch("deployment.quickstart", open_model=lambda path, device, kind=None: (f"model of {path}", Words([0] * 300)))
    watch("training.run", Run=lambda folder, **given: run(folder))
    watch("assistant.finetune", finetune=run())
    return watch("training.train", train=run())


def test_both_trainings(both, tmp_path):
    from tiny_llm.transformer.model import preset
    told, tuned = quick.train_both(tmp_path, dict(minutes=2.0, seed=6, preset="tiny"), "cpu", quick.RECIPE)
    first, second = dict(both)["train"], dict(both)["finetune"]
    agrees(first, docs=["a story, train"] * 8100, val=["a story, val"] * 400, minutes=0.9, seed=6, device="cpu", out=tmp_path/"stories", resume=False)
    assert first["config"].preset == "tiny" and first["model"].cfg.d_model == preset("tiny").d_model and first["model"].cfg.ctx == 512
    # the first took half a minute: what it left belongs to the second
    agrees(second, model=f"model of {tmp_path/'stories'}", conversations=[["a talk, train"]] * 9000, val=[["a talk, val"]] * 400,
           replay=["a story, train"] * 2250, minutes=1.5, seed=6, device="cpu", out=tmp_path/"chat", resume=False)
    assert [g["seed"] for name, g in both if name in ("stories", "conversations") and g["split"] == "train"] == [6, 6]
    for name in ("stories", "chat"): (tmp_path/name).mkdir()
    for name in ("stories", "chat"): (tmp_path/name/"config.json").write_text("{}")
    both.clear()
    quick.train_both(tmp_path, dict(minutes=2.0, seed=6, preset="tiny"), "cpu", quick.RECIPE)
    assert dict(both)["train"]["resume"] and dict(both)["finetune"]["resume"], "what was begun goes on"


def test_the_judge_of_the_quickstart(both, watch):
    watch("assistant.generate", grade_stories=TOLD, stream=Pieces())
    watch("assistant.finetune", grade_chat=TALKED)
    watch("training.train", evaluate_loss=lambda model, docs, **given: dict(of=model, docs=docs))
    s = quick.judge(run("first", tokens_per_s=5.0), run("second", tokens=3), "cpu", quick.RECIPE)
    held = ["a story, val"] * 400
    agrees(s, val=dict(of="model of second", docs=held), val_before_chat=dict(of="model of first", docs=held), tokens=dict(stories=8, chat=3), tokens_per_s=5.0,
           training_seconds=60.0, generation_tokens_per_s=2.0)
    assert all(given["model"] == "model of second" and given["n"] == 200 for name, given in both if name.startswith("grade"))


def test_what_the_quickstart_keeps(both, watch, tmp_path):
    watch("deployment.quickstart", train_both=(run("first"), run("second")), judge=dict(parameters=1), report_card="a card")
    watch("training.folder", save=None)
    quick.quickstart(0.5, tmp_path/"q", seed=6, device="cpu", preset="tiny")
    agrees(dict(both)["save"], model="model of second", folder=tmp_path/"q"/"model")
    agrees(dict(both)["train_both"], folder=tmp_path/"q", q=dict(minutes=0.5, seed=6, preset="tiny"), device="cpu")


def test_finetune_holds_out_by_its_seed(watch):
    "The run's own seed at a resume, else the one given, else that of the settings; `val` and `limit` are those of the source."
    module = importlib.import_module("tiny_llm.assistant.finetune")
    chats = [[dict(role="user", content=f"{n}"), dict(role="assistant", content="Yes.")] for n in range(40)]
    from tiny_llm.text.tokenizer import train_tokenizer
    tok, model = train_tokenizer(["Yes, no, perhaps."] * 4, 300), SimpleNamespace(cfg=SimpleNamespace(ctx=64))
    calls = watch("assistant.finetune", train=run(), hold_out=lambda pairs, seed: (pairs[2:], pairs[:2]), past_run=(TrainConfig(steps=5, seed=7), {}), tokenize=lambda docs, tok, **kw: docs)
    for given, seed in [(dict(config=TrainConfig(steps=5, seed=6)), 6), (dict(seed=5), 5), (dict(resume=True, out="r"), 7)]:
        module.finetune(model, tok, chats, replay=["a story"], quiet=True, **given)
        agrees([g for name, g in calls if name == "hold_out"][-1], seed=seed)
        agrees(calls[-1][1], val=[tok.chat(c) for c in chats[:2]], docs=[*map(tok.chat, chats[2:]), "a story"])
    watch("assistant.finetune", read_conversations=lambda source, split, limit, seed: chats[:3] if split == "val" else chats)
    module.finetune(model, tok, "c.jsonl", limit=60, quiet=True)
    assert [(g["split"], g["limit"]) for name, g in calls if name == "read_conversations"] == [("train", 60), ("val", 3)]
    assert len(calls[-1][1]["val"]) == 3 and len(calls[-1][1]["docs"]) == 40


def test_replies_are_graded_at_temperature_0(watch):
    "So many requests, of the test split; a right reply is no fault."
    from tiny_llm.text.dialogues import NOT_SAID, conversations
    from tiny_llm.text.tokenizer import train_tokenizer
    tok = train_tokenizer([m["content"] for c in conversations(20) for m in c], 400)
    polite = [*tok.encode(NOT_SAID), tok.end]         # right where a question goes beyond the story
    calls = watch("assistant.finetune", generate_batch=lambda prompts, **given: [polite] * len(prompts), story_talk=conversations)
    grade = importlib.import_module("tiny_llm.assistant.finetune").grade_chat(SimpleNamespace(cfg=SimpleNamespace(ctx=2000)), tok, n=90, seed=6)
    agrees(dict(calls)["generate_batch"], temperature=0.0, max_tokens=230, seed=6, top_k=0, top_p=1.0)    # not the folder's
    agrees(dict(calls)["story_talk"], split="test", seed=6)
    right = round(90 * grade["share"])
    assert grade["n"] == 90 and 0 < right < 90 and sum(grade["faults"].values()) == 90 - right


def test_only_what_teaches_is_held_out():
    pairs = [([n], [n % 2]) for n in range(400)]
    kept, held = tiny_llm.assistant.finetune.hold_out(pairs, 0)
    assert len(held) == 10 and all(weights == [1] for _, weights in held) and len(kept) == 390


def test_requests_stand_anywhere_in_a_conversation():
    from tiny_llm.text.dialogues import conversations
    from tiny_llm.text.tokenizer import train_tokenizer
    tok = train_tokenizer([m["content"] for c in conversations(20) for m in c], 400)
    cuts, _ = tiny_llm.assistant.finetune.held_out_requests(tok, 60, 0, 2000)
    assert all(c[-1]["role"] == "user" for c in cuts) and {1, 3} <= {len(c) for c in cuts}


def test_a_long_reply_leaves_room_for_what_was_said():
    from tiny_llm.text.tokenizer import train_tokenizer
    from tiny_llm.transformer.model import Transformer, preset
    tok = train_tokenizer(["Hi there, hello."] * 9, 300)
    session = tiny_llm.assistant.chat.ChatSession(Transformer(preset("tiny", vocab_size=len(tok), ctx=128)), tok, max_tokens=500)
    session.turns = [dict(role="user", content="Hi"), dict(role="assistant", content="Hello")] * 2
    session.reply("Hi")
    assert session.forgotten == 0 and session.last.prompt == tok.prompt(session.turns[:-1])


def test_what_is_forgotten_is_told_once():
    said, chat = [], tiny_llm.assistant.chat
    session = SimpleNamespace(forgotten=0, notice="told", last=SimpleNamespace(reason="stop"), turns=[dict(content="")])
    for n in (2, 2, 4):
        def reply(line, n=n):
            session.forgotten = n
            return ["Yes."]
        session.reply = reply
        chat._answer(session, "Hi", said.append, "", SimpleNamespace(mode="reply"))
    assert [s for s in said if s.strip()] == ["(told)\n", "Yes.", "Yes.", "(told)\n", "Yes."]
