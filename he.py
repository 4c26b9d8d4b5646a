import json, gzip, time, collections
from tiny_llm.training.code import *
rows=[json.loads(l) for l in gzip.open("/work/shared/data/code_eval/HumanEval.jsonl.gz","rt")]
def judge(r): return f"{r['prompt']}\n    pass\ndel {r['entry_point']}\n{r['test']}\ncheck({r['entry_point']})\n"
ps=[Program(r["prompt"]+r["canonical_solution"], judge=judge(r)) for r in rows]
t=time.time(); out=run_programs(ps, wall=20, cpu=15); print(time.time()-t, collections.Counter(o.kind for o in out))
for r,o in zip(rows,out):
    if not o.ok: print(r["task_id"], o.kind, o.message, o.seconds)
print(sorted((round(o.seconds,2) for o in out))[-5:])
ps=[Program(r["prompt"]+"    pass\n", judge=judge(r)) for r in rows]
out=run_programs(ps); print(collections.Counter(o.kind for o in out), [r["task_id"] for r,o in zip(rows,out) if o.ok])
ps=[Program("", judge=judge(r)) for r in rows]
out=run_programs(ps); print(collections.Counter(o.kind for o in out), [r["task_id"] for r,o in zip(rows,out) if o.ok])
rows=[json.loads(l) for l in open("/work/shared/data/code_eval/mbpp.jsonl", newline="\n")]
def judge(r): return "\n".join([r["test_setup_code"], *r["test_list"], *r["challenge_test_list"]])
ps=[Program(r["code"], judge=judge(r)) for r in rows]
t=time.time(); out=run_programs(ps, wall=20, cpu=15); print(time.time()-t, collections.Counter(o.kind for o in out))
for r,o in zip(rows,out):
    if not o.ok: print(r["task_id"], o.kind, o.message, o.seconds, o.stderr[-300:], r["test_setup_code"][:100], r["test_list"][:1])
ps=[Program("", judge=judge(r)) for r in rows]
out=run_programs(ps); print(collections.Counter(o.kind for o in out), [r["task_id"] for r,o in zip(rows,out) if o.ok])
