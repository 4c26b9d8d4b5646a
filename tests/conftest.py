"""pytest's settings: `pytest` at the top collects tests/ alone and leaves out tests marked slow; `--slow` runs them too.

The project's top level has no file for pytest, so what an ini file would say stands here.
"""
import os, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")      # idle OpenMP threads sleep instead of spinning on two cores
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")
if "PYTEST_XDIST_WORKER" in os.environ: os.environ.setdefault("OMP_NUM_THREADS", "1")   # a worker per core, a thread per worker
os.environ.setdefault("TINY_LLM_SIGNS", "0")             # what a command prints is the same on a busy machine; test_watch.py has them
os.environ.setdefault("PYTEST_TIMEOUT", "600")           # seconds for one test, read by pytest-timeout
sys.path[:0] = [p for p in (str(ROOT), str(ROOT/"tests"), str(ROOT/"nbs"/"_tools")) if p not in sys.path]


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")
    parser.addoption("--mutants", action="store_true", help="plant the bugs of tests/mutants/ one by one; who notices them?")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    "Two workers where there are two cores, unless the command line chose (`-n 0`: none), looks for a bug, or only lists."
    given = config.option
    if "PYTEST_XDIST_WORKER" in os.environ: return    # this is one of the two
    if getattr(given, "numprocesses", 0) is not None or given.usepdb or given.collectonly or given.capture == "no": return
    given.numprocesses, given.dist = min(2, os.cpu_count() or 1), "loadscope"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "Workers share the notebooks one by one; the tests of every other file stay together, in order: some build on those before them."
    from xdist.scheduler import LoadScopeScheduling
    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            alone = "test_notebooks" in nodeid or "test_noticed" in nodeid
            return nodeid if alone else nodeid.split("::")[0]
    return ByFile(config, log)


def pytest_configure(config):
    # property tests: the same 200 cases on every machine; with --slow or -m slow 10,000 others at each call
    from hypothesis import HealthCheck, settings
    settings.register_profile("default", max_examples=200, deadline=None, derandomize=True, database=None)
    settings.register_profile("slow", max_examples=10_000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    settings.load_profile("slow" if config.getoption("--slow") or config.option.markexpr == "slow" else "default")
    config.addinivalue_line("markers", "slow: takes minutes; left out unless --slow or -m is given")
    config.addinivalue_line("markers", "mutant: plants a bug and runs the tests near it; only with --mutants, and then alone")
    mutants = config.getoption("--mutants")
    if mutants: config.option.markexpr = "mutant"
    elif not config.option.markexpr: config.option.markexpr = "not mutant" if config.getoption("--slow") else "not slow and not mutant"
    else: config.option.markexpr = f"({config.option.markexpr}) and not mutant"
    if config.args_source is pytest.Config.ArgsSource.INVOCATION_DIR and config.invocation_params.dir == ROOT:
        config.args = [str(ROOT/"tests"/"test_mutants.py" if mutants else ROOT/"tests")]


def pytest_terminal_summary(terminalreporter, config):
    "The table of mutants: module, what it is, who noticed, what was said; and the score."
    if not config.getoption("--mutants"): return
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, []) if r.when == "call"]
    rows = sorted(dict(r.user_properties)["mutant"] for r in reports if "mutant" in dict(r.user_properties))
    if not rows: return
    terminalreporter.section("mutants")
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        terminalreporter.write_line("  ".join([*(text.ljust(w) for text, w in zip(row, widths)), row[3]]))
    count = {who: sum(row[2] == who for row in rows) for who in ("notebook", "tests", "nobody")}
    found = count["notebook"] + count["tests"]
    terminalreporter.write_line(f"{found} of {len(rows)} noticed ({found / len(rows):.0%}): {count['notebook']} by their notebook, "
                                f"{count['tests']} by the tests near it, {count['nobody']} by nobody")


@pytest.fixture
def one_thread():
    "PyTorch on one thread while a test runs. `pytestmark = pytest.mark.usefixtures(\"one_thread\")` makes it hold for a file."
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def root(): return ROOT


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    "A copy of the project's files, as a commit would hold them, to export, clean and build in. Do not write into it: copy it."
    from house import copy_tree
    return copy_tree(tmp_path_factory.mktemp("tree")/"tiny_llm")
