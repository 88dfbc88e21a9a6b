"""`python -m cxt COMMAND …` is `cxt COMMAND …`."""

from cxt.cli import main

if __name__ == "__main__":
    main()
