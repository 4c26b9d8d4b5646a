"Programming tasks without end: who is judged by what, and no task in two splits."
from tiny_llm.training import code_tasks as T


def test_tasks_are_judged_by_what_is_not_shown():
    tasks = T.code_tasks(60, seed=1)
    assert len({t.kind.split()[0] for t in tasks}) == 3
    assert not set(T.task_kinds("train")) & set(T.task_kinds("unseen"))
    assert {t.kind for t in T.code_tasks(300, 0, "unseen")} <= set(T.task_kinds("unseen"))
    reward = T.CodeReward()
    prompts = [t.prompt for t in tasks]
    assert all(reward.many(prompts, [t.solution for t in tasks]))
    learnt = ["".join(f"    if x == {call[2:-1]}: return {value!r}\n" for call, value in t.shown) for t in tasks]
    assert not any(reward.many(prompts, learnt)) and all(T.CodeReward(only_shown=True).many(prompts, learnt))
    for t in tasks: assert not {c for c, _ in reward.cases(t.prompt)} & {c for c, _ in t.shown} and len(reward.cases(t.prompt)) >= 5
    bad = ["    return 1 +\n", "    while True: pass\n", "    raise SystemExit\n", "    import os; os._exit(0)\n", "", "    return x\nf = None\n"]
    assert reward.many(prompts[:len(bad)], bad) == [0] * len(bad)


def test_no_constant_passes():
    "Neither the cases of a task nor those that the reward draws again have one value; and the reward says so of programs."
    reward = T.CodeReward()
    for split in ("train", "val", "unseen"):
        tasks = T.code_tasks(1000, 4, split)
        for t in tasks: assert all(len({repr(v) for _, v in cases}) > 1 for cases in (t.hidden, reward.cases(t.prompt))), t.prompt
    prompts = [t.prompt for t in tasks[:40]]
    assert reward.many(prompts, [f"    return {reward.cases(p)[0][1]!r}\n" for p in prompts]) == [0] * 40


def test_no_task_of_the_training_is_in_the_others():
    assert not {t.prompt for t in T.code_tasks(500, 0)} & {t.prompt for t in T.code_tasks(300, 0, "val")}
