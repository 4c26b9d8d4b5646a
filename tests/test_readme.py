"""Every command in README is tried, in order, in one folder. A line that this file does not know fails.

Shell lines are those of fences marked sh. Those of `tiny_llm` are run whole, with smaller budgets. Three are only touched, since whoever runs this file has done them: `pip install` is a
dry run without a network, `pytest` a few of its tests, `jupyter lab` tells its version; `.ci/run` installs and tests in full. Python blocks are run as they stand, but for the numbers in SMALLER.
"""
import gzip, json, re, shlex, shutil, subprocess, sys
from pathlib import Path

import pytest

from house import ROOT, environment, number, numbered, run

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
    more = {"quickstart": ["--minutes", "0.1", *TINY.split()], "chat": ["--max_tokens", "5", "--device", "cpu"], "plot": [], "info": [], "data": [],
            "generate": ["--max_tokens", "5", "--device", "cpu"], "eval": ["--device", "cpu"], "finetune": [*SMALL[2:], "--steps", "3"],
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


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_command(words, desk, clone):
    line = smaller(words)
    assert line, f"README says `{' '.join(words)}`, and no test runs it: add its form to tests/test_readme.py"
    if "--resume" in words: (desk/words[words.index("--out")+1]/"summary.json").unlink(missing_ok=True)   # as if it had been interrupted
    p = subprocess.run([str(w) for w in line], cwd=desk if words[0] == "tiny_llm" else clone, input="Hello!\n/exit\n", capture_output=True, text=True, encoding="utf-8", timeout=300,
                       env=environment(TINY_LLM_DATA=str(desk/"data")))
    assert p.returncode == 0, p.stdout[-4000:] + p.stderr[-4000:]
    if words[0] == "tiny_llm" and "--out" in words: assert (desk/words[words.index("--out")+1]/"best"/"model.safetensors").is_file()


@pytest.mark.parametrize("code", fences("python"), ids=lambda c: c.splitlines()[0][:30])
def test_python_block(code, desk):
    "README's examples, in the folder where its commands ran before."
    if "runs/quickstart" in code and not (desk/"runs"/"quickstart"/"model").is_dir(): pytest.skip("needs the quickstart of test_command")
    for long, short in SMALLER.items(): code = code.replace(long, short)
    said = run([sys.executable, "-c", code], desk, 200)
    assert "Once upon a time" in said or "Hello!" in said


def test_table_lists_every_notebook():
    rows = re.findall(r"^\| \[(\d[\d.]*\w?) .*?\]\((nbs/[\w/]+\.ipynb)\) \|", README, re.M)
    assert [ROOT/path for _, path in rows] == numbered()
    assert all(n == number(ROOT/path) for n, path in rows)


def test_first_screen():
    head = README[:README.index("## The course")]
    for part in ("tiny_llm quickstart", "pytest", "![", "**You:**"): assert part in head, part
