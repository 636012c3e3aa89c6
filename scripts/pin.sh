#!/usr/bin/env bash
# Write requirements.txt: exact versions of everything in .venv, for every Python from 3.11 on.
# The file contains no addresses: each user installs from their own index. Usage: bash scripts/pin.sh [UV]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
uv=${1:-uv}
pins=$(mktemp)
trap 'rm -f "$pins"' EXIT
"$uv" pip compile pyproject.toml --quiet --upgrade --universal --python-version 3.11 \
    --extra ffcv --extra slurm --extra report --extra parquet --extra demo --extra dev \
    --no-header --no-annotate --no-emit-index-url --no-emit-find-links --output-file "$pins" >/dev/null
{
    echo "# Exact versions of the dependencies and theirs, for Python 3.11 and newer. Renew: make requirements"
    cat "$pins"
} >requirements.txt
