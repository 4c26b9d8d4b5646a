"The command `tiny_llm` as a person meets it: the road in processes of their own, and every mistake with its one line and exit code."
import errno, json, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path

import pytest

from house import environment, files

TL = Path(sys.executable).parent/"tiny_llm"
SMALL = ["--preset", "tiny", "--ctx", "64", "--batch", "4", "--vocab_size", "300", "--no-compile", "--dtype", "float32", "--device", "cpu"]
unix = pytest.mark.skipif(os.name == "nt", reason="needs signals and terminals as Unix has them")
pytestmark = pytest.mark.usefixtures("one_thread")    # as the processes have


def tl(*words, cwd, stdin=None, timeout=120, **env):
    "Run a line; what came of it."
    given = dict(input=stdin) if stdin is not None else dict(stdin=subprocess.DEVNULL)
    return subprocess.run([TL, *map(str, words)], cwd=cwd, env=environment(**env), capture_output=True, text=True, encoding="utf-8", timeout=timeout, **given)


def fine(*words, cwd, real=True, **kw):
    "A line that must end well; what it printed. `real`: in a process of its own."
    if real: p = tl(*words, cwd=cwd, **kw); code, out, err = p.returncode, p.stdout, p.stderr
    else: code, out, err = same_process(words, cwd)
    assert code == 0, f"{' '.join(map(str, words))} ended with {code}\n{out}{err}"
    return out


def same_process(words, cwd):
    "The same line without a new process: exit code, standard output, standard error."
    import contextlib, io
    from tiny_llm.deployment.cli import main
    out, err, here = io.StringIO(), io.StringIO(), os.getcwd()
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): code = main([str(w) for w in words])
    finally: os.chdir(here)
    return code, out.getvalue(), err.getvalue()


def wrong(*words, cwd, says, notes=0, code=2, real=True):
    "A line that must fail: one line of error (after `notes` notes), the exit code, and every file as it was. `real`: in a process of its own."
    before = files(cwd)
    if real: p = tl(*words, cwd=cwd); got, out, err = p.returncode, p.stdout, p.stderr
    else: got, out, err = same_process(words, cwd)
    lines = err.splitlines()
    assert got == code and out == "" and "Traceback" not in err, f"ended with {got}\n{out}{err}"
    assert len(lines) <= notes + 1 and lines[-1].startswith("tiny_llm: ") and says in lines[-1], err
    assert files(cwd) == before
    return lines[-1]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    "A folder with a small text and a run on it."
    d = tmp_path_factory.mktemp("desk")
    (d/"ducks.txt").write_text("\n".join(f"{n} little ducks went swimming one day, over the hills and far away." for n in range(600)))
    (d/"chats.jsonl").write_text("\n".join(json.dumps(dict(instruction=f"Greet {n}.", response=f"Hello, {n}!")) for n in range(100)))
    fine("train", "--data", "ducks.txt", "--steps", 20, *SMALL, "--out", "run", cwd=d)
    return d


@pytest.fixture
def room(desk, tmp_path):
    "A copy of the desk to break things in."
    shutil.copytree(desk, tmp_path/"room")
    return tmp_path/"room"


# The road ------------------------------------------------------------------------------------------------------------

def test_help_is_light_and_complete(tmp_path):
    from tiny_llm.deployment.cli import commands
    start = time.perf_counter()
    text = fine("--help", cwd=tmp_path)
    print(f"tiny_llm --help took {time.perf_counter() - start:.2f} s")
    assert all(f"\n  {word} " in text for word in "quickstart train generate chat finetune eval plot info".split())
    for word in commands:
        start = time.perf_counter()
        assert "--help" in fine(word, "--help", cwd=tmp_path)
        print(f"tiny_llm {word} --help took {time.perf_counter() - start:.2f} s")
    code = "import sys; from tiny_llm.deployment.cli import main; main(['quickstart', '--help']); sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'datasets')))"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True).returncode == 0


def test_train_made_a_run_folder(desk):
    assert {p.name for p in (desk/"run").iterdir()} == {".lock", "best", "config.json", "last", "metrics.jsonl", "plots.png", "summary.json"}


def test_generate_is_repeatable_and_plain(desk):
    line = ["generate", "--model", "run", "--prompt", "7 little", "--max-tokens", 12, "--temperature", 2, "--seed"]
    text = fine(*line, 3, cwd=desk)
    assert text.startswith("7 little") and (0, text, "") == same_process([*line, 3], desk) and "\x1b" not in text
    assert len({same_process([*line, seed], desk)[1] for seed in (3, 4, 5, -1)}) == 4, "the seed decides"


@unix
def test_a_text_arrives_whatever_the_locale(desk):
    for env in (dict(LANG="C"), dict(LC_ALL="C"), dict(LC_ALL="C", PYTHONUTF8="0")):
        line = ["generate", "--model", "run", "--prompt", "Öl, 猫", "--max_tokens", 1]
        out = subprocess.run([TL, *map(str, line)], cwd=desk, env=environment(**env), capture_output=True, stdin=subprocess.DEVNULL)
        seen = "Öl, 猫" if env.get("PYTHONUTF8") != "0" else "?l, ?"          # arrives, and cannot be shown
        assert out.returncode == 0 and out.stdout.decode().startswith(seen), out


def test_the_folder_s_own_settings(room):
    "What generation_config.json says holds where the line says nothing; /help shows it."
    best = room/"run"/"best"
    said = json.loads((best/"generation_config.json").read_text())
    def says(**fields):
        (best/"SHA256SUMS").unlink(missing_ok=True)
        (best/"generation_config.json").write_text(json.dumps(said | fields))
    def text(*more, seed=1): return same_process(["generate", "--model", "run", "--max_tokens", 9, "--seed", seed, *more], room)[1]
    says(do_sample=False)
    greedy = text("--temperature", 0)
    assert text() == text(seed=2) == greedy != text("--temperature", 2)
    says(temperature=2.0, top_k=1)
    assert text() == text(seed=2) == greedy != text("--top_k", 0)
    says(temperature=0.625, top_p=0.875, top_k=17)
    _, out, _ = same_process(["chat", "--model", "run"], room)      # standard input is empty
    said_here = fine("chat", "--model", "run", cwd=room, stdin="/help\n/top_k off\n/help\n")
    assert "now:    max_tokens 200, temperature 0.625, top_k 17, top_p 0.875" in said_here and "top_k off, top_p 0.875" in said_here
    says(eos_token_id=list(range(5, 280)))                          # nearly every token ends the text
    assert len(text("--temperature", 1)) < 9
    says(temperature="warm")
    wrong("generate", "--model", "run", cwd=room, says="temperature is 'warm'; give 0", real=False)


def test_weights_that_are_no_numbers(room):
    "One line in every command that reads a model, and nothing is graded or written."
    from safetensors.torch import load_file, save_file
    for name in ("best", "last"):
        file = room/"run"/name/"model.safetensors"
        state = load_file(file)
        state["model.layers.0.mlp.up_proj.weight"][3, 5] = float("nan" if name == "best" else "inf")
        save_file(state, file, {"format": "pt"})
        (room/"run"/name/"SHA256SUMS").unlink()
    for words in ("generate --model run --temperature 0", "generate --model run/last", "chat --model run", "eval --model run --data ducks.txt", "eval --model run",
                  "info --model run", "finetune --model run --data chats.jsonl --steps 2 --out new"):
        wrong(*words.split(), cwd=room, says="model.layers.0.mlp.up_proj.weight in", real=False)


def test_texts_that_end_a_text(desk):
    "The first to appear ends it and is not shown; the same in a reply of the chat."
    line = ["generate", "--model", "run", "--temperature", 0, "--max_tokens", 40, "--prompt", "7"]
    whole = fine(*line, cwd=desk).removesuffix("\n")
    early, late = whole[12:15], whole[24:27]
    assert fine(*line, "--stop", late, "--stop", "never said", "--stop", early, cwd=desk) == whole[:min(whole.index(early, 1), whole.index(late, 1))] + "\n"
    assert fine(*line, "--presence_penalty", 50, cwd=desk) != whole + "\n" != fine(*line, "--frequency_penalty", 50, cwd=desk)
    hot = ["--temperature", 5, "--seed", 1]
    assert fine(*line, *hot, "--min_p", 1, cwd=desk) == whole + "\n" != fine(*line, *hot, cwd=desk)
    chat = ["chat", "--model", "run", "--temperature", 0, "--max_tokens", 40]
    said = fine(*chat, cwd=desk, stdin="Hello\n").split("model> ")[1].split("\n")[0]
    cut = fine(*chat, "--stop", said[8:11], cwd=desk, stdin="Hello\n").split("model> ")[1].split("\n")[0]
    assert cut == said[:said.index(said[8:11])]


def test_only_what_steers_is_left_out(desk):
    "What a terminal obeys does not reach it; letters, spaces and joiners of all scripts do, in the prompt as in the reply."
    for text, seen in [("7\x1b[2J\x9b1m\u202educks\r\n\tgo", "7[2J1mducks\n\tgo"), ("10\xa0km, 第一。\u3000第二", None), ("می\u200cخواهم, 👩\u200d👧", None)]:
        out = fine("generate", "--model", "run", "--prompt", text, "--max_tokens", 1, cwd=desk)
        assert out.startswith(seen or text)
    said = fine("chat", "--model", "run", "--max_tokens", 1, cwd=desk, stdin="Hi \x1b[2J\u202e第一。\u3000!\n/exit\n")
    assert "you> Hi [2J第一。\u3000!\n" in said and "\x1b" not in said and "\u202e" not in said


def test_eval_plot_info(desk):
    said = fine("eval", "--model", "run", "--data", "ducks.txt", "--device", "cpu", cwd=desk)
    assert "validation loss" in said and "bits per byte" in said and "floor" not in said
    (desk/"run"/"plots.png").unlink()
    assert "plots.png" in fine("plot", "--run", "run", cwd=desk) and (desk/"run"/"plots.png").read_bytes()[:4] == b"\x89PNG"
    said = fine("info", "--model", "run", cwd=desk)
    assert "parameters" in said and "context 64" in said
    assert "quick" in fine("info", cwd=desk)
    said = fine("info", "--preset", "gpt-tiny", cwd=desk)
    assert said.count("27,073,024") == 3 and "claimed" in said      # by the formula, in the model, and as claimed
    assert said.count("52.23 million to generate, 156.70 million to train") == 2     # by the formula, and by PyTorch's counter
    assert "6,738,415,616" in fine("info", "--preset", "small-llm-7b", cwd=desk)


def test_finetune_then_chat_through_a_pipe(room):
    fine("finetune", "--model", "run", "--data", "chats.jsonl", "--steps", 5, "--batch", 4, "--out", "chat", cwd=room)
    said = fine("chat", "--model", "chat", "--max_tokens", 5, "--seed", 1, cwd=room,
                stdin="Greet 7.\n/temperature 0.5\n/top_k 5\n/top_q 5\n/clear\n/help\n/exit\nnever read\n")
    for part in ("you> Greet 7.", "model>", "temperature is 0.5.", "top_k is 5.", "no command /top_q", "The conversation is empty.", "/clear"): assert part in said
    assert "never read" not in said and "\x1b" not in said
    assert "you>" in fine("chat", "--model", "chat", "--max_tokens", 5, cwd=room, stdin="Hi")    # ends with the input


# Settings ------------------------------------------------------------------------------------------------------------

def sums(folder): return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".safetensors"}


def weights_of(run): return (run/"last"/"model.safetensors").read_bytes()


def test_a_run_is_repeated_from_its_config(room):
    "Bit for bit, with the text, the vocabulary, the shape, the seed and the schedule from the file."
    fine("train", "--data", "ducks.txt", "--steps", 12, *SMALL, "--seed", 5, "--lr", "0.01", "--decay", "cosine", "--out", "a", cwd=room, real=False)
    fine("train", "--config", "a/config.json", "--device", "cpu", "--out", "b", cwd=room)
    assert sums(room/"a"/"best") == sums(room/"b"/"best")
    (room/"mine.yaml").write_text("data: ducks.txt\nsteps: 12\nlr: 1e-2\ndecay: cosine\nseed: 5\npreset: tiny\nctx: 64\nbatch: 4\nvocab_size: 300\ncompile: false\ndtype: float32\n")
    fine("train", "--config", "mine.yaml", "--device", "cpu", "--out", "c", cwd=room, real=False)
    assert sums(room/"a"/"best") == sums(room/"c"/"best")
    fine("train", "--config", "mine.yaml", "--seed", 6, "--device", "cpu", "--out", "d", cwd=room, real=False)
    assert sums(room/"a"/"best") != sums(room/"d"/"best"), "options on the line win over the file"


def test_a_finetuning_is_resumed_by_finetune(room):
    "What Ctrl-C leaves of one, to `train --resume`."
    line = ("--model", "run", "--data", "chats.jsonl", "--steps", 4, "--batch", 4, "--no-compile", "--dtype", "float32", "--device", "cpu", "--out", "half")
    fine("finetune", *line, cwd=room, real=False)
    (room/"half"/"summary.json").unlink()
    wrong("train", "--out", "half", "--resume", cwd=room, real=False, says="best; go on with tiny_llm finetune --resume")
    fine("finetune", "--out", "half", "--resume", cwd=room, real=False)


def test_a_finetuning_is_repeated_from_its_config(room):
    fine("finetune", "--model", "run", "--data", "chats.jsonl", "--steps", 4, "--batch", 4, "--no-compile", "--dtype", "float32", "--device", "cpu", "--out", "a", cwd=room, real=False)
    fine("finetune", "--model", "run", "--config", "a/config.json", "--device", "cpu", "--out", "b", cwd=room)
    assert sums(room/"a"/"best") == sums(room/"b"/"best")


def test_runs_of_minutes_are_repeated(room):
    "The settings and, for a fine-tuning, the model to begin with are those of the run."
    fine("train", "--data", "ducks.txt", "--minutes", 0.15, *SMALL, "--seed", 5, "--out", "a", cwd=room, real=False)
    fine("train", "--repeat", "a", "--device", "cpu", "--out", "b", cwd=room)
    assert weights_of(room/"a") == weights_of(room/"b")
    fine("finetune", "--model", "a", "--data", "chats.jsonl", "--minutes", 0.15, "--batch", 4, "--no-compile", "--dtype", "float32", "--device", "cpu", "--out", "c", cwd=room)
    fine("finetune", "--repeat", "c", "--device", "cpu", "--out", "d", cwd=room, real=False)
    assert weights_of(room/"c") == weights_of(room/"d")
    assert json.loads((room/"d"/"config.json").read_text())["made"]["began_with"] == str(room/"a"/"best")


@pytest.mark.parametrize("text, says", [("warm_up: 0.1", "has no setting 'warm_up'. Did you mean 'warmup'?"), ("steps: many", "steps is 'many'; give a whole number above 0"),
                                        ("compile: 3", "compile is 3; give true or false"), ("optimizer: adam", "Did you mean 'adamw'?"), ("- steps\n- 5", "holds no settings"),
                                        ("steps 5", "holds no settings"), ("lr: [1", "cannot be read as YAML"), ("", "holds no settings"), ("steps: 5\nminutes: 1", "not both"),
                                        ("minutes: 1:30", "minutes is '1:30'; give a number above 0"), ("steps: 010", "steps is '010'; give a whole number"),
                                        ("model: 5", "give the fields of a model's shape"), ("data: 5", "data is 5; give a text")])
def test_a_wrong_settings_file_is_one_line(room, text, says):
    (room/"bad.yaml").write_text(text)
    said = wrong("train", "--config", "bad.yaml", "--out", "new", cwd=room, says=says, real=text.startswith("warm_up"))
    assert "bad.yaml" in said


def test_no_settings_file(room):
    wrong("train", "--config", "none.yaml", "--out", "new", cwd=room, says="none.yaml cannot be read", real=False)
    wrong("train", "--config", "ducks.txt", "--out", "new", cwd=room, says="ducks.txt cannot be read as JSON", real=False)


def test_help_lists_every_option_once():
    from fastcore.docments import docments
    from tiny_llm.training.config import LORA, TrainConfig
    lora = {f"--{n}" for n in LORA}
    for command, less in ("train", lora), ("finetune", set()):
        _, out, _ = same_process([command, "--help"], Path.cwd())
        names = [w[0] for line in out.splitlines() if (w := line.split()[:1]) and w[0].startswith("--")]
        assert len(names) == len(set(names))
        if command == "train": assert {f"--{n}" for n in docments(TrainConfig, returns=False)} - {"--model", "--betas"} - lora <= set(names)
        assert lora & set(names) == lora - less


# Mistakes ------------------------------------------------------------------------------------------------------------

REAL = [w.split()[:4] for w in ("trian", "train --minuts 3", "train --data ducks.txt --minutes", "train --data ducks.txt --preset", "train --data duck.txt",
                                "train --data empty.txt", "train --data binary.bin.txt", "train --data short.txt --preset", "generate --model rum", "chat")]

@pytest.mark.parametrize("words, says", [
    ("trian", "Did you mean 'train'?"),
    ("train --minuts 3", "no option --minuts; --help lists them. Did you mean '--minutes'?"),
    ("train --steps many", "invalid int value: 'many'"),
    ("train --steps", "expected one argument"),
    ("train ducks.txt", "'ducks.txt' stands alone"),
    ("train --data ducks.txt --minutes -1", "minutes is -1"),
    ("train --data ducks.txt --minutes nan", "minutes is nan"),
    ("train --data ducks.txt --minutes 1 --steps 5", "not both"),
    ("train --data ducks.txt --preset qwick", "Did you mean 'quick'?"),
    ("train --data ducks.txt --optimizer adam --steps 2 --preset tiny --out new", "Did you mean 'adamw'?"),
    ("train --data duck.txt", "Did you mean 'ducks.txt'?"),
    ("train --data empty.txt", "empty.txt"),
    ("train --data binary.bin.txt", "binary.bin.txt is a binary file"),
    ("train --data short.txt --preset tiny --steps 2 --out new", "give more text"),
    ("train --data ducks.txt --out run", "already holds a run"),
    ("train --data ducks.txt --out full", "is not empty"),
    ("train --data ducks.txt --out run --resume", "is finished"),
    ("train --data ducks.txt --out none --resume", "no run to resume"),
    ("train --data ducks.txt --device cudda", "no device 'cudda'"),
    ("quickstart --minutes -1", "minutes is -1"),
    ("quickstart --preset qick", "Did you mean 'quick'?"),
    ("quickstart --out run", "is not empty"),
    ("quickstart --out full", "is not empty"),
    ("quickstart --out full --resume", "holds no quickstart to resume"),
    ("generate --model rum", "Did you mean 'run'?"),
    ("generate --model full", "it has no config.json"),
    ("generate --model run --temperature -1", "temperature is -1"),
    ("generate --model nowhere --min_p 2", "min_p is 2.0; give a share of the likeliest token's probability"),
    ("generate --model nowhere --presence_penalty inf", "presence_penalty is inf; give a number"),
    ("generate --model nowhere --frequency_penalty much", "invalid float value: 'much'"),
    ("generate --model nowhere --stop=", "stop holds ''; give ids of tokens or texts"),
    ("generate --model run --stops x", "Did you mean '--stop'?"),
    ("chat --model nowhere --min_p -1", "min_p is -1.0"),
    ("chat --model nowhere --stop x --stop=", "stop holds ''"),
    ("chat", "there is no model folder runs/quickstart; make one with"),
    ("finetune --model run --data chat.jsonl", "Did you mean 'chats.jsonl'?"),
    ("finetune --model run --data broken.jsonl", "line 2"),
    ("finetune --model run --data rows.jsonl", "row 1 of rows.jsonl is no conversation"),
    ("finetune --model run --data chats.jsonl --steps 2 --out run", "already holds a run"),
    ("plot --run full", "is not a run folder"),
    ("info --preset tiny --model run", "not both"),
    ("info --preset tinny", "Did you mean 'tiny'?"),
])
def test_a_mistake_is_one_line(desk, words, says):
    for name, data in {"empty.txt": b"", "binary.bin.txt": b"PK\0\1" * 400, "short.txt": b"Once upon a time.", "full/mine.txt": b"keep me",
                       "broken.jsonl": b'{"instruction": "a", "response": "b"}\n{', "rows.jsonl": b'{"text": "a"}\n{"text": "b"}'}.items():
        (desk/name).parent.mkdir(exist_ok=True)
        (desk/name).write_bytes(data)
    wrong(*words.split(), cwd=desk, says=says, notes=1, real=words.split()[:4] in REAL)


def test_a_device_that_is_not_there_is_refused_before_the_text_is_read(desk):
    wrong("train", "--data", "ducks.txt", "--device", "cudda", cwd=desk, says="no device 'cudda'", real=False)     # without a note


def flip(data): return data[:len(data)//2] + bytes([data[len(data)//2] ^ 1]) + data[len(data)//2 + 1:]


@pytest.mark.parametrize("name, harm", [("model.safetensors", None), ("model.safetensors", lambda d: d[:len(d)//2]), ("model.safetensors", flip),
                                        ("tokenizer.json", None), ("tokenizer.json", lambda d: d[:len(d)//2]), ("tokenizer.json", flip), ("config.json", lambda d: d[:40])],
                         ids=lambda x: x if isinstance(x, str) else "missing" if x is None else "flipped" if x is flip else "truncated")
def test_a_damaged_model_folder(room, name, harm):
    file = room/"run"/"best"/name
    file.write_bytes(harm(file.read_bytes())) if harm else file.unlink()
    wrong("generate", "--model", "run/best", cwd=room, says=name.split(".")[0], real=name == "model.safetensors")


@pytest.mark.parametrize("sums", [True, False], ids=["with sums", "without sums"])
def test_a_foreign_tokenizer(room, sums):
    from tiny_llm.text.tokenizer import train_tokenizer
    train_tokenizer([(room/"ducks.txt").read_text()[::-1]] * 2, 280).save(room/"run"/"best")
    if not sums: (room/"run"/"best"/"SHA256SUMS").unlink()
    wrong("generate", "--model", "run", cwd=room, says="tokenizer", real=sums)


def test_ids_out_of_range(room):
    "A tokenizer that knows more tokens than the model, in a folder that says nothing about either; and in Python."
    import torch
    from tiny_llm.basics import UserError
    from tiny_llm.training.folder import load
    model, tok = load(room/"run"/"best", device="cpu")
    with pytest.raises(UserError, match="ids must lie in"): model.eval()(torch.tensor([[5000]]))
    with pytest.raises(UserError, match="not in this vocabulary"): tok.decode([5000])
    from tiny_llm.text.tokenizer import train_tokenizer
    best = room/"run"/"best"
    train_tokenizer([(room/"ducks.txt").read_text()], 305).save(best)
    (best/"SHA256SUMS").unlink()
    config = json.loads((best/"config.json").read_text())
    config.pop("tiny_llm", None)
    (best/"config.json").write_text(json.dumps(config))
    wrong("generate", "--model", "run", "--prompt", "swimming one day", cwd=room, says="tokenizer", real=False)


@pytest.fixture
def small_disk(tmp_path):
    "A disk of 300 KB with a file on it."
    d = tmp_path/"disk"
    d.mkdir()
    if not (hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("mount")): pytest.skip("mounting a small disk needs root")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(d)], capture_output=True, text=True)
    if done.returncode: pytest.skip(f"a small disk could not be mounted: {done.stderr.strip()}")
    (d/"mine.txt").write_text("keep me")
    yield d
    subprocess.run(["umount", str(d)], check=True)


def test_a_full_disk(desk, small_disk):
    p = tl("train", "--data", "ducks.txt", "--steps", 5, *SMALL, "--out", small_disk/"run", cwd=desk)
    assert p.returncode == 2 and p.stdout == "" and "Traceback" not in p.stderr, p.stderr
    assert os.strerror(errno.ENOSPC) in p.stderr.splitlines()[-1] and str(small_disk) in p.stderr.splitlines()[-1], p.stderr
    assert (small_disk/"mine.txt").read_text() == "keep me"
    assert not list(small_disk.rglob("model.safetensors"))     # no half of a model


# Signals and terminals -----------------------------------------------------------------------------------------------

def heeds_sigint():
    "For a child: Ctrl-C is heard, also where whoever started pytest ignores it."
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@unix
def test_ctrl_c_and_resume(desk, tmp_path):
    line = [TL, "train", "--data", desk/"ducks.txt", "--steps", "300", *SMALL, "--out", tmp_path/"run"]
    p = subprocess.Popen(list(map(str, line)), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, preexec_fn=heeds_sigint)
    until(lambda: (tmp_path/"run"/"metrics.jsonl").exists() and len((tmp_path/"run"/"metrics.jsonl").read_text().splitlines()) > 2 or p.poll() is not None)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=60)
    assert p.returncode == 130 and "Traceback" not in err and "--resume goes on" in err.splitlines()[-1], err
    step = json.loads((tmp_path/"run"/"summary.json").read_text())["step"]
    assert 0 < step < 300
    fine(*line[1:], "--resume", cwd=tmp_path)
    assert json.loads((tmp_path/"run"/"summary.json").read_text())["step"] == 300


@unix
def test_the_reader_goes_away(desk):
    p = subprocess.Popen([str(TL), "generate", "--model", "run", "--max_tokens", "60", "--temperature", "0"], cwd=desk, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    p.stdout.close()
    assert p.wait(60) == 141 and p.stderr.read() == b""


def until(done, seconds=60):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


class Terminal:
    "A line that runs in a terminal of its own."
    def __init__(self, *words, cwd, **env):
        import pty
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            heeds_sigint()
            os.chdir(cwd)
            os.execve(str(TL), [str(TL), *map(str, words)], environment(**{"TERM": "xterm", **env}))
        self.seen, self.read = "", 0

    def expect(self, text, seconds=60):
        "Wait until a text appears behind what was expected before; what came up to it."
        import select
        end = time.monotonic() + seconds
        while (at := self.seen.find(text, self.read)) < 0:
            assert time.monotonic() < end, f"{text!r} did not appear after: {self.seen[self.read:]!r}"
            if select.select([self.fd], [], [], 0.2)[0]:
                try: self.seen += os.read(self.fd, 4096).decode("utf-8", "replace")
                except OSError: raise AssertionError(f"ended before {text!r} appeared: {self.seen!r}") from None
        piece, self.read = self.seen[self.read:at], at + len(text)
        return piece

    def type(self, text): os.write(self.fd, text.encode())

    def code(self):
        "The exit code, once it has ended."
        end = time.monotonic() + 30
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid: return os.waitstatus_to_exitcode(status)
            try: self.seen += os.read(self.fd, 4096).decode("utf-8", "replace")
            except OSError: time.sleep(0.05)
            if time.monotonic() > end: os.kill(self.pid, signal.SIGKILL); raise AssertionError("it does not end")


@pytest.fixture(scope="module")
def talker(desk):
    "A model with a long context, which at temperature 0 talks until somebody stops it."
    fine("train", "--data", "ducks.txt", "--steps", 3, "--preset", "tiny", "--ctx", 3000, "--batch", 1, "--vocab_size", 300, "--no-compile", "--out", "long", cwd=desk)
    return desk/"long"


@unix
def test_chat_in_a_terminal(talker):
    t = Terminal("chat", "--model", talker, "--temperature", 0, "--max_tokens", 2500, cwd=talker.parent)
    t.expect("you>")
    t.type("Hello\n")
    t.expect("model>"); t.expect(" ")
    time.sleep(0.3)
    t.type("\x03")                                   # Ctrl-C stops the reply, not the chat
    t.expect("(stopped)"); t.expect("you>")
    assert "\x1b[0;34;1myou>" in t.seen and "\x1b[1;32mmodel>" in t.seen      # in colour
    t.type("/max_tokens 5\n")
    t.expect("max_tokens is 5."); t.expect("you>")
    t.type("\x1b[A\x1b[A\r")                         # two lines up: Hello
    t.expect("Hello"); t.expect("model>")
    t.expect(" tokens/s"); t.expect("you>")
    t.type("\x04")                                   # Ctrl-D leaves
    assert t.code() == 0


@unix
def test_ctrl_c_at_the_prompt(talker):
    "It clears what was begun; at an empty line the second one in a row leaves."
    t = Terminal("chat", "--model", talker, "--max_tokens", 3, cwd=talker.parent)
    for _ in range(3):
        t.expect("you>")
        t.type("/top_k 7")
        t.expect("/top_k 7")
        time.sleep(0.3)                              # Python hears it only while it waits for a key
        t.type("\x03")
    t.expect("you>")
    t.type("/top_p\n")                              # the lines before were given up: none of them was carried out
    t.expect("top_p is"); t.expect("you>")
    assert "top_k is" not in t.seen and "leaves)" not in t.seen
    for _ in range(2):
        time.sleep(0.3); t.type("\x03")
        t.expect("leaves)"); t.expect("you>")
        t.type("/top_p\n")                          # the count begins anew
        t.expect("top_p is"); t.expect("you>")
    time.sleep(0.3); t.type("\x03")
    t.expect("leaves)"); t.expect("you>")
    time.sleep(0.3); t.type("\x03")
    assert t.code() == 0 and "Traceback" not in t.seen


@unix
@pytest.mark.parametrize("tokens, presses", [(2, 1), (2500, 1), (2500, 2), (2500, 3)], ids=["short reply", "long reply", "twice", "three times"])
def test_ctrl_c_at_any_moment_does_not_leave(talker, tokens, presses):
    "Before, in and just after a reply, a millisecond later each time; pressed again at once, too."
    t = Terminal("chat", "--model", talker, "--temperature", 0, "--max_tokens", tokens, cwd=talker.parent)
    t.expect("you>")
    for n in range(12):
        t.type(f"Hello {n}\n")
        t.expect(f"Hello {n}")
        if tokens > 2: t.expect("model>")
        time.sleep(0.006 * n)
        for _ in range(presses):
            t.type("\x03")
            time.sleep(0.003 * (n % 3))
        for tries in (1, 2, 3):                      # what is typed at once may be lost with the line that Ctrl-C gives up
            time.sleep(0.2)
            t.type("/top_k\n")
            try: t.expect("top_k is", 5 if tries < 3 else 60)
            except AssertionError as e:
                if tries == 3 or "ended before" in str(e): raise
            else: break
        t.expect("you>")
    t.type("/exit\n")
    assert t.code() == 0 and "Traceback" not in t.seen


@unix
def test_ctrl_c_loses_nothing_and_ctrl_d_leaves_at_a_prompt_alone(talker):
    "What was said up to Ctrl-C stays in the conversation, and the next message goes on from it. Ctrl-D during a reply, in a begun line and at a continuation."
    t = Terminal("chat", "--model", talker, "--temperature", 0, "--max_tokens", 2500, cwd=talker.parent)
    t.expect("you>")
    t.type("Hello\n")
    t.expect("model>"); t.expect(" ")
    time.sleep(0.3)
    t.type("\x03")
    t.expect("(stopped)"); t.expect("you>")
    t.type("/save part.json\n")
    t.expect("is in "); t.expect("you>")
    said = json.loads((talker.parent/"part.json").read_text())[0]["messages"]
    assert [m["role"] for m in said] == ["user", "assistant"] and said[0]["content"] == "Hello" and len(said[1]["content"]) > 5
    t.type("/max_tokens 5\n")
    t.expect("max_tokens is 5."); t.expect("you>")
    t.type("And\n")
    t.expect(" tokens/s"); t.expect("you>")
    t.type("/save whole.json\n")
    t.expect("is in "); t.expect("you>")
    assert json.loads((talker.parent/"whole.json").read_text())[0]["messages"][:2] == said
    t.type("/top_")                                  # Ctrl-D in a begun line leaves nothing and nobody
    t.expect("/top_")
    t.type("\x04k\r")
    t.expect("top_k is off."); t.expect("you>")
    t.type("/max_tokens 300\n")
    t.expect("max_tokens is 300."); t.expect("you>")
    t.type("Hello again\n")
    t.expect("model>")
    t.type("\x04")                                   # during a reply it is no end of anything
    t.expect("300 tokens, "); t.expect("you>")
    t.type("\x04")
    assert t.code() == 0 and "Traceback" not in t.seen

    t = Terminal("chat", "--model", talker, "--max_tokens", 3, cwd=talker.parent)
    t.expect("you>")
    t.type("one \\\r")
    t.expect("...>")
    t.type("\x04")
    assert t.code() == 0 and "model>" not in t.seen and "Traceback" not in t.seen


@unix
def test_no_colour_where_none_is_wanted(desk):
    t = Terminal("chat", "--model", "run", "--max_tokens", 3, cwd=desk, NO_COLOR="1")
    t.expect("you>")
    t.type("/exit\n")
    assert t.code() == 0 and not re.findall("\x1b\\[(?!0?m)[0-9;]*m", t.seen)
