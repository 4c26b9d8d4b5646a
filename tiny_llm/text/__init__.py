"Part 2: text becomes documents, documents become ids, ids become batches."
