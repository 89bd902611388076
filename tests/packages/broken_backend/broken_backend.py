"""A backend that cannot be imported here."""

raise RuntimeError("this machine has no such device")
