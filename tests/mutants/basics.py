"Bugs for 01_basics: (module, old text, new text, what it is). The old text stands once in the module, and once in the notebook's exported cells."
MUTANTS = [
    ("basics", "abs(a - b) <= tol * max(1, abs(b))", "abs(a - b) <= tol * abs(b)", "no absolute tolerance near zero"),
    ("basics", "(a != a and b != b)", "a != a", "not a number counts as right"),
    ("basics", "alike = shapes[0] == shapes[1] if", "alike = True if", "check does not look at the shape"),
    ("basics", "with torch.random.fork_rng(devices=[]):", "if True:", "ladder changes the random state of the notebook"),
    ("basics", "worst = max(worst, error)", "worst = error", "ladder reports the last error, not the largest"),
    ("basics", "            os.fsync(f.fileno())\n        os.replace(beside, path)", "            os.fsync(f.fileno())\n        path.write_bytes(beside.read_bytes())",
     "files are written in place"),
    ("basics", "n=1)\n    return f\" Did you mean", "n=1, cutoff=0)\n    return f\" Did you mean", "any name is suggested, however far"),
    ("basics", "if not right:\n            raise AssertionError", "if right is None:\n            raise AssertionError", "exercise accepts a wrong solution"),
    ("basics", "if not slow_time(code) or os.environ.get(\"SLOW\") == \"1\": return lines", "if not slow_time(code): return lines", "SLOW=1 does not run slow cells"),
]
