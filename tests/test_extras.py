"""Each extra of settings.ini by itself: it installs where only the package is, what it is for works there, and without it one line says what to install.

    nice pytest -n0 tests/test_extras.py -m slow              # needs the package registry; some minutes, most of them for torch
    TINY_LLM_ENV=DIR nice pytest -n0 tests/test_extras.py -m slow -k hf     # begin with that environment, in which the package is; it is copied
"""
import glob, os, queue, re, shutil, signal, subprocess, sys, threading, time, urllib.request, venv
from pathlib import Path

import pytest

import tiny_llm as tl
from house import copy_tree, run
from run_notebook import settings
from test_wheel import built

EXTRAS = [name.removesuffix("_requirements") for name in settings() if name.endswith("_requirements")]
SMALL = "--limit 60 --vocab_size 300 --preset tiny --ctx 64 --batch 2 --device cpu --threads 1"
TRACKED = "-m tiny_llm train --steps 3 --track {} " + SMALL + " --out OUT"
OVERLAP = "import tiny_llm; print(tiny_llm.text_overlap(['one two three four five'], ['one two three four six']))"
EXPORT = "import sys; sys.argv = ['nbdev_export']; from nbdev.doclinks import nbdev_export; nbdev_export(); print('exported')"
COMMANDS = {     # extra: [(command of its Python, a pattern in what it prints, a file that it makes), ...]; MODEL, GGUF, OUT and TREE are paths
    "hf": [("-m tiny_llm export --model MODEL --format hf --out OUT", "transformers", "OUT/model.safetensors")],
    "gguf": [("-m tiny_llm generate --model GGUF --prompt Once --max_tokens 5 --device cpu", "Once", None)],
    "export": [("-m tiny_llm export --model MODEL --format gguf --out OUT.gguf", "llama.cpp", "OUT.gguf"),
               ("-m tiny_llm export --model MODEL --format onnx --out OUT", "onnxruntime", "OUT/onnx/model_quantized.onnx")],
    "tune": [(f"-m tiny_llm tune --trials 2 --trial_steps 3 {SMALL} --out OUT", "best.yaml", "OUT/study.db")],
    "serve": [("-m tiny_llm serve --model MODEL --port 0 --device cpu", "", None)],
    "tensorboard": [(TRACKED.format("tensorboard"), "", "OUT/tensorboard/events*")],
    "wandb": [(TRACKED.format("wandb"), "wandb", "OUT/**/run-*.wandb")],
    "mlflow": [(TRACKED.format("mlflow"), "mlflow", "OUT/tracker.json")],
    "eval": [(["-c", OVERLAP], "'bleu': .*'rouge_l': 80", None)],
    "dev": [("-m pytest -n0 -q TREE/tests/test_typed_text.py -k single_word", "1 passed", None), (["-c", EXPORT], "exported", None)]}


def test_every_extra_has_a_command():
    assert set(EXTRAS) == set(COMMANDS) and all(COMMANDS.values())


def clean(**more):
    "This process's environment without what leads to its own packages."
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST", "VIRTUAL_ENV"))}
    return {**env, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "MLFLOW_DISABLE_TELEMETRY": "true", "TINY_LLM_SIGNS": "0", **more}


def python_of(where): return where/("Scripts/python.exe" if os.name == "nt" else "bin/python")


def install(where, *what): run([sys.executable, "-m", "pip", "--python", python_of(where), "install", "--quiet", *what], where.parent, 1500, PYTHONPATH="")


def ask(where, words, cwd):
    "(exit code, what was printed) of the environment's Python."
    p = subprocess.run([python_of(where), *words], cwd=cwd, env=clean(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400)
    return p.returncode, p.stdout


def served(where, words, cwd):
    "As `ask`, of a server, which is asked for its health and then ended."
    p = subprocess.Popen([python_of(where), *words], cwd=cwd, env=clean(PYTHONUNBUFFERED="1"), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines, out = queue.Queue(), []
    def listen():
        for line in p.stdout: lines.put(line)
        lines.put(None)
    threading.Thread(target=listen, daemon=True).start()
    while (line := lines.get(timeout=200)) is not None:
        out.append(line)
        if at := re.search(r"at (http://\S+)", line):
            assert b'"ok"' in urllib.request.urlopen(at[1] + "/health", timeout=60).read()
            assert b"<html" in urllib.request.urlopen(at[1] + "/", timeout=60).read()
            p.send_signal(signal.SIGTERM)
    return p.wait(60), "".join(out)


@pytest.fixture(scope="module")
def base(built, tmp_path_factory):
    "An environment with the package and what it always needs."
    where = tmp_path_factory.mktemp("base")/"base"
    given = os.environ.get("TINY_LLM_ENV")
    if given: copied(Path(given), where)
    else: venv.create(where, with_pip=False, symlinks=os.name != "nt")
    install(where, built[1])
    install(where, "--force-reinstall", "--no-deps", built[1])
    return where


def copied(source, to):
    "A copy of an environment, whose files are links to the same bytes: pip replaces files and writes into none."
    def link(a, b):
        try: os.link(a, b)
        except OSError: shutil.copy2(a, b)
    return Path(shutil.copytree(source, to, symlinks=True, copy_function=link))


@pytest.fixture(scope="module")
def places(base, tmp_path_factory):
    "What the commands work on: a model folder, a GGUF file, a checkout."
    at = tmp_path_factory.mktemp("places")
    code, said = ask(base, f"-m tiny_llm train --steps 2 {SMALL} --out run".split(), at)
    assert code == 0, said
    pytest.importorskip("gguf")
    from tiny_llm.deployment.export import write_gguf
    write_gguf(*tl.load(at/"run", "cpu"), at/"m.gguf", "f32")
    return dict(MODEL=at/"run", GGUF=at/"m.gguf", TREE=copy_tree(at/"tree"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_alone(extra, base, built, places, tmp_path):
    def told(where, n, words, made):
        here = {**places, "OUT": tmp_path/f"{where.name}{n}"}     # where.name: base, or new
        def filled(text): return re.sub("|".join(here), lambda m: str(here[m[0]]), text)
        words = [filled(w) for w in (words.split() if isinstance(words, str) else words)]
        code, said = (served if "serve" in words else ask)(where, words, places["TREE"] if extra == "dev" else tmp_path)
        return code, said, made is None or bool(glob.glob(filled(made), recursive=True))
    for n, (words, _, made) in enumerate(COMMANDS[extra]):
        code, said, there = told(base, n, words, made)
        assert code != 0 and not (made and there), f"it works without {extra}: {said[-2000:]}"
        if extra != "dev": assert "pip install" in said and (extra == "eval" or code == 2 and "Traceback" not in said), said[-2000:]
    start = time.monotonic()
    where = copied(base, tmp_path/"new")
    install(where, f"{built[1]}[{extra}]")
    took = time.monotonic() - start
    assert subprocess.run([sys.executable, "-m", "pip", "--python", python_of(where), "check"], capture_output=True, env=clean()).returncode == 0
    for n, (words, pattern, made) in enumerate(COMMANDS[extra]):
        code, said, there = told(where, n, words, made)
        assert code == 0 and re.search(pattern, said) and there, said[-4000:]
    print(f"{extra}: installed in {took:.0f} s, {len(COMMANDS[extra])} commands in {time.monotonic() - start - took:.0f} s")
