"""``python -m bitsandbytes``: what runs here."""

from bnb_core.compat.diagnostics_main import main

if __name__ == "__main__":
    main()
