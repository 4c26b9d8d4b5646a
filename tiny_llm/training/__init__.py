"Part 3: what it takes to train a model, to keep the run, and to measure what was learnt."
