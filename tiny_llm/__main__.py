"`python -m tiny_llm COMMAND` is the command `tiny_llm COMMAND`."

def run():
    "The command, also where Ctrl-C comes before it has begun."
    try:
        from .deployment.cli import main
        return main()
    except KeyboardInterrupt: return 130

if __name__ == "__main__": raise SystemExit(run())
