"""The chat in a terminal of its own: every command, a long paste, letters in pieces, other windows, poor terminals; and that nothing which a person
types, a model writes or a file holds steers it. What a signal does at any moment stands in test_cli.py."""
import json, os, re, signal, threading, time

import pytest

from serving import dictated
from test_cli import Terminal, tl, unix
from tiny_llm.text.tokenizer import train_tokenizer
from tiny_llm.training.folder import load, save
from tiny_llm.transformer.adapters import add_adapter, save_adapter
from tiny_llm.transformer.model import Transformer, preset

pytestmark = unix
HOSTILE = "\x1b[2J\x1b]0;owned\x07\x9b1m\u202e<script>alert(1)</script> ![x](http://h/x.png) <|end|><|system|>"
STEERS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")      # but for the line end, which a terminal gets as \r\n


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    "A folder with a model that knows all bytes and no order, and a history that means no good."
    import torch
    d = tmp_path_factory.mktemp("talk")
    tok = train_tokenizer(["Seven little ducks went swimming one day, over the hills and far away."] * 9, 300)
    torch.manual_seed(0)
    for name in ("m", "n", "words"):
        model = Transformer(preset("tiny", vocab_size=len(tok), ctx=512))
        if name == "words":                                # hardly anything but words
            for i in {tok.encode(f" {w}")[0] for w in "little ducks went swimming hills far".split()}: model.embed.weight.data[i] *= 40
        save(model, tok, d/name)
    long = Transformer(preset("tiny", vocab_size=len(tok), ctx=4000))
    long.load_state_dict({k: v for k, v in model.state_dict().items()})
    save(long, tok, d/"long")                              # the words without end
    one = add_adapter(load(d/"m", "cpu")[0], rank=2)
    for p in one.parameters():
        if p.requires_grad: p.data.normal_(0, 0.3)
    save_adapter(one, d/"adapter")
    save(*dictated("🦊é€"), d/"emoji")
    said = [dict(role="user", content=HOSTILE), dict(role="assistant", content=HOSTILE)]
    (d/"bad.json").write_text(json.dumps([dict(messages=said)]))
    return d


def terminal(desk, *more, columns=None, **env):
    given = dict(zip(more[::2], more[1::2]))
    line = {"--model": "m", "--seed": 1, "--temperature": 1.0, "--max_tokens": 60} | given
    t = Terminal("chat", *(word for pair in line.items() for word in pair), cwd=desk, **env)
    if columns: resize(t, columns)
    t.expect("you>")
    return t


def resize(t, columns, rows=30):
    import fcntl, struct, termios
    fcntl.ioctl(t.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    os.kill(t.pid, signal.SIGWINCH)


def says(t, line, *parts, key="\r", seconds=60):
    "Type a line; what is shown up to the next prompt holds these parts, in their order."
    t.type(line + key)
    shown = "".join(t.expect(part, seconds) + part for part in parts)
    return shown + t.expect("you>", seconds)


def reply(shown):
    "The model's words in what a terminal was sent, without the mark before and the speed behind."
    return re.search(r"model>(?:\x1b\[0m)? (.*?)\r\n\(\d+ tokens", shown, re.S)[1]


def test_every_command(desk):
    t = terminal(desk, "--model", "words")
    first = says(t, "Hello", "model>", "tokens/s")
    says(t, "/help", "/xray", "now:    max_tokens 60")
    says(t, "/set temperature 0.5", "temperature is 0.5.")
    t.type("/temp\t")                                               # Tab
    t.expect("/temperature")
    says(t, " 1", "temperature is 1.0.")
    says(t, "/xray", "tokens; price", "room for", "cache")
    says(t, "/xray 2", "token 2, entropy", "    8 ")
    says(t, "/xray 2 9", "There are 8 alternatives, not 9.")
    says(t, "/xray 2 3", "model>", "tokens/s")
    says(t, "/version", "Version 2 of 2")
    says(t, "/version 1", "Version 1 of 2: ")
    says(t, "/regenerate", "model>", "tokens/s")
    says(t, "/version", "Version 3 of 3")
    says(t, "/save talk.json", "is in ", "talk.json.")
    says(t, "/undo", "Taken back: Hello")
    t.type("/open tal\t")
    t.expect("/open talk.json")
    says(t, "", "2 messages of talk.json.")
    says(t, "/load bad.json", "2 messages of bad.json.")
    says(t, "/system Be brief.", "The system text is: Be brief.")
    says(t, "/system off", "There is no system text.")
    says(t, "/model adapter", "adapter goes on with the conversation")       # its base is m, which is not open
    says(t, "/model m", "m goes on with the conversation, on the same base.")
    says(t, "/model adapter", "adapter goes on with the conversation, on the same base.")
    says(t, "Hello", "model>", "tokens/s")
    says(t, "/model n", "n goes on with the conversation.")
    for name, x in dict(temperature=0.5, max_tokens=50, top_k=3, top_p=0.5, min_p=0.25, repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=-0.5).items():
        says(t, f"/set {name} {x}", f"{name} is {x}.")
        if name not in ("temperature", "max_tokens"): says(t, f"/{name} off", f"{name} is off.")
        says(t, f"/{name}", f"{name} is ")
    says(t, "/min_p 7", "min_p is 7.0; give a share")
    says(t, "/clear", "The conversation is empty.")
    says(t, "/exti", "There is no command /exti", "Did you mean '/exit'?")
    t.type("one \\\r")
    t.expect("...>")
    says(t, "two", "model>", "tokens/s")
    says(t, "/save two.json", "is in ", "two.json.")
    assert json.loads((desk/"two.json").read_text())[0]["messages"][0]["content"] == "one \ntwo"
    t.type("/exit\r")
    assert t.code() == 0 and "Traceback" not in t.seen
    held = json.loads((desk/"talk.json").read_text())[0]
    assert len(held["said"]) == 4 and held["messages"][0]["content"] == "Hello" and first


def test_nothing_steers_the_terminal(desk):
    "What a model writes, and what an opened file holds; the model writes all bytes, so much of it would."
    t, replies = terminal(desk, "--max_tokens", 300), []
    for n in range(3): replies.append(reply(says(t, f"Hello {n}", "model>", "tokens/s")))
    assert not any(STEERS.search(text) for text in replies), replies
    says(t, "/save wild.json", "is in ", "wild.json.")
    wild = "".join(m["content"] for m in json.loads((desk/"wild.json").read_text())[0]["messages"])
    assert STEERS.search(wild), "this model wrote nothing that steers: the test shows nothing"
    says(t, "/open bad.json", "2 messages")
    shown = says(t, "/version", "Version 1 of 1")
    assert "\x1b[2J" not in shown and "\x1b]0" not in shown and "\u202e" not in shown and "<script>alert(1)</script> ![x](http://h/x.png)" in shown
    seen = says(t, "/xray", "tokens; price")
    assert not STEERS.search(re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", seen.split("tokens; price")[0])), seen
    t.type("/exit\r")
    assert t.code() == 0


def test_letters_in_pieces_and_a_long_paste(desk):
    t = terminal(desk, "--max_tokens", 5)
    for byte in "👩\u200d👧 é 第一".encode():
        os.write(t.fd, bytes([byte]))
        time.sleep(0.01)
    says(t, "", "model>", "tokens/s")
    says(t, "/save emoji.json", "is in ", "emoji.json.")
    assert json.loads((desk/"emoji.json").read_text())[0]["messages"][0]["content"] == "👩\u200d👧 é 第一"
    text = "Seven little ducks went swimming.\n" * 3000
    writer = threading.Thread(target=t.type, args=(f"\x1b[200~{text}\x1b[201~\r",), daemon=True)      # 102 KB, as terminals paste
    writer.start()
    t.expect("The message is too long", 120); t.expect("you>")
    writer.join(10)
    says(t, "/undo", "Taken back: 👩\u200d👧 é 第一")                  # nothing of it was taken for a message
    t.type("\x04")
    assert t.code() == 0 and "Traceback" not in t.seen


def test_the_window_changes(desk):
    from prompt_toolkit.utils import get_cwidth
    t, wide = terminal(desk, "--max_tokens", 150, "--model", "words", columns=120, COLUMNS="79"), {}
    for columns in (120, 30, 60):                             # an exported COLUMNS was true once, and does not follow the window
        resize(t, columns)
        shown = reply(says(t, "Hello", "model>", "tokens/s")).split("\r\n")
        shown[0] = "model> " + shown[0]
        assert max(map(get_cwidth, shown)) <= columns, (columns, shown)
        wide[columns] = max(map(get_cwidth, shown))
    assert wide[30] < wide[60] < wide[120], wide
    t.type("/exit\r")
    assert t.code() == 0


def test_the_window_changes_during_a_reply(desk):
    from prompt_toolkit.utils import get_cwidth
    t = terminal(desk, "--model", "long", "--max_tokens", 1200, columns=120)
    t.type("Hello\r")
    t.expect("model>")
    t.expect("\r\n")
    resize(t, 40)
    shown = t.expect("tokens/s")
    t.expect("you>")
    lines = shown.split("\r\n")[:-1]
    narrow = next(n for n, line in enumerate(lines) if get_cwidth(line) <= 40)
    assert len(lines) - narrow > 5 and max(map(get_cwidth, lines[narrow:])) <= 40, lines
    t.type("/exit\r")
    assert t.code() == 0 and "Traceback" not in t.seen


def test_letters_that_a_model_writes_in_pieces(desk):
    "One byte is one token here: a letter is shown when it is whole, in a terminal and through a pipe."
    tok = load(desk/"emoji", "cpu")[1]
    assert len(tok.encode("🦊é€")) == 9
    for command in (["chat", "--model", "emoji", "--temperature", 0], ["generate", "--model", "emoji", "--temperature", 0, "--prompt", "<|user|>"]):
        out = tl(*command, cwd=desk, stdin="Hello\n").stdout
        assert "\ufffd" not in out
        if command[0] == "chat": assert "model> 🦊é€\n" in out
    t = terminal(desk, "--model", "emoji", "--temperature", 0)
    assert reply(says(t, "Hello", "model>", "tokens/s")) == "🦊é€"
    t.type("/exit\r")
    assert t.code() == 0


def test_a_signal_from_outside_is_a_key(desk):
    t = terminal(desk, "--max_tokens", 5)
    t.type("half a line")
    t.expect("half a line")
    os.kill(t.pid, signal.SIGINT)
    t.expect("you>")
    says(t, "Hello", "model>", "tokens/s")
    says(t, "/save whole.json", "is in ", "whole.json.")
    assert json.loads((desk/"whole.json").read_text())[0]["messages"][0]["content"] == "Hello"
    time.sleep(0.6)
    os.kill(t.pid, signal.SIGINT)
    t.expect("Control-C again")
    t.expect("you>")
    os.kill(t.pid, signal.SIGINT)
    assert t.code() == 0 and "Traceback" not in t.seen


@pytest.fixture
def heeds():
    "Ctrl-C is heard, also where whoever started pytest had it ignored."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_signal_while_the_editor_opens_or_closes(heeds):
    "It is heard, and nothing is raised within the editor, whose event loop would stay open."
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput
    from tiny_llm.assistant import chat
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        app, inside = chat.PromptSession().app, []
        with pytest.raises(KeyboardInterrupt), chat._as_a_key(app):
            os.kill(os.getpid(), signal.SIGINT)
            inside.append(1)
        assert inside == [1] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_dumb_terminal(desk):
    t = terminal(desk, "--max_tokens", 5, TERM="dumb")
    says(t, "Hello", "model>", "tokens/s", key="\n")
    says(t, "/top_k", "top_k is off.", key="\n")
    assert "\x1b" not in t.seen
    t.type("\x04")
    assert t.code() == 0 and "Traceback" not in t.seen


def test_no_terminal(desk):
    "Through a pipe: no colour, no speed, no lines broken; without any input it ends."
    said = tl("chat", "--model", "m", cwd=desk)
    assert said.returncode == 0 and "model>" not in said.stdout
    said = tl("chat", "--model", "words", "--max_tokens", 40, "--seed", 1, cwd=desk, stdin="Hello \\\nthere\n/xray\n/xray 1 2\n/exit\n")
    assert said.returncode == 0 and "you> Hello \\\n...> there\n" in said.stdout and "tokens; price" in said.stdout
    paste = "Seven little ducks went swimming. " * 3000                             # 102 KB in one line
    pasted = tl("chat", "--model", "words", "--max_tokens", 4, cwd=desk, stdin=f"{paste}\nHello\n/version\n")
    assert pasted.returncode == 0 and pasted.stdout.count("The message is too long") == 1 and "Version 1 of 1" in pasted.stdout and pasted.stdout.count("model>") == 1
    assert said.stdout.count("model>") == 2 and not STEERS.search(said.stdout) and not re.search(r"\(\d+ tokens", said.stdout)
