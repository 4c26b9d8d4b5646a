"Every notebook is a test of its own: nbdev_test runs its cells from top to bottom in a fresh process."
import re, sys

import pytest

from house import ROOT, code_cells, files, notebooks, page, read, run
from run_notebook import directives

LIMIT = 60   # seconds of processor time that a notebook may take on one thread; the clock may show five times that on a busy machine
MEASURED = """import subprocess, sys, time
start = time.perf_counter()
code = subprocess.call(sys.argv[1:])
try:
    from resource import RUSAGE_CHILDREN, getrusage
    used = getrusage(RUSAGE_CHILDREN)
    spent = used.ru_utime + used.ru_stime
except ImportError: spent = time.perf_counter() - start    # Windows has only the clock
print(f"processor seconds: {spent:.1f}")
sys.exit(code)"""


def nbdev_test(path, tree, *options, timeout=5*LIMIT):
    "Seconds of processor time, those of the notebook's child processes included."
    line = ["nbdev_test", "--path", tree/path.relative_to(ROOT), "--n_workers", "0", *options]
    out = run([sys.executable, "-c", MEASURED, *line], tree, timeout, PYTHONPATH=str(tree))
    assert "Success." in out, out
    return float(re.findall(r"processor seconds: ([\d.]+)", out)[-1])


@pytest.fixture(scope="module")
def room(tree):
    "The tree in which notebooks run; none may leave a file behind."
    before = set(files(tree))
    yield tree
    left = set(files(tree)) - before
    assert not left, f"notebooks left files behind: {sorted(left)}"


@pytest.mark.parametrize("path", notebooks(), ids=page)
def test_notebook(path, room):
    seconds = nbdev_test(path, room)
    assert seconds <= LIMIT, f"{path.name} took {seconds:.0f} s of processor time; {LIMIT} s is the limit"


marked = [p for p in notebooks() if any("slow" in directives(c["source"]) for c in code_cells(read(p)))]

@pytest.mark.slow
@pytest.mark.parametrize("path", marked, ids=page)
def test_slow_cells(path, tree): nbdev_test(path, tree, "--flags", "slow", timeout=3600)
