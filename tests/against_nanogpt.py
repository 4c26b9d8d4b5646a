"""Tiny Shakespeare in characters: nanoGPT's recipe for a CPU and our two, as whole commands, in turn, seed by seed.

    python tests/against_nanogpt.py NANOGPT TINYSHAKESPEARE.txt --json nbs/3_training/against_nanogpt.json

NANOGPT is a checkout of github.com/karpathy/nanoGPT, of which no file is changed; the text is the one that its
data/shakespeare_char/prepare.py downloads. Nothing else should run meanwhile: wall time is what is compared. Each command
begins with empty caches, so start-up, measuring and compiling count. Making nanoGPT's train.bin is not counted; our
tokenizing is. Three seeds take about a quarter of an hour on two cores.

The rule of the loss, for all: the validation text (its last tenth) is cut into windows of 64 characters; each character is
predicted from those before it in its window, after the window's own first one: every character but the first of the text
counts once and is seen with 1 to 64 characters before it. The weights are nanoGPT's checkpoint, which it chose by its
validation loss, and ours at the end of the run. Who reads 128 characters is scored with windows of 128 as well.
"""
import argparse, datetime, importlib.util, json, os, platform, shutil, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
README_LOSS = 1.4697       # of nanoGPT's README, after three minutes on a GPU, in windows of 256
WIDTH, LONG = 64, 128      # LONG: of those who read so far
README = ["config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=1",
          "--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128", "--dropout=0.0"]
RECIPES = {name: ROOT / "nbs" / "3_training" / f"{name}.yaml" for name in ("characters_quick", "characters")}
# train.py asks for seed 1337 wherever it runs; seed 0 here is that one
OTHER_SEED = """
import runpy, sys, torch
usual, more = torch.manual_seed, int(sys.argv.pop(1))
torch.manual_seed = lambda seed: usual(seed + more)
sys.path.insert(0, "")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def validation(text): return text[int(0.9 * len(text)):]


def spans(n, width):
    "Where the windows of a text of `n` characters begin and end: each reads [a, b) and predicts [a + 1, b + 1)."
    return [(a, min(a + width, n - 1)) for a in range(0, n - 1, width)]


def nats_per_character(logits, ids, width=WIDTH, batch=128):
    "The loss by the rule above; `logits` maps ids (B, T) to (B, T, V). Returns nats per character, and how many counted."
    import torch
    total, counted, alike = 0.0, 0, {}
    for a, b in spans(len(ids), width):
        alike.setdefault(b - a, []).append(a)
    with torch.no_grad():
        for T, starts in alike.items():
            for k in range(0, len(starts), batch):
                at = torch.tensor(starts[k:k + batch])[:, None] + torch.arange(T)
                z, y = logits(ids[at]).flatten(0, 1).float(), ids[at + 1].flatten()
                total += torch.nn.functional.cross_entropy(z, y, reduction="sum").double().item()
                counted += len(y)
    return total / counted, counted


def prepared(nanogpt, text_file, folder):
    "nanoGPT's data folder for this text, made by its own prepare.py."
    folder.mkdir()
    shutil.copy(nanogpt / "data" / "shakespeare_char" / "prepare.py", folder)
    shutil.copy(text_file, folder / "input.txt")
    subprocess.run([sys.executable, "prepare.py"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return folder


def theirs(nanogpt, data, out, seed, steps):
    "(command, working directory) of nanoGPT's recipe."
    more = [f"--max_iters={steps}", f"--lr_decay_iters={steps}", f"--dataset={data}", f"--out_dir={out}"]
    return [sys.executable, "-c", OTHER_SEED, str(seed), "train.py", *README, *more], nanogpt


def ours(config, text_file, out, seed, steps=None):
    "(command, working directory) of a recipe of ours."
    line = [sys.executable, "-m", "tiny_llm", "train", "--config", str(config), "--data", str(text_file), "--seed", str(seed),
            "--out", str(out), *(["--steps", str(steps), "--eval_every", str(steps)] if steps else [])]
    return line, ROOT


def timed(line, cwd, threads, log):
    "Wall and processor seconds of a whole command, its children included."
    with tempfile.TemporaryDirectory() as empty:
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "XDG_CACHE_HOME": empty,
               "TORCHINDUCTOR_CACHE_DIR": os.path.join(empty, "inductor"), "MPLCONFIGDIR": MPL, "PYTHONPATH": str(ROOT)}
        with open(log, "w") as f:
            start = time.perf_counter()
            child = subprocess.Popen(line, cwd=cwd, env=env, stdout=f, stderr=subprocess.STDOUT)
            _, status, used = os.wait4(child.pid, 0)
            wall = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode: sys.exit(f"{' '.join(line)}\nended with {child.returncode}; see {log}\n" + log.read_text()[-2000:])
    return dict(wall=wall, processor=used.ru_utime + used.ru_stime)


MPL = os.path.join(tempfile.gettempdir(), "against_nanogpt_matplotlib")    # matplotlib's list of fonts: made once, by neither


def load_theirs(nanogpt, out, data):
    "(function from ids to logits, function from text to ids) of nanoGPT's checkpoint."
    import pickle, torch
    spec = importlib.util.spec_from_file_location("nanogpt_model", nanogpt / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    kept = torch.load(out / "ckpt.pt", map_location="cpu", weights_only=False)
    model = module.GPT(module.GPTConfig(**kept["model_args"]))
    model.load_state_dict(kept["model"])
    model.eval()
    ids = pickle.loads((data / "meta.pkl").read_bytes())["stoi"]
    # without targets it computes the last position alone
    return (lambda x: model(x, x)[0]), (lambda text: [ids[c] for c in text])


def load_ours(out):
    "The same of a run of ours: the weights after the last step."
    from tiny_llm import load
    model, tok = load(out / "last")
    model.eval()
    return model, tok.encode


def score(loaded, text, width=WIDTH):
    "Nats per character on the validation part."
    import torch
    logits, encode = loaded
    ids = torch.tensor(encode(validation(text)))
    assert len(ids) == len(validation(text)), "a token is not a character"
    return nats_per_character(logits, ids, width)[0]


def check_split(text_file, text):
    "How many characters ours trains on, all of them from the first nine tenths."
    from tiny_llm import documents
    train, = documents(str(text_file), "train")
    first = text[:len(text) - len(validation(text))]
    assert first.startswith(train), "the training part is not a beginning of the first nine tenths"
    return len(train), len(first)


def by_seed(rows):
    "Markdown: each seed and program, its loss and its times, in seconds and as shares of nanoGPT's in that round."
    base = {r["seed"]: r for r in rows if r["who"] == "nanoGPT"}
    lines = [f"| | seed | nats, windows of {WIDTH} | windows of {LONG} | wall (s) | share | processor (s) | share |",
             "|---|---|---|---|---|---|---|---|"]
    for r in rows:
        cells = [f"{r[kind]:.4f}" if kind in r else "" for kind in ("loss", "loss_long")]
        for kind in ("wall", "processor"):
            cells += [f"{r[kind]:.1f}", f"{r[kind] / base[r['seed']][kind]:.3f}"]
        lines.append(f"| {r['who']} | {r['seed']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def judged(rows):
    "What was asked of the two recipes, and with how many seeds each does it."
    base = {r["seed"]: r for r in rows if r["who"] == "nanoGPT"}
    def count(who, good):
        mine = [r for r in rows if r["who"] == who]
        return f"{sum(good(r, base[r['seed']]) for r in mine)} of {len(mine)}"
    asked = {
        "characters_quick: nanoGPT's loss or less": ("characters_quick", lambda r, b: r["loss"] <= b["loss"]),
        "characters_quick: at most a sixth of its wall time": ("characters_quick", lambda r, b: 6 * r["wall"] <= b["wall"]),
        "characters: its wall time or less": ("characters", lambda r, b: r["wall"] <= b["wall"]),
        f"characters: below {README_LOSS} in windows of {WIDTH}": ("characters", lambda r, b: r["loss"] < README_LOSS)}
    return {what: count(who, good) for what, (who, good) in asked.items()}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("nanogpt", type=Path, help="checkout of nanoGPT")
    p.add_argument("text", type=Path, help="tinyshakespeare.txt")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--steps", type=int, default=2000, help="of nanoGPT, a multiple of 250; fewer only to try this command")
    p.add_argument("--our_steps", type=int, help="of ours, to try this command; left out: the recipes' own")
    p.add_argument("--json", type=Path, help="where to write the figures")
    a = p.parse_args(argv)
    a.nanogpt, a.text = a.nanogpt.resolve(), a.text.resolve()
    import torch
    torch.set_num_threads(a.threads)
    text, rows = a.text.read_text(encoding="utf-8"), []
    learnt, first = check_split(a.text, text)
    how = (f"PyTorch {torch.__version__}, {platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {a.threads} of "
           f"{os.cpu_count()} cores, {datetime.date.today()}; nanoGPT {a.steps:,} steps; {len(validation(text)):,} characters.")
    print(f"ours trains on {learnt:,} characters of nanoGPT's {first:,}; {len(validation(text)):,} to validate", flush=True)
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        data = prepared(a.nanogpt, a.text, place / "data")
        for seed in range(a.seeds):
            for who in ("nanoGPT", *RECIPES):
                out, log = place / f"{who}-{seed}", place / f"{who}-{seed}.log"
                if who == "nanoGPT": line, cwd = theirs(a.nanogpt, data, out, seed, a.steps)
                else: line, cwd = ours(RECIPES[who], a.text, out, seed, a.our_steps)
                row = dict(who=who, seed=seed, **timed(line, cwd, a.threads, log))
                loaded = load_theirs(a.nanogpt, out, data) if who == "nanoGPT" else load_ours(out)
                row["loss"] = score(loaded, text)
                if who != "nanoGPT" and loaded[0].cfg.ctx >= LONG: row["loss_long"] = score(loaded, text, LONG)
                rows.append(row)
                print(json.dumps(row), flush=True)
            found = dict(how=how, table=by_seed(rows), judged=judged(rows), rows=rows, our_steps=a.our_steps,
                         train_characters=[learnt, first])
            if a.json: a.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")   # a cut loses one round
    print(f"{found['table']}\n\n{found['how']}\n")
    for what, seeds in found["judged"].items(): print(f"{what}: {seeds}")


if __name__ == "__main__": main()
