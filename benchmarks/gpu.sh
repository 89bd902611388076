#!/usr/bin/env bash
# Builds the kernels for this machine's GPU, holds them to the conformance suite and times them. It needs a torch for
# the GPU, its compiler (nvcc or hipcc) and this checkout, installs into build/gpu, and writes nothing outside what
# building leaves in the checkout (build/, bnb_core.egg-info/) and the files that the arguments name.
#
# BNB_BACKEND names another backend that serves this GPU, such as triton, whose kernels need no compiler.
# `--sweep csrc_cuda/gemm_4bit_choices.h` times the kernels for 4-bit products, in at most six minutes once they are
# built and were held to the suite, and writes which one is to serve which product on this card.
#
# Arguments go to benchmarks/gpu.py; PYTHON names the interpreter that has torch. The benchmark runs whatever the suite
# finds, and the exit status is 0 if neither failed.
set -euo pipefail
caller=$PWD
cd "$(dirname "$0")/.."
checkout=$PWD
python=${PYTHON:-python3}
backend=$("$python" -c 'import torch; print("hip" if torch.version.hip else "cuda")')
serving=${BNB_BACKEND:-$backend}
target=$checkout/build/gpu

"$python" - << 'END'
import sys
from importlib.metadata import PackageNotFoundError, version

try:
    found = version("setuptools")
except PackageNotFoundError:
    found = "0"
if int(found.split(".")[0]) < 77:
    sys.exit(f"gpu.sh builds with a newer setuptools than is here: {sys.executable} -m pip install 'setuptools>=77'")
END

install() { "$python" -m pip install --quiet --no-build-isolation --target "$target" --upgrade "$@"; }
rm -rf "$target"
BNB_BUILD=cpu,$backend install --no-deps .
export PYTHONPATH=$target${PYTHONPATH:+:$PYTHONPATH}
for package in numpy packaging safetensors click rich matplotlib pytest hypothesis; do
  "$python" -c "import $package" 2> /dev/null || install "$package"
done

# From elsewhere, so that the checkout's folder is not imported in place of what was installed.
cd "$target"
"$python" -m bnb_core info
status=0
if [ "$serving" = triton ]; then  # Triton compiles as the suite runs, for minutes, into a cache on disk: all at once first
  listing='from bnb_core.conformance.suite import all_cases; print(*sorted({case.primitive or "api" for case in all_cases()}))'
  for primitive in $("$python" -c "$listing"); do
    printf '%s\n' float32 float16 bfloat16 | sed "s/.*/--primitive $primitive --case *&*/"
  done | xargs -P "$(nproc)" -L 1 "$python" -m bnb_core conformance --backend triton > /dev/null 2>&1 || true
fi
"$python" -m bnb_core conformance --backend "$serving" || status=$?
if [ "$serving" = cuda ]; then  # each kernel that csrc_cuda/gemm_4bit_choices.h may come to choose
  kernels=$("$python" -c 'from bnb_core.backends.cuda._kernels import gemm_4bit_kernels; print(*gemm_4bit_kernels)')
  for kernel in $kernels; do
    BNB_GEMM_4BIT_KERNEL=$kernel "$python" -m bnb_core conformance --backend cuda --primitive gemm_4bit || status=$?
  done
fi
cd "$caller"
"$python" "$checkout/benchmarks/gpu.py" --backend "$serving" "$@" || status=$?
exit $status
