"Part 1: from the first softmax to a decoder-only transformer, and the shapes, weights and formats of published ones."
