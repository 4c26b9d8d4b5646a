"Every file of a model folder and of a run folder, damaged in every usual way: one clear line, exit code 2, and nothing harmed."
import shutil, sys
from unittest.mock import patch

import pytest

from house import files
from test_cli import SMALL, same_process

TRAIN = ["train", "--data", "ducks.txt", "--steps", 6, *SMALL, "--out", "run"]
COMMANDS = dict(generate=["generate", "--model", "run", "--max_tokens", 2, "--device", "cpu"], plot=["plot", "--run", "run"], resume=[*TRAIN, "--resume"])

MODEL = ["README.md", "SHA256SUMS", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
STATE = ["state/optimizer.safetensors", "state/state.json"]
RUN = ["config.json", "metrics.jsonl", "summary.json"]
READS = dict(generate=[f"best/{f}" for f in MODEL], plot=RUN, resume=RUN + [f"last/{f}" for f in MODEL + STATE])

DAMAGE = {"missing": None, "empty": lambda d: b"", "half": lambda d: d[:len(d)//2], "brackets": lambda d: b"[]",
          "one bit": lambda d: d[:len(d)//2] + bytes([d[len(d)//2] ^ 1]) + d[len(d)//2 + 1:]}

FINE = {("README.md", None): "a text for people, which no program reads",
        ("SHA256SUMS", "missing"): "the folders of others have none",
        ("summary.json", "missing"): "a run that was killed has none",
        ("metrics.jsonl", "half"): "a kill may cut the last line short"}
EITHER = {("metrics.jsonl", "one bit"), ("metrics.jsonl", "missing"), ("metrics.jsonl", "empty")}    # figures that no model depends on


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    "A small text, and a run that paused after three of six steps."
    import tiny_llm.training.train
    module, desk = sys.modules["tiny_llm.training.train"], tmp_path_factory.mktemp("desk")
    (desk/"ducks.txt").write_text("\n".join(f"{n} little ducks went swimming one day, over the hills and far away." for n in range(300)))
    whole = module.train
    with patch.object(module, "train", lambda *args, **kw: whole(*args, stop_at=3, **kw)):
        code, _, said = same_process(TRAIN, desk)
    assert code == 130 and "stopped at step 3" in said, said
    (desk/"run"/".previous").rename(desk/"previous")        # the checkpoint before, with which nothing is lost: see below
    return desk


def test_no_file_is_forgotten(desk):
    own = {name.removeprefix("run/") for name in files(desk) if name.startswith("run/")}
    assert own == {*RUN, ".lock", "plots.png", *(f"{f}/{name}" for f in ("best", "last") for name in MODEL + STATE)}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("command, name", [(c, name) for c, names in READS.items() for name in names])
def test_a_damaged_file(desk, tmp_path, command, name, how):
    room, last = tmp_path/"room", name.split("/")[-1]
    shutil.copytree(desk, room)
    file, change = room/"run"/name, DAMAGE[how]
    file.unlink() if change is None else file.write_bytes(change(file.read_bytes()))
    before = files(room)
    code, out, err = same_process(COMMANDS[command], room)
    assert "Traceback" not in err
    if (last, how) in FINE or (last, None) in FINE or (last, how) in EITHER and code == 0:
        assert code == 0, err
        return
    lines = err.splitlines()
    assert code == 2 and out == "" and lines[-1].startswith("tiny_llm: "), f"ended with {code}\n{out}{err}"
    assert len(lines) <= 1 + (command == "resume"), err                          # a resumed run says which text it read
    assert any(word in lines[-1] for word in (last, "SHA256SUMS", "measured nothing yet")), err
    assert files(room) == before


@pytest.mark.parametrize("name", [f"last/{f}" for f in ("model.safetensors", *STATE)])
def test_the_checkpoint_before_is_taken(desk, tmp_path, name):
    "The command says so in a line, and the run comes to its end."
    room = tmp_path/"room"
    shutil.copytree(desk, room)
    (room/"previous").rename(room/"run"/".previous")
    file = room/"run"/name
    file.write_bytes(DAMAGE["one bit"](file.read_bytes()))
    code, out, err = same_process(COMMANDS["resume"], room)
    assert code == 0 and "the run goes on from step" in err and "stopped" not in err, err
