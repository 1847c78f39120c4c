"""`python -m trwkv` is `trwkv`."""

from trwkv.cli import main

if __name__ == "__main__":
    main()
