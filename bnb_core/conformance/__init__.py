"""One suite that every backend must pass (docs/SPEC.md is what it tests, docs/writing-a-backend.md how to use it)."""
