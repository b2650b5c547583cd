#!/usr/bin/env bash
# Generates the Python code of the .proto files. With --check: fails when the committed code is stale.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=.
[ "${1:-}" = "--check" ] && out=$(mktemp -d) && trap 'rm -rf "$out"' EXIT
"$python" -m grpc_tools.protoc -I. --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" deploy/gateway/inference.proto
# Messages alone: it travels on a plain connection.
"$python" -m grpc_tools.protoc -I. --python_out="$out" --pyi_out="$out" cluster/link/link.proto
if [ "$out" != . ]; then
    for file in deploy/gateway/inference_pb2.py deploy/gateway/inference_pb2.pyi deploy/gateway/inference_pb2_grpc.py \
        cluster/link/link_pb2.py cluster/link/link_pb2.pyi; do
        cmp "$out/$file" "$file" || { echo "stale: run tools/generate_protos.sh"; exit 1; }
    done
    echo "generated code is current"
fi
