"""``bitsandbytes.diagnostics``: its module ``main`` tells what runs here."""
