"Part 4: from a model that continues a text to an assistant that answers."
