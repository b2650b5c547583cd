#!/usr/bin/env bash
# Generates the Python code of deploy/gateway/inference.proto. With --check: fails when the committed code is stale.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=.
[ "${1:-}" = "--check" ] && out=$(mktemp -d) && trap 'rm -rf "$out"' EXIT
"$python" -m grpc_tools.protoc -I. --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" deploy/gateway/inference.proto
if [ "$out" != . ]; then
    for file in inference_pb2.py inference_pb2.pyi inference_pb2_grpc.py; do
        cmp "$out/deploy/gateway/$file" "deploy/gateway/$file" || { echo "stale: run tools/generate_protos.sh"; exit 1; }
    done
    echo "generated code is current"
fi
