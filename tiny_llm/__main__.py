"`python -m tiny_llm COMMAND` is the command `tiny_llm COMMAND`."
from .deployment.cli import main

if __name__ == "__main__": raise SystemExit(main())
