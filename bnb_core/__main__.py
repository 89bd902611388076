"""`python -m bnb_core` is the console script `bnb-core`."""

from .cli import main

if __name__ == "__main__":
    main()
