import time, resource
from tiny_llm.training import code as c
ps=[c.Program("def double(x):\n    return 2 * x\n", [(f"double({i})", 2*i)]) for i in range(300)]
for m in ("namespaces","limits"):
    c.run_programs(ps[:4], means=m)
    t=time.time(); c.run_programs(ps, means=m, workers=1); t1=time.time()-t
    t=time.time(); c.run_programs(ps, means=m, workers=2); t2=time.time()-t
    c.close_wardens(); u=resource.getrusage(resource.RUSAGE_CHILDREN)
    print(m, t1/.3, t2/.3, u.ru_utime, u.ru_stime)
