"Part 5: the model meets its users: the quickstart and the command line."
