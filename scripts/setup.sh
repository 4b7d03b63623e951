# Sourced by demo and test: makes sure that what a build needs is here, or says exactly what is missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

missing=()
if ! command -v cargo >/dev/null; then
  missing+=("Rust: install rustup from your package manager or https://rustup.rs; rust-toolchain.toml then picks the version")
fi
if ! command -v cc >/dev/null; then
  if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    apt-get update -qq && apt-get install -y -qq build-essential >/dev/null
  else
    missing+=("a C compiler: 'sudo apt-get install build-essential' or your system's equivalent (ring and zstd are built from C)")
  fi
fi
if ((${#missing[@]})); then
  printf 'missing: %s\n' "${missing[@]}" >&2
  exit 1
fi
