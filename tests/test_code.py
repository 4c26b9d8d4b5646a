"""Programs that nobody trusts, in the confined runner: the attacks of attacks.py, what is judged and how, and what is left behind."""
import os, random, signal, subprocess, sys, time
from pathlib import Path

import pytest

from attacks import ATTACKS
from tiny_llm.basics import UserError
from tiny_llm.training import code
from tiny_llm.training.code import Program, close_wardens, confinement, run_program, run_programs

pytestmark = pytest.mark.skipif(os.name == "nt", reason="there is no runner on Windows")
SECRET = random.SystemRandom().randrange(10 ** 17, 10 ** 18)
def small(kinds): return dict(wall=1.2 if kinds == "timeout" else 20, cpu=1)      # a busy machine is no attack
DOUBLE = "def double(x):\n    return 2 * x\n"


def means_here():
    "The means that work on this machine."
    found = []
    for name in code.MEANS:
        try: w = code.Warden(name)
        except OSError: continue
        w.close()
        found.append(name)
    return found


HERE = means_here()
BEST = sorted(HERE, key=(("namespaces", "bubblewrap", "limits") if os.geteuid() == 0 else code.MEANS).index)[0]
each_means = pytest.mark.parametrize("means", HERE)


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left():
    yield
    close_wardens()


@pytest.fixture
def outside(tmp_path):
    "A file that no program may reach."
    file = tmp_path/"outside.txt"
    file.write_text("outside")
    return file


def attack_of(text, file):
    "The program of an attack: it is not told what it should answer."
    return Program(text.format(file=file, folder=file.parent, pid=os.getpid()), [("answer()", SECRET)])


def processes():
    "What runs below this process, and for whom."
    me = [str(os.getpid())]
    for pid in me:
        try: me += Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except OSError: pass
    return len(me)


def test_there_are_a_hundred_attacks():
    names = [name for name, *_ in ATTACKS]
    assert len(names) == len(set(names)) >= 100
    assert {wall for _, wall, *_ in ATTACKS} <= {*code.PROBES, "always"}
    assert {k for _, _, kinds, _ in ATTACKS for k in kinds.split()} <= {*code.KINDS} - {"ok"}


@pytest.mark.parametrize("name, wall, kinds, text", ATTACKS, ids=[name for name, *_ in ATTACKS])
def test_attack(name, wall, kinds, text, outside):
    "By the best means of this machine: contained, reported as its kind; what is outside is as it was, and the next program runs."
    if wall in confinement(BEST)["lacks"]: pytest.skip(f"not contained here: {confinement(BEST)['notice']}")
    found = run_programs([attack_of(text, outside)], workers=1, means=BEST, **small(kinds))[0]
    assert found.kind in kinds.split() and found.passed == 0, found
    assert [p.name for p in outside.parent.iterdir()] == ["outside.txt"] and outside.read_text() == "outside"
    assert "outside" not in found.stdout and not Path("/tmp/tiny_llm_attack").exists()
    assert len(found.stdout) + len(found.stderr) <= 2 * code.LIMITS["output"] and found.seconds < 30
    assert run_program(DOUBLE, [("double(4)", 8)], means=BEST).ok


@pytest.mark.slow
@pytest.mark.parametrize("means", [m for m in HERE if m != BEST])
def test_attacks_by_lesser_means(means, outside):
    "The same for what other machines have: all attacks that it stops, and the notice names the others."
    lacks = confinement(means)["lacks"]
    tried = [(name, kinds, attack_of(text, outside)) for name, wall, kinds, text in ATTACKS if wall not in lacks]
    escaped = []
    for still in (True, False):
        some = [(name, kinds, p) for name, kinds, p in tried if (kinds == "timeout") == still]
        outcomes = run_programs([p for *_, p in some], means=means, **small("timeout" if still else ""))
        escaped += [(name, found) for (name, kinds, _), found in zip(some, outcomes)
                    if found.kind not in kinds.split() or found.passed or "outside" in found.stdout]
    assert not escaped, escaped
    assert [p.name for p in outside.parent.iterdir()] == ["outside.txt"] and outside.read_text() == "outside"
    assert all(wall in confinement(means)["notice"] for wall in lacks)


# What is judged, and by whom

JUDGE = "def check(f):\n    assert abs(f(1.5) - 3) < 1e-9 and f('ab') == 'abab'\ncheck(double)"


@each_means
def test_kinds_by_every_means(means):
    runs = [(DOUBLE, [("double(4)", 8)], "ok"), (DOUBLE, [("double(4)", 9)], "wrong"), (DOUBLE, [("double(4)", 8.0)], "wrong"), ("x = (", [("x", 1)], "error"),
            (DOUBLE, [("doubel(4)", 8)], "error"), ("print('hi')", [], "ok"), ("raise SystemExit(3)", [], "exit"), ("import sys; sys.exit(0)", [], "ok")]
    found = run_programs([(text, cases) for text, cases, _ in runs], means=means)
    assert [f.kind for f in found] == [kind for *_, kind in runs]
    judged = run_programs([Program(DOUBLE, judge=JUDGE), Program("def double(x): return x", judge=JUDGE), Program("", judge=JUDGE)], means=means)
    assert [(f.kind, f.passed, f.cases) for f in judged] == [("ok", 1, 1), ("wrong", 0, 1), ("error", 0, 1)]


def test_cases_are_counted_one_by_one():
    text = "def f(x):\n    if x == 2: raise ValueError('two')\n    return x"
    found = run_program(text, [("f(1)", 1), ("f(2)", 2), ("f(3)", 4), ("f(4)", 4)])
    assert (found.kind, found.passed, found.cases) == ("error", 2, 4) and found.message == "ValueError: two"
    assert run_program("def f(x):\n    import os\n    if x == 2: os._exit(0)\n    return x", [("f(1)", 1), ("f(2)", 2), ("f(3)", 3)]).passed == 1


FORGERIES = {
    "abs": "def abs(x): return 0\ndef double(x): return 7",
    "check": "def check(f): pass\ndef double(x): return 7",
    "assertion": "import builtins\nbuiltins.AssertionError = ArithmeticError\ndef double(x): return 7",
    "equality": "class A(float):\n    def __sub__(self, x): return 0\n    def __eq__(self, x): return True\n    __hash__ = None\ndef double(x): return A()",
    "object": "class A:\n    def __sub__(self, x): return 0\n    def __eq__(self, x): return True\n    def __abs__(self): return 0\ndef double(x): return A()",
    "exit": "import os\ndef double(x): os._exit(0)",
    "early exit": "import os\nos._exit(0)",
    "SystemExit": "def double(x): raise SystemExit(0)",
    "verdict": "import os\nfor fd in range(3, 20):\n    try: os.write(fd, b'{\"verdict\": null}\\n' * 9)\n    except OSError: pass\ndef double(x): return 7",
    "held": "import os\ndef double(x):\n    os.write(4, b'{\"value\": [\"held\", 0]}\\n' * 3)\n    return 7",
    "error by name": "class AssertionError(Exception): pass\ndef double(x): raise KeyboardInterrupt",
    "a type": "def double(x): return int",
    "not a value": "import os\ndef double(x): os.write(4, b'{\"value\": [\"no\", 1]}\\n')",
}


@each_means
@pytest.mark.parametrize("name", FORGERIES)
def test_a_judge_is_not_deceived(name, means):
    found = run_program(FORGERIES[name], judge=JUDGE, means=means)
    assert not found.ok and found.passed == 0, found


def test_a_judge_takes_from_the_program_only_what_it_defines():
    "`sum` of the program where the problem names it; never its `math`, nor the builtin where the program has none."
    text = "def sum(a, b): return a + b\nclass math:\n    isclose = staticmethod(lambda *a: True)"
    assert run_program(text, judge="assert sum(1, 2) == 3").kind == "error"
    assert run_programs([Program(text, judge="assert sum(1, 2) == 3", names=("sum",))])[0].ok
    assert run_programs([Program("", judge="assert sum([1, 2]) == 3", names=("sum",))])[0].kind == "error"
    assert run_program(text, judge="assert math.isclose(1, 2)").kind == "wrong"


def test_a_judge_meets_objects_of_the_program():
    tree = "class Node:\n    def __init__(self, v): self.v, self.left = v, None\ndef total(n): return n.v + (total(n.left) if n.left else 0)"
    assert run_program(tree, judge="n = Node(2)\nn.left = Node(3)\nassert total(n) == 5 and n.left.v == 3").ok
    assert run_program(tree, judge="assert Node(2) != Node(3)").kind == "error"           # no comparison is the program's to make
    assert run_program("def f(x): raise KeyError(x)", judge="try: f('a')\nexcept KeyError: pass").ok


def test_the_wanted_value_is_nowhere_in_the_process():
    "All that the program can reach by its own objects and frames, and what it was forked from."
    look = ("import gc, sys, __main__\ndef answer():\n    f, texts = sys._getframe(), []\n    while f: texts, f = texts + [repr(f.f_locals)], f.f_back\n"
            "    for o in gc.get_objects():\n        try: texts.append(repr(o)[:5000])\n        except BaseException: pass\n"
            "    return any({!r}[::-1] in t for t in texts)")
    want = random.randrange(10 ** 17, 10 ** 18)
    run_program(DOUBLE, [("double(1)", want)])                                           # one before it, in the same warden
    text = look.replace("{!r}", repr(str(want)[::-1]))                                   # written backwards, or it would find its own question
    assert run_program(text + f"\nsecret = {want}", [("answer()", True)], wall=20, cpu=15).ok     # it finds what is there
    found = run_program(text, [("answer()", False), ("1", want)], wall=20, cpu=15)
    assert found.passed == 1, found


# What is left, and what is asked wrongly

@pytest.mark.skipif(not Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").exists(), reason="the kernel does not list children")
@each_means
def test_nothing_is_left_behind(means):
    close_wardens()
    before = processes()
    outlive = "import os, time\nfor _ in range(3):\n    try:\n        if os.fork() == 0:\n            os.setsid()\n            time.sleep(1000)\n    except OSError: pass\n"
    run_programs([Program(outlive), Program("while True: pass"), Program(outlive, judge="import time\ntime.sleep(100)")], means=means, wall=0.5)
    one = code._a_warden(means)
    mine = len([p for p in Path(one.spot).iterdir()])
    assert mine == 0, "a program's folder stays"
    one.close()
    close_wardens()
    assert processes() == before and not Path(one.spot).exists()


def test_a_warden_that_dies_is_replaced():
    one = code._a_warden(BEST)
    one.process.kill()
    one.process.wait()
    code._back(one)
    assert run_program(DOUBLE, [("double(4)", 8)], means=BEST).kind == "killed"
    assert run_program(DOUBLE, [("double(4)", 8)], means=BEST).ok


def test_many_at_once_in_their_order():
    found = run_programs([Program(DOUBLE, [(f"double({i})", 2 * i + (i % 7 == 0))]) for i in range(120)], workers=4)
    assert [f.ok for f in found] == [i % 7 != 0 for i in range(120)]


def test_the_same_each_time():
    text = "import random\nprint(''.join(set('abcdefghij')), random.random())"
    assert len({run_program(text, means=m).stdout for m in HERE for _ in range(2)}) == 1


def test_the_environment_of_the_caller_stays_outside(monkeypatch):
    monkeypatch.setenv("SECRET_OF_OURS", "x")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    close_wardens()
    assert run_program("import os, sys\nprint(dict(os.environ), [p for p in sys.path if 'nowhere' in p or 'site-packages' in p])").stdout == "{} []\n"


def test_asked_wrongly():
    with pytest.raises(UserError, match="Did you mean 'memory'"): run_program(DOUBLE, memori=1)
    with pytest.raises(UserError, match="a limit is above 0"): run_program(DOUBLE, wall=0)
    with pytest.raises(UserError, match="no plain data"): run_program(DOUBLE, [("double(1)", object())])
    with pytest.raises(UserError, match="there is no means"): run_program(DOUBLE, means="magic")
    assert run_programs([]) == []


def test_what_holds_is_tried(monkeypatch):
    "A wall that is taken away is missed by its probe, and the notice says so."
    close_wardens()
    monkeypatch.setattr(code, "_holds", {})
    monkeypatch.setattr(code, "REFUSED", {k: v for k, v in code.REFUSED.items() if k != "socket"})
    found = confinement("limits")
    close_wardens()
    assert "network" in found["lacks"] and "network" in found["notice"] and found["holds"]["memory"]
