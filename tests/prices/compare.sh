#!/usr/bin/env bash
# Compares our prices with LiteLLM's own cost function and writes docs/prices-vs-litellm.md. Fails on any difference without
# a reason. Needs Python 3.10 or later; installs LiteLLM into a cache folder once and uses no network after that.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
cache=${FARTHING_PRICE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/farthing-prices}
version=1.104.0
python=$cache/venv/bin/python
if ! "$python" -c "from importlib.metadata import version; raise SystemExit(version('litellm') != '$version')" 2>/dev/null; then
    mkdir -p "$cache"
    python3 -m venv "$cache/venv"
    "$python" -m pip install --quiet --disable-pip-version-check "litellm==$version"
fi
binary=${FARTHING_PRICE_PAIRS:-}
if [ -z "$binary" ]; then
    cargo build --quiet --manifest-path "$root/Cargo.toml" -p ledger --example price_pairs
    binary=${CARGO_TARGET_DIR:-$root/target}/debug/examples/price_pairs
fi
export LITELLM_LOCAL_MODEL_COST_MAP=True
exec "$python" "$root/tests/prices/compare_litellm.py" --binary "$binary" --table "$root/docs/prices-vs-litellm.md"
