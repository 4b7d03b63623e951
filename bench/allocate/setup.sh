#!/usr/bin/env bash
# Installs DuckDB and Polars in the pinned versions into an environment of their own ($BENCH_ALLOCATE_HOME, by default
# ~/.cache/farthing-allocate; about 400 MB). Does nothing when they are there.
set -euo pipefail
home=${BENCH_ALLOCATE_HOME:-$HOME/.cache/farthing-allocate}
duckdb=2.0.0 polars=2.1.0
command -v python3 >/dev/null || { echo "bench/allocate/setup.sh: python3 is missing" >&2; exit 1; }
if [[ ! -f $home/duckdb-$duckdb-polars-$polars ]]; then
  rm -rf "$home"
  python3 -m venv "$home/venv"
  "$home/venv/bin/pip" install -q --no-cache-dir "duckdb==$duckdb" "polars==$polars"
  touch "$home/duckdb-$duckdb-polars-$polars"
fi
echo "DuckDB $duckdb and Polars $polars are in $home"
