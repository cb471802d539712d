#!/usr/bin/env bash
# Submits a run from a checkout, on the head (or through `ssh -L 8265:127.0.0.1:8265 HEAD`), and follows its log.
#   cluster/ray/submit.sh CONFIG RUN_DIR [KEY=VALUE]...
# RUN_DIR: absolute, on storage that all machines mount at the same path. The same line again goes on with the run.
set -euo pipefail
# shellcheck source=cluster/ray/token.sh
. "$(dirname "${BASH_SOURCE[0]}")/token.sh"

if [ $# -lt 2 ]; then
  echo "usage: $0 CONFIG RUN_DIR [KEY=VALUE]..." >&2
  exit 2
fi
config=$1 run_dir=$2
shift 2
case $run_dir in
  /*) ;;
  *)
    echo "$0: RUN_DIR $run_dir is relative; give an absolute path on storage that all machines share" >&2
    exit 2
    ;;
esac
need_token
exec ray job submit "--address=${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}" --working-dir . -- \
  switchkd train "$config" "run.dir=$run_dir" --resume "$@"
