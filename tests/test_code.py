"""Programs that nobody trusts, in the confined runner: the attacks of attacks.py, what is judged and how, and what is left behind."""
import os, random, signal, subprocess, sys, time
from pathlib import Path

import pytest

from attacks import ANY, ATTACKS
from tiny_llm.basics import UserError
from tiny_llm.training import code
from tiny_llm.training.code import Program, close_wardens, confinement, run_program, run_programs

pytestmark = pytest.mark.skipif(os.name == "nt", reason="there is no runner on Windows")
SECRET = random.SystemRandom().randrange(10 ** 17, 10 ** 18)
SMALL = dict(wall=1.2, cpu=1)
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
    found = run_programs([attack_of(text, outside)], workers=1, means=BEST, **SMALL)[0]
    assert found.kind in kinds.split() and found.passed == 0, found
    assert [p.name for p in outside.parent.iterdir()] == ["outside.txt"] and outside.read_text() == "outside"
    assert "outside" not in found.stdout and not Path("/tmp/tiny_llm_attack").exists()
    assert len(found.stdout) + len(found.stderr) <= 2 * code.LIMITS["output"] and found.seconds < 10
    assert run_program(DOUBLE, [("double(4)", 8)], means=BEST).ok


@pytest.mark.parametrize("means", [m for m in HERE if m != BEST])
def test_attacks_by_lesser_means(means, outside):
    "The same for what other machines have: all attacks that it stops, and the notice names the others."
    lacks = confinement(means)["lacks"]
    tried = [(name, kinds, attack_of(text, outside)) for name, wall, kinds, text in ATTACKS if wall not in lacks]
    outcomes = run_programs([p for *_, p in tried], means=means, **SMALL)
    escaped = [(name, kinds, found) for (name, kinds, _), found in zip(tried, outcomes) if found.kind not in kinds.split() or found.passed]
    assert not escaped, escaped
    assert [p.name for p in outside.parent.iterdir()] == ["outside.txt"] and outside.read_text() == "outside"
    assert all(wall in confinement(means)["notice"] for wall in lacks)
