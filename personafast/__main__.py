"""`python -m personafast`, the same as the `personafast` command."""

from personafast.cli import main

if __name__ == "__main__":
    main()
