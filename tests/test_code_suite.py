"""The suite of code, HumanEval and MBPP: what is right and what is not, scores, the exact test, pass@k, and the command.

HumanEval's and MBPP's own problems are looked for in the folder code_eval/ beside the folder text/ that `TINY_LLM_DATA` names; skipped without them."""
import gzip, itertools, json, math, os, random
from fractions import Fraction
from pathlib import Path

import pytest, torch

from tiny_llm.basics import UserError
from tiny_llm.deployment.cli import try_line
from tiny_llm.training import code_suite as suite
from tiny_llm.training.code import close_wardens
from tiny_llm.training.code_suite import (QUOTES, SUITE, Item, code_benchmark, code_problems, code_suite as measure, compare_suites, cut, judge_items, judge_problems,
                                          mcnemar, own_block, parse_suite, pass_at_k, suite_items, suite_scores, text_overlap)
from tiny_llm.training.folder import save
from tiny_llm.text.tokenizer import train_tokenizer
from tiny_llm.transformer.model import Transformer, preset

pytestmark = pytest.mark.skipif(os.name == "nt", reason="there is no runner on Windows")
HOME = Path(os.environ.get("TINY_LLM_DATA") or os.devnull).parent/"code_eval"
real = pytest.mark.skipif(not HOME.is_dir(), reason="needs the folder code_eval/ beside TINY_LLM_DATA")
HUMAN = dict(task_id="ours/0", prompt='def half(x):\n    """Half of x, rounded down."""\n', entry_point="half", canonical_solution="    return x // 2\n",
             test="def check(f):\n    assert f(5) == 2 and f(-1) == -1\n")
MBPP = dict(task_id=7, text="Add up a list.", code="def sum(xs):\r\n    t = 0\r\n    for x in xs: t += x\r\n    return t", test_list=["assert sum([1, 2]) == 3"],
            test_setup_code="", challenge_test_list=["assert sum([]) == 0"])


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left():
    yield
    close_wardens()


# The suite

@pytest.mark.parametrize("seed", range(3))
def test_every_item_can_be_right_and_nothing_is_wrong(seed):
    items = suite_items(60, seed)
    assert judge_items(items, [i.solution for i in items]) == [1] * 300 and judge_items(items, [""] * 300) == [0] * 300
    assert judge_items(items, ["\n"] * 300) == [0] * 300 and judge_items(items, [")]}" * 9] * 300).count(1) <= 9


def test_items_are_the_seeds_and_are_many():
    assert suite_items(20, 1) == suite_items(20, 1) and suite_items(20, 1)[:5] == suite_items(5, 1)[:5]
    for k in range(5):
        a, b = ({i.prompt for i in suite_items(200, seed)[200 * k:200 * k + 200]} for seed in (0, 1))
        assert len(a) > 60 and a != b, SUITE


@pytest.mark.parametrize("text, kept", [("    return x\nprint(1)\n", "    return x\n"), ("    a\n\n    b\n", "    a\n\n    b\n"), ("    a\n    b", "    a\n"), ("a", ""), ("", ""),
                                        ("    a\n# c\n", "    a\n"), ("    a\n\nclass B:", "    a\n\n")])
def test_own_block(text, kept): assert own_block(text) == kept


def test_of_a_thousand_items_no_two_are_alike_and_no_wrong_function_passes():
    items = suite_items(1000, 5)
    for kind in SUITE: assert len({i.prompt for i in items if i.kind == kind}) == 1000, kind
    near = {"larger": ["max(x, {a} + 1)", "max(x, {a} - 1)", "x", "{a}"], "multiple": ["x % ({a} + 1) == 0", "x % {a} != 0", "x % 2 == 0 and {a} > 2"],
            "above": ["[v for v in x if v >= {a}]", "[v for v in x if v > {a} + 1]", "x"], "rest": ["x % ({a} + 1)", "x", "x // {a}"], "first": ["x[:{a} + 1]", "x[:1 - {a}]", "x"],
            "largest": ["sorted(x)[-{a} - 1:]", "sorted(x)[:{a}]", "x"], "add": ["x - {a}", "x + {a} + 1"], "scale": ["x * ({a} + 1)", "x + {a}"], "backwards": ["x", "x.upper()"],
            "loud": ["x", "x.title()"], "letters": ["len(x)", "x.count('b')"], "sums": ["max(x)", "len(x)"], "squares": ["[v + v for v in x]", "x"], "shift": ["x * {a}", "x"]}
    seen = set()
    for item in items[4000:]:
        name = item.prompt.split("(")[0].removeprefix("def ")
        values = [v for _, v in item.wanted]
        shown = [line.strip() for line in item.prompt.splitlines()[4:8:2]]
        assert len(values) == 6 and not all(v == values[0] for v in values) and shown[0] != shown[1], "a constant passes"
        a = next(iter(s for s in item.prompt.split(QUOTES)[1].replace(",", " ").replace(".", " ").split() if s.isdigit()), "")
        for wrong in near[name]:
            wrong = wrong.format(a=a)
            assert [eval(wrong, {"x": eval(call.partition("(")[2][:-1])}) for call, _ in item.wanted] != values, (item.prompt, wrong)
        seen.add(name)
    assert seen == near.keys()
    some = items[4000:4060]
    assert judge_items(some, [f"    return {i.wanted[0][1]!r}\n" for i in some]) == [0] * 60, "the first hidden value for every argument"


def test_more_items_than_there_are():
    assert len({i.prompt for i in suite._different("keywords", 1800, 0)}) == 1800
    with pytest.raises(UserError, match="different items of the kind keywords were not found; use a smaller n"): suite._different("keywords", 2000, 0)


SYNTAX = Item("syntax", "def f(xs):\n    for x in xs:\n        if x > 3:\n", "            return xs\n")
BRACKETS = Item("brackets", "total = [1, {2, (3", ")}]\n")
DOC = Item("docstrings", 'def find_area(level, rows):\n    """', 'Find the area of the rows."""\n', ("area",))
KEY = Item("keywords", "for x ", "in ", ("in",))
INSIDE = Item("keywords", "def f(x):\n    retu", "rn ", ("rn",))


@pytest.mark.parametrize("item, text, right", [
    (SYNTAX, "            return xs\n", 1), (SYNTAX, "            pass\n    return 3\n\nx = (\n", 1), (SYNTAX, "        return xs\n", 0), (SYNTAX, "            return (\n", 0),
    (SYNTAX, "            return x", 0), (SYNTAX, "return xs\n", 0), (SYNTAX, "            # nothing\n", 0), (SYNTAX, "            return xs\n            y = = 2\n", 0),
    (BRACKETS, ")}]", 1), (BRACKETS, ", 4), 5}, 6] # and more (", 1), (BRACKETS, "]})", 0), (BRACKETS, ")}", 0), (BRACKETS, ")}\n]", 0), (BRACKETS, ")}]}]", 1), (BRACKETS, "'", 0),
    (DOC, 'The area of it."""', 1), (DOC, 'The areas of\n    all rows."""\n    return 1', 1), (DOC, "The area of it.", 0), (DOC, 'All is well here."""', 0),
    (DOC, 'Area."""', 0), (DOC, "area of it " * 21 + '"""', 0), (DOC, 'The area of \\"""', 0),
    (KEY, "in xs", 1), (KEY, "  in", 1), (KEY, "into", 0), (KEY, "= 3", 0), (KEY, "", 0), (INSIDE, "rn x", 1), (INSIDE, "rn", 1), (INSIDE, " rn", 0), (INSIDE, "rns", 0)])
def test_right_and_wrong(item, text, right): assert judge_items([item], [text]) == [right]


def test_functions_are_run_on_cases_that_the_prompt_does_not_show():
    for item in suite_items(100)[400:]:
        assert len({call for call, _ in item.wanted}) == 6 and not any(call in item.prompt for call, _ in item.wanted)
    item = next(i for i in suite_items(100)[400:] if "x plus" in i.prompt)
    shown = [line.split("(")[1].rstrip(")") for line in item.prompt.splitlines() if ">>>" in line]
    values = item.prompt.splitlines()[4:8:2]
    learnt = f"    return {{{shown[0]}: {values[0].strip()}, {shown[1]}: {values[1].strip()}}}.get(x, 10 ** 6)\n"
    assert judge_items([item], [learnt]) == [0], "the examples by heart are no function"
    assert judge_items([item], [item.solution + "\nbroken = (\n"]) == [1], "what follows the function is not its own"
    assert judge_items([item], ["    while True: pass\n"], wall=1, cpu=1) == [0]


def test_scores_and_intervals():
    kinds = ["a"] * 10 + ["b"] * 10
    found = suite_scores(kinds, [1] * 10 + [0] * 10)
    assert found["score"] == 0.5 and found["kinds"]["a"]["score"] == 1 and found["kinds"]["b"]["n"] == 10
    low, high = suite_scores(kinds, [0] * 20)["interval"]
    assert low == 0 < high < 0.3, "nothing right of 20 is no proof of nothing"
    low, high = suite_scores(kinds, [1] * 20)["interval"]
    assert 0.7 < low < high == 1
    wide, narrow = (suite_scores(["a"] * n + ["b"] * n, [1, 0] * n)["interval"] for n in (20, 2000))
    assert wide[1] - wide[0] > 5 * (narrow[1] - narrow[0])


@pytest.mark.parametrize("b, c, p", [(0, 0, 1), (1, 0, 1), (5, 0, 2 / 32), (6, 0, 2 / 64), (9, 1, 2 * 11 / 1024), (5, 5, 1), (3, 2, 1)])
def test_mcnemar_by_hand(b, c, p):
    left, right = [1] * b + [0] * c + [1, 0], [0] * b + [1] * c + [1, 0]
    found = mcnemar(left, right)
    assert math.isclose(found["p"], p) and (found["only_a"], found["only_b"]) == (b, c) and found["difference"] == (b - c) / len(left)
    assert mcnemar(right, left)["p"] == found["p"]


def test_comparing_needs_the_same_items():
    def empty(prompts): return [""] * len(prompts)
    one, other = measure(empty, n=2), measure(empty, n=2, seed=1)
    assert compare_suites(one, one)["all"] == dict(only_a=0, only_b=0, difference=0, p=1)
    with pytest.raises(UserError, match="the same n and seed"): compare_suites(one, other)
    with pytest.raises(UserError, match="needs the same for both"): mcnemar([1], [1, 0])
    with pytest.raises(UserError, match="each prompt needs one"): measure(lambda prompts: [""], n=2)
    with pytest.raises(UserError, match="give 1 or more"): measure(empty, n=0)


# pass@k, HumanEval and MBPP

@pytest.mark.parametrize("n", range(1, 11))
def test_pass_at_k_is_brute_force_and_right_on_average(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        sets = list(itertools.combinations([1] * c + [0] * (n - c), k))
        assert math.isclose(pass_at_k(n, c, k), sum(map(any, sets)) / len(sets), abs_tol=1e-12)
    for k, q in itertools.product(range(1, n + 1), (0.1, 0.5, 0.9)):
        mean = sum(math.comb(n, c) * q ** c * (1 - q) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
        assert math.isclose(mean, 1 - (1 - q) ** k, rel_tol=1e-9)


def test_pass_at_k_of_many_samples():
    assert pass_at_k(10 ** 4, 3, 100) == pytest.approx(1 - math.prod(1 - 100 / i for i in range(10 ** 4 - 2, 10 ** 4 + 1)))
    for bad in ((5, 6, 1), (5, -1, 1), (5, 1, 6), (5, 1, 0)):
        with pytest.raises(UserError, match="c is 0 to n"): pass_at_k(*bad)


@pytest.fixture
def files(tmp_path):
    "A file in the form of each benchmark."
    human, mbpp = tmp_path/"human.jsonl.gz", tmp_path/"mbpp.jsonl"
    with gzip.open(human, "wt") as f: f.write(json.dumps(HUMAN) + "\n")
    mbpp.write_text(json.dumps(MBPP) + "\n")
    return human, mbpp


def test_problems_from_files(files):
    problems = [p for file in files for p in code_problems(file)]
    assert [p.name for p in problems] == ["ours/0", "MBPP/7"] and "\r" not in problems[1].reference
    assert [o.kind for o in judge_problems(problems, [p.reference for p in problems])] == ["ok", "ok"]
    assert not any(o.ok for o in judge_problems(problems, ["", ""]))
    assert [o.kind for o in judge_problems(problems, ["    return x // 2\n\nprint(half(\n", problems[1].reference + "\n[DONE] more ("])] == ["ok", "ok"]
    challenged = "def sum(xs): return 3 if xs else None"
    assert judge_problems(problems[1:], [challenged])[0].kind == "wrong", "the second list of tests counts too"


def test_problems_that_are_none(tmp_path):
    for name, rows, says in (("other", [dict(text="x")], "neither HumanEval's"), ("torn", [{k: v for k, v in HUMAN.items() if k != "test"}], "not whole")):
        file = tmp_path/f"{name}.jsonl"
        file.write_text("".join(json.dumps(r) + "\n" for r in rows))
        with pytest.raises(UserError, match=says): code_problems(file)
    with pytest.raises(UserError): code_problems(tmp_path/"missing.jsonl")


def test_a_benchmark_counts_samples(files):
    problems = code_problems(files[0])
    found = code_benchmark(lambda prompts: ["    return x // 2\n", "    return 1\n", "    return x // 2\n", "    while True: pass\n"], problems, n=4, ks=(1, 2), wall=2, cpu=1)
    assert found["pass"][1]["score"] == 0.5 and found["pass"][2]["score"] == pass_at_k(4, 2, 2) and found["kinds"] == dict(ok=2, wrong=1, timeout=1)
    with pytest.raises(UserError, match="needs 5 samples"): code_benchmark(lambda prompts: [""], problems, ks=(5,))
    with pytest.raises(UserError, match="each needs one"): code_benchmark(lambda prompts: [], problems)


def test_cut(): assert cut("    a\n\ndef g", suite.HUMANEVAL_STOPS) == "    a\n" and cut("abc", ("x",)) == "abc" and cut("", ("x",)) == ""


@real
@pytest.mark.slow
@pytest.mark.parametrize("file, n", [("HumanEval.jsonl.gz", 164), ("mbpp.jsonl", 974)])
def test_references_are_right_and_nothing_is_not(file, n):
    problems = code_problems(HOME/file)
    assert len(problems) == n
    bad = [(p.name, o.message) for p, o in zip(problems, judge_problems(problems, [p.reference for p in problems], wall=60, cpu=30)) if not o.ok]
    assert not bad
    assert not any(o.ok for o in judge_problems(problems, [""] * n))


@real
def test_some_references_are_right():
    for file in ("HumanEval.jsonl.gz", "mbpp.jsonl"):
        problems = code_problems(HOME/file)[::25]
        assert all(o.ok for o in judge_problems(problems, [p.reference for p in problems], wall=60, cpu=30))


# Overlap, and the command

def test_overlap_prefers_the_wrong_program():
    text = "def f(xs):\n    best = xs[0]\n    for x in xs:\n        if x > best: best = x\n    return best\n"
    near, far = (text_overlap([t], [text]) for t in (text.replace(">", "<"), "def f(values): return max(values)\n"))
    assert text_overlap([text], [text]) == pytest.approx(dict(bleu=100, rouge_l=100)) and near["bleu"] > far["bleu"] and near["rouge_l"] > far["rouge_l"]
    with pytest.raises(UserError, match="give one each"): text_overlap([], [])


def test_overlap_without_its_packages(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(UserError, match=r"pip install 'tiny_llm\[eval\]'"): text_overlap(["a"], ["a"])


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    tok = train_tokenizer(["def f(x): return x\n", "for x in range(10): print(x)\n"] * 20, vocab_size=300)
    for seed in (0, 1):
        torch.manual_seed(seed)
        save(Transformer(preset("tiny", vocab_size=len(tok), ctx=64)), tok, folder/f"model{seed}")
    return folder


def test_the_command(room):
    line = f"eval --model {room/'model0'} --baseline {room/'model1'} --suite code --limit 3 --device cpu --out {room/'figures.json'}"
    status, out, _ = try_line(line, show=False)
    found = json.loads((room/"figures.json").read_text())
    assert status == 0 and found["suite"] == "code" and list(found["model"]["kinds"]) == list(SUITE) and found["difference"]["all"]["p"] == 1
    assert (room/"figures.png").read_bytes()[:4] == b"\x89PNG" and "not confined" in out and "all, minus the baseline" in out
    assert all(len(f["items"]) == 3 for who in ("model", "baseline") for f in found[who]["kinds"].values())


def test_the_command_on_problems(room, files):
    status, out, _ = try_line(f"eval --model {room/'model0'} --baseline {room/'model1'} --suite mbpp:{files[1]} --device cpu", show=False)
    assert status == 0 and "mbpp, pass@1" in out and "1 problems" in out and "p = 1.0000" in out


@pytest.mark.parametrize("wrong, says", [("kode", "Did you mean 'code'"), ("code:file", "makes its items itself"), ("humaneval:missing.jsonl", "missing.jsonl")])
def test_the_command_asked_wrongly(room, wrong, says):
    status, _, err = try_line(f"eval --model {room/'model0'} --suite {wrong} --device cpu --out {room/'none.json'}", show=False)
    assert status == 2 and says in err and not (room/"none.json").exists()
    with pytest.raises(UserError): parse_suite("") if wrong == "kode" else parse_suite("kode")
