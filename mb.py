from tiny_llm.training.code_suite import *
ps=code_problems("/work/shared/data/code_eval/mbpp.jsonl")
ps=[p for p in ps if int(p.name[5:]) in (126,533,367,927,601,25,475,83,802)]
for p,o in zip(ps,judge_problems(ps,[p.reference for p in ps])): print(p.name,o.kind,o.message,o.seconds)
