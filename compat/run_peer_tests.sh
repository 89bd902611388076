#!/usr/bin/env bash
# Runs the tests of bitsandbytes, from a checkout of its repository, on bnb_core, and counts their outcomes by file:
#
#   compat/run_peer_tests.sh FOLDER [pytest arguments]
#
# bnb_core is installed in the environment of `python`, with pytest and what the tests import: einops, lion-pytorch,
# scipy, transformers. BNB_TEST_DEVICE (cpu, cuda, ...) is theirs, BNB_BACKEND is ours.
set -euo pipefail
exec python "$(dirname "$0")/run_peer_tests.py" "$@"
