#!/usr/bin/env bash
# Builds the package for aarch64 and runs the conformance suite there: in Debian's Python for aarch64 with torch's wheel,
# under qemu, the kernels compiled by the cross compiler. Some minutes for each level.
#
#   tests/cross/conformance.sh FOLDER [LEVEL ...]      FOLDER keeps what is downloaded, 0.5 GB
#
# On Debian, with qemu-user and g++-aarch64-linux-gnu.
set -euo pipefail
checkout=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$1"
folder=$(cd "$1" && pwd)
shift
levels=("$@")
[ ${#levels[@]} -gt 0 ] || levels=(portable neon neon_dotprod neon_i8mm)

# torch 2.10 is the last one whose wheel for aarch64 is small: it has no CUDA. It needs ARMv8.2's atomic instructions.
torch=torch==2.10.0
processor=max,pauth-impdef=on
root=$folder/root
site=$folder/site

if [ ! -e "$root/usr/bin/python3" ]; then
  apt=$folder/apt
  mkdir -p "$apt"/{lists/partial,archives/partial} "$root"
  touch "$apt/status"
  cat > "$apt/apt.conf" <<EOF
APT::Architecture "arm64";
APT::Architectures { "arm64"; };
APT::Sandbox::User "root";
Dir::State::lists "$apt/lists";
Dir::State::status "$apt/status";
Dir::Cache "$apt";
EOF
  export APT_CONFIG=$apt/apt.conf
  apt-get update -qq
  apt-get install -qq --yes --download-only --no-install-recommends python3 libpython3-dev libstdc++6 libgomp1
  for package in "$apt"/archives/*.deb; do dpkg-deb --extract "$package" "$root"; done
fi

python() {
  env PIP_ROOT_USER_ACTION=ignore QEMU_CPU=$processor PYTHONHOME="$root/usr" PYTHONPATH="$site" \
    qemu-aarch64 -L "$root" "$root/usr/bin/python3" "$@"
}
if [ ! -e "$site/torch" ]; then
  pip install --quiet --target "$site" pip setuptools
  python -m pip install --quiet --target "$site" $torch numpy packaging safetensors pytest hypothesis click rich matplotlib
fi

# The build runs as on such a machine; only the compiler is one for this machine.
rm -rf "$folder/source" "$site"/bnb_core* "$site/pytest_bnb_core.py"
mkdir "$folder/source"
git -C "$checkout" ls-files -co --exclude-standard -z | (cd "$checkout" && xargs -0 cp --parents -t "$folder/source")
headers=$root/usr/include
(
  cd "$folder/source"
  export CXX="aarch64-linux-gnu-g++ -isystem $(echo "$headers"/python3*) -isystem $headers" BNB_BUILD=cpu
  python setup.py --quiet bdist_wheel
)
python -m pip install --quiet --no-deps --upgrade --target "$site" "$folder"/source/dist/*.whl

for level in "${levels[@]}"; do
  (cd "$folder" && python -m bnb_core conformance --backend cpu --isa "$level" 2>&1) | tee "$folder/$level.log" | tail -24
  grep -q ' 0 failed, 0 failed as expected, 0 skipped' "$folder/$level.log"
done
