# SPDX-License-Identifier: Apache-2.0
# Sourced by run.sh and test.sh: the Debian packages that are missing, the build.

# Installs those of the named packages that are not there yet.
install_packages() {
  local missing=() package
  for package in "$@"; do
    dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed ||
      missing+=("$package")
  done
  [ ${#missing[@]} -eq 0 ] && return 0
  local as_root=()
  if [ "$(id -u)" -ne 0 ]; then
    if ! command -v sudo >/dev/null; then
      echo "Packages are missing. As root, run:" >&2
      echo "  apt-get update && apt-get install -y --no-install-recommends ${missing[*]}" >&2
      exit 2
    fi
    as_root=(sudo)
  fi
  echo "Installing ${missing[*]}" >&2
  "${as_root[@]}" apt-get update >&2
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y --no-install-recommends "${missing[@]}" >&2
}

# Configures and builds the named targets (all without one) in build/, Release.
build() {
  install_packages g++ cmake ninja-build pkg-config libxsmm-dev libopenblas-openmp-dev \
    libdnnl-dev libxsimd-dev libcli11-dev libfmt-dev nlohmann-json3-dev libgtest-dev
  local log
  log=$(mktemp)
  if ! cmake -S . -B build -G Ninja -DCMAKE_BUILD_TYPE=Release > "$log" 2>&1; then
    cat "$log" >&2
    exit 2
  fi
  rm -f "$log"
  cmake --build build ${1:+--target "$@"} >&2
}
