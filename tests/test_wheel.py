"A source distribution and the wheel built from it, installed where nothing else of this project is."
import os, subprocess, sys, tarfile, venv, zipfile
from email.parser import Parser
from pathlib import Path
from sysconfig import get_path

import pytest

from house import ROOT, copy_tree, run
from run_notebook import settings

pages = {f"deployment/page/{name}" for name in ("index.html", "chat.css", "chat.js")}     # what `serve` shows
modules = {p.relative_to(ROOT/"tiny_llm").as_posix() for p in (ROOT/"tiny_llm").rglob("*.py")}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "(source distribution, wheel), made by `python -m build` without a network; the wheel comes from the source distribution."
    tree = copy_tree(tmp_path_factory.mktemp("build")/"tiny_llm")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", tree/"dist"], tree, 180)
    return next((tree/"dist").glob("*.tar.gz")), next((tree/"dist").glob("*.whl"))


@pytest.fixture(scope="module")
def empty(built, tmp_path_factory):
    "The Python of a new environment that holds this wheel and nothing else."
    where = tmp_path_factory.mktemp("empty")/"env"
    venv.create(where, with_pip=False, symlinks=os.name != "nt")
    python = where/("Scripts/python.exe" if os.name == "nt" else "bin/python")
    run([sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", built[1]], where.parent, 180, PYTHONPATH="")
    return python


def in_empty(python, *args, **extra):
    "Run in the empty environment, from its own folder, with none of our paths unless they are given."
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST", "VIRTUAL_ENV"))}
    p = subprocess.run([python, *args], cwd=python.parent, env={**env, **extra}, capture_output=True, text=True, timeout=120)
    assert p.returncode == 0, p.stdout + p.stderr
    return p.stdout


def test_distributions_hold_what_they_should(built):
    sdist, wheel = built
    with tarfile.open(sdist) as t: inside = {Path(*Path(n).parts[1:]).as_posix() for n in t.getnames()}
    assert {"settings.ini", "setup.py", "README.md", "LICENSE", *(f"tiny_llm/{p}" for p in pages)} <= inside
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
        meta = Parser().parsestr(z.read(next(n for n in names if n.endswith("METADATA"))).decode())
    assert {n.removeprefix("tiny_llm/") for n in names if n.startswith("tiny_llm/")} == modules | pages, "every module, the chat page, and nothing else"
    assert {n.split("/")[0] for n in names} == {"tiny_llm", next(n.split("/")[0] for n in names if "dist-info" in n)}
    assert any(n.endswith("LICENSE") for n in names)
    c = settings()
    assert (meta["Version"], meta["Requires-Python"], meta["License"] or meta["License-Expression"]) == (c["version"], f">={c['min_python']}", "Apache-2.0")
    assert {"hf", "dev"} <= set(meta.get_all("Provides-Extra"))
    assert "](nbs/" not in meta.get_payload(), "links in the text that PyPI shows are whole addresses"


def test_imports_in_an_empty_environment(empty):
    out = in_empty(empty, "-c", "import tiny_llm; print(tiny_llm.__file__, len(tiny_llm.__all__))")
    where, names = out.split()
    assert Path(where).is_relative_to(empty.parent.parent) and int(names) > 10


def test_every_module_imports_from_the_wheel(empty):
    "With the dependencies of this environment, but not its tiny_llm."
    names = sorted(m.removesuffix(".py").replace("/", ".") for m in modules if not m.endswith("__init__.py"))
    code = ("from importlib import import_module\n"
            f"for m in {names}: print(import_module('tiny_llm.' + m).__file__)")
    out = in_empty(empty, "-c", f"import sys; sys.path.append({get_path('purelib')!r})\n{code}").splitlines()
    assert len(out) == len(names) and all(Path(o).is_relative_to(empty.parent.parent) for o in out)


def test_command_runs_from_the_wheel(empty):
    command = empty.with_name("tiny_llm.exe" if os.name == "nt" else "tiny_llm")
    shown = subprocess.run([command, "--help"], cwd=empty.parent, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
                           env={**os.environ, "PYTHONPATH": get_path("purelib")})
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "quickstart" in shown.stdout


def test_this_environment_has_no_conflicts():
    "pip check names no conflict of what this project asks for."
    p = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, timeout=120)
    assert "tiny_llm" not in p.stdout and "tiny-llm" not in p.stdout, p.stdout
