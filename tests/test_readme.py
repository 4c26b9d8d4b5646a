"""Every command in README is tried, in order, in one folder. A line that this file does not know fails.

Shell lines are those of fences marked sh. Those of `tiny_llm` are run whole, with smaller budgets. Three are only touched, since whoever runs this file has done them: `pip install` is a
dry run without a network, `pytest` a few of its tests, `jupyter lab` tells its version; `.ci/run` installs and tests in full. Python blocks are run as they stand, but for the numbers in SMALLER.
"""
import gzip, json, re, shlex, shutil, subprocess, sys, threading
from pathlib import Path

import pytest

import course
from house import NBS, ROOT, environment, number, numbered, page, read, run, source
from test_cli import same_process, wrong

README = (ROOT/"README.md").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent
TINY = "--preset tiny --device cpu"
SMALL = f"{TINY} --batch 4 --no-compile --dtype float32".split()
TRAIN = [*SMALL, "--ctx", "64", "--vocab_size", "300", "--limit", "60"]
SMALLER = {"20_000": "300", "minutes=2": "minutes=0.05"}   # in Python blocks


def fences(*kinds): return [m[2] for m in re.finditer(r"^```(\w+)\n(.*?)^```", README, re.M | re.S) if m[1] in kinds]


def commands():
    "Each command of README once, as a list of words: `A && B` is two commands, what follows # is a comment."
    found = []
    for line in "".join(fences("sh")).splitlines():
        words = shlex.split(line, comments=True)
        while words:
            n = words.index("&&") if "&&" in words else len(words)
            if words[:n] not in found: found.append(words[:n])
            words = words[n+1:]
    return found


def smaller(words):
    "A command of README with a budget for tests, or None if it is not known here. A later option overrides an earlier one."
    if words[:4] == ["pip", "install", "-e", words[-1]] and words[-1] in (".", ".[dev]", ".[hf]"):
        return [sys.executable, "-m", *words[:2], "--dry-run", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", *words[2:]]
    if words == ["pytest"]: return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_house.py", "-k", "light or settings or resolve"]
    if words == ["jupyter", "lab", "nbs"] and (ROOT/"nbs").is_dir(): return [sys.executable, "-m", "jupyter", "lab", "--version"]
    if words[0] != "tiny_llm" or len(words) < 2: return None
    more = {"serve": ["--port", "0", "--device", "cpu"], "quickstart": ["--minutes", "0.1", *TINY.split()], "chat": ["--max_tokens", "5", "--device", "cpu"], "plot": [], "info": [], "data": [], "pipeline": ["--device", "cpu"], "plan": ["--ctx", "64", "--batch", "2", "--device", "cpu"],
            "generate": ["--max_tokens", "5", "--device", "cpu"], "eval": ["--device", "cpu"], "finetune": [*SMALL[2:], "--steps", "3"],
            "align": [*SMALL[2:], "--steps", "2", *([] if "dpo" in words else ["--max_tokens", "8", "--group", "2"])], "export": [],
            "tune": [*TRAIN, "--trials", "1", "--trial_steps", "5"],
            "train": [*TRAIN, *(["--minutes", "0.03"] if "--minutes" in words else ["--steps", "10"])]}.get(words[1])
    return None if more is None else [BIN/"tiny_llm", *words[1:], *more]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    "A folder with one file of each kind that README names."
    import pyarrow, pyarrow.parquet
    from datasets import Dataset
    d = tmp_path_factory.mktemp("desk")
    texts = [f"{n} little ducks went swimming one day, over the hills and far away. ROMEO: where did the {n % 7} ducks go?" for n in range(200)]
    (d/"my.txt").write_text("\n<|endoftext|>\n".join(texts))
    (d/"stages.yaml").write_text("preset: tiny\nvocab_size: 300\nctx: 64\nbatch: 2\nstages:\n"
                                 "- {name: text, kind: train, data: my.txt, steps: 4}\n- {name: talk, kind: finetune, data: chats.jsonl, steps: 2}\n")
    (d/"my.txt.gz").write_bytes(gzip.compress("\n<|endoftext|>\n".join(texts).encode()))
    (d/"texts").mkdir()
    for i in range(20): (d/"texts"/f"{i}.txt").write_text(" ".join(texts[10*i:10*i+10]))
    (d/"rows.jsonl").write_text("\n".join(json.dumps(dict(id=str(i), body=t)) for i, t in enumerate(texts)))
    (d/"rows.json").write_text(json.dumps([dict(text=t) for t in texts]))
    (d/"rows.csv").write_text("n,text\n" + "\n".join(f'{i},"{t}"' for i, t in enumerate(texts)))
    pyarrow.parquet.write_table(pyarrow.table(dict(text=texts)), d/"rows.parquet")
    Dataset.from_dict(dict(text=texts)).save_to_disk(d/"saved")
    (d/"data").mkdir()
    shutil.copy(d/"my.txt", d/"data"/"tinystories.txt")
    (d/"chats.jsonl").write_text("".join(fences("json")) * 10)
    (d/"pairs.jsonl").write_text("".join(json.dumps(dict(prompt=f"Hello {n}", chosen="Good day.", rejected="Go away.")) + "\n" for n in range(20)))
    return d


@pytest.fixture(scope="module")
def clone(tree, tmp_path_factory):
    "A copy of the project to install and test."
    return shutil.copytree(tree, tmp_path_factory.mktemp("clone")/"tiny_llm", symlinks=True)


def test_every_fence_is_of_a_known_kind():
    kinds = re.findall(r"^```(\w*)$", README, re.M)[::2]
    assert set(kinds) <= {"sh", "python", "json"}, f"{set(kinds)}: teach tests/test_readme.py to run them"
    assert len(fences("sh", "python", "json")) == len(kinds)


def test_an_unknown_line_is_seen():
    for line in ("tiny_llm trian --data x", "pip install tiny_llm", "jupyter lab notebooks", "make", "tiny_llm"): assert smaller(shlex.split(line)) is None


def test_every_command_and_every_kind_of_data_is_shown():
    from tiny_llm.deployment.cli import commands as known
    said = commands()
    assert {w[1] for w in said if w[0] == "tiny_llm"} == set(known)
    data = {w[w.index("--data")+1] for w in said if "--data" in w}
    assert {"stories", "python", "texts", "saved"} <= data and {".txt", ".gz", ".jsonl", ".json", ".csv", ".parquet"} <= {Path(x).suffix for x in data}
    assert any("/" in x for x in data)


def serve(line, desk, env):
    "Until it says where it is; then it is stopped as a person or a system would."
    p = subprocess.Popen([str(w) for w in line], cwd=desk, env={**env, "PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    late = threading.Timer(120, p.kill)
    late.start()
    said = []
    for text in p.stdout:
        said.append(text)
        if "http://" in text: p.terminate()
    late.cancel()
    assert p.wait() == 0 and "http://" in "".join(said), "".join(said)[-4000:]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_command(words, desk, clone):
    line = smaller(words)
    assert line, f"README says `{' '.join(words)}`, and no test runs it: add its form to tests/test_readme.py"
    if "--resume" in words: (desk/words[words.index("--out")+1]/"summary.json").unlink(missing_ok=True)   # as if it had been interrupted
    env = environment(TINY_LLM_DATA=str(desk/"data"))
    if words[:2] == ["tiny_llm", "serve"]: return serve(line, desk, env)
    if words[:3] == ["tiny_llm", "train", "--data"] and words[3] != "my.txt":      # the many kinds of text: the command has had its process by then
        with pytest.MonkeyPatch.context() as m:
            m.setenv("TINY_LLM_DATA", env["TINY_LLM_DATA"])
            code, out, err = same_process(line[1:], desk)
    else:
        p = subprocess.run([str(w) for w in line], cwd=desk if words[0] == "tiny_llm" else clone, input="Hello!\n/exit\n", capture_output=True, text=True, encoding="utf-8", timeout=300, env=env)
        code, out, err = p.returncode, p.stdout, p.stderr
    assert code == 0, out[-4000:] + err[-4000:]
    if words == ["tiny_llm", "quickstart"]: (desk/"quickstart.txt").write_text(out, encoding="utf-8")
    if words[0] == "tiny_llm" and "--out" in words:
        made = {"tune": "best.yaml", "pipeline": "model/model.safetensors", "export": "."}.get(words[1], "best/model.safetensors")
        assert (desk/words[words.index("--out")+1]/made).is_file()


def test_quickstart_ends_by_itself(desk):
    "What it said and left, in the folder where it ran above."
    if not (desk/"quickstart.txt").is_file(): pytest.skip("needs the quickstart of test_command")
    made, said = desk/"runs"/"quickstart", (desk/"quickstart.txt").read_text(encoding="utf-8")
    for row in ("parameters", "tokens seen", "training", "validation loss", "floor", "gap", "bits per byte", "stories that parse", "faults of the rest",
                "requests fulfilled", "generation", "wall time", "the model is in", "tiny_llm chat"): assert row in said, row
    numbers = json.loads((made/"summary.json").read_text())
    assert numbers["stories"]["n"] == numbers["chat"]["n"] == 200
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {p.name for p in (made/"model").iterdir()}
    wrong("quickstart", cwd=desk, real=False, says="already holds a quickstart; go on with it (--resume), or choose another folder (--out)")
    wrong("quickstart", "--resume", cwd=desk, says="is finished", real=False)


@pytest.mark.parametrize("code", fences("python"), ids=lambda c: c.splitlines()[0][:30])
def test_python_block(code, desk):
    "README's examples, in the folder where its commands ran before."
    if "runs/quickstart" in code and not (desk/"runs"/"quickstart"/"model").is_dir(): pytest.skip("needs the quickstart of test_command")
    for long, short in SMALLER.items(): code = code.replace(long, short)
    said = run([sys.executable, "-c", code], desk, 200)
    assert "Once upon a time" in said or "Hello!" in said


def rows(heading):
    "The cells of the first table below a heading, without its head."
    text = README[README.index(f"\n### {heading}"):]
    table = re.search(r"(?:^\|.*\n)+", text, re.M)[0].splitlines()
    return [[c.strip() for c in line.strip("|").split(" | ")] for line in table[2:]]


def test_tables_list_every_notebook():
    "One table for what stands at the top, one for each of the five parts; deep dives bear a star."
    found = re.findall(r"^\| \[(\d[\d.]*\w?) .*?\]\((nbs/[\w/]+\.ipynb)\)( ☆)? \|", README, re.M)
    assert [ROOT/path for _, path, _ in found] == numbered()
    assert all(n == number(ROOT/path) for n, path, _ in found)
    assert [bool(star) for _, _, star in found] == [n.deep for n in course.course()]
    for folder, name in course.PARTS.items():
        assert [c[0].split("](nbs/")[1].split(")")[0] for c in rows(f"{folder[0]} {name}")] == [page(p) for p in numbered() if p.parent.name == folder]


def test_tables_are_those_of_the_notebooks():
    "What index.ipynb stored is what the openings of the notebooks say now."
    from make_readme import relink
    for part in ("", *course.PARTS): assert relink(course.table(part)) in README, f"run nbs/index.ipynb again: {part or 'the top'} has changed"
    assert relink(course.routes()) in README


def test_a_row():
    "Prerequisites, times and routes come from the opening; nothing is printed where nothing is public."
    n = course.Notebook("3_training/05_train.ipynb", "3.05", "training.train", "Training", "The loop.", [("1.06", "1_transformer/06_model.ipynb")], 25, "20 s", True, 3000)
    assert course.row(n).startswith("| [3.05 Training](3_training/05_train.ipynb) ☆ | The loop. | [1.06](1_transformer/06_model.ipynb) | 25 min, 20 s | B | `")
    n.module, n.minutes, n.seconds, n.before = "training.none", None, "", []
    assert course.row(n).endswith(" | The loop. |  |  |  |  |") and n.reading == 20
    assert "the command `tiny_llm`" not in README


def test_what_an_opening_says(tmp_path, monkeypatch):
    monkeypatch.setattr(course, "NBS", tmp_path)
    path = tmp_path/"1_transformer"/"03_flash.ipynb"
    path.parent.mkdir()
    cells = ["# Tiles\n\n> A blurb.", "**Before this:** [1.02 attention](02_attention.ipynb), [2.04 tokenizer](../2_text/04_tokenizer.ipynb). **Time:** 25 minutes\nto read, 20 s to run.\n\n"
             "A deep dive: what follows does not need it."]
    path.write_text(json.dumps(dict(cells=[dict(cell_type="markdown", source=s) for s in cells])))
    n = course.notebook(path)
    assert (n.number, n.module, n.title, n.blurb, n.minutes, n.seconds, n.deep) == ("1.03", "transformer.flash", "Tiles", "A blurb.", 25, "20 s", True)
    assert n.before == [("1.02", "1_transformer/02_attention.ipynb"), ("2.04", "2_text/04_tokenizer.ipynb")]


def test_prerequisites_come_first():
    "A notebook asks for notebooks with lower numbers; a route goes upward and has no deep dive."
    all_of = course.course()
    order = {n.path: i for i, n in enumerate(all_of)}
    same_part = [(n.path, p) for n in all_of for _, p in n.before if p.split("/")[0] == n.path.split("/")[0]]
    assert all(p in order for n in all_of for _, p in n.before) and all(order[p] < order[n] for n, p in same_part)
    for _, _, names in course.ROUTES[:-1]:
        chosen = [n for n in all_of if n.module in names.split()]
        assert len(chosen) > 5 and not [n.path for n in chosen if n.deep]


def test_routes_bear_hours():
    said = README[README.index("| route |"):]
    for aim in ("understand a transformer", "train on my own text", "build everything"): assert re.search(rf"\*{aim}\* \|.*\| \d+ \| [\d.]+ h", said), aim


def test_quickstart_by_machine():
    "What was measured bears the figures of the stored run; what was not says so."
    machines = dict(rows("The quickstart on your machine"))
    assert list(machines) == ["two CPU cores", "a laptop with many cores", "a Mac with an Apple chip", "an NVIDIA GPU"]
    card = next("".join(o["data"]["text/markdown"]) for c in read(NBS/"index.ipynb")["cells"] if "card[" in source(c) for o in c.get("outputs", []) if "text/markdown" in o["data"])
    two, *others = machines.values()
    figures = re.findall(r"\d+ min \d+ s|\d[\d.]*%?", two)
    assert two.startswith("Measured") and len(figures) >= 4 and all(f in card for f in figures)
    assert all(text.startswith("Not measured.") and not re.search(r"\d", text) for text in others)


def test_words():
    "Nothing that has to be read twice, no word that only insiders know."
    for bad in ("part documents", "the road", "ancestor", "first walk", "the house", "a road"): assert bad not in README, bad


def test_first_screen():
    head = README[:README.index("## The course")]
    for part in ("tiny_llm quickstart", "pytest", "![", "**You:**"): assert part in head, part
