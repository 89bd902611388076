#!/usr/bin/env bash
# Builds the kernels for this machine's GPU, holds them to the conformance suite and times them. It needs a torch for
# the GPU, its compiler (nvcc or hipcc) and this checkout, and changes nothing outside build/gpu.
#
# Arguments go to benchmarks/gpu.py; PYTHON names the interpreter that has torch.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
backend=$("$python" -c 'import torch; print("hip" if torch.version.hip else "cuda")')
target=$PWD/build/gpu

install() { "$python" -m pip install --quiet --no-build-isolation --target "$target" --upgrade "$@"; }
rm -rf "$target"
"$python" -c 'import setuptools, pybind11' 2> /dev/null || "$python" -m pip install --quiet "setuptools>=77" pybind11
BNB_BUILD=cpu,$backend install --no-deps .
export PYTHONPATH=$target${PYTHONPATH:+:$PYTHONPATH}
for package in numpy packaging safetensors click rich matplotlib pytest hypothesis; do
  "$python" -c "import $package" 2> /dev/null || install "$package"
done

# From elsewhere, so that the checkout's folder is not imported in place of what was installed.
cd "$target"
"$python" -m bnb_core info
"$python" -m bnb_core conformance --backend "$backend"
"$python" "$OLDPWD/benchmarks/gpu.py" "$@"
