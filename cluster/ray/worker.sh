#!/usr/bin/env bash
# A further machine of a cluster.
#   cluster/ray/worker.sh HEAD_ADDRESS ROLE [RAY_START_OPTION]...
# ROLE: teacher, rollout or learner, for configs with resources.*.labels: {switchkd.io/role: ROLE}; any: no label.
set -euo pipefail
# shellcheck source=cluster/ray/token.sh
. "$(dirname "${BASH_SOURCE[0]}")/token.sh"

if [ $# -lt 2 ]; then
  echo "usage: $0 HEAD_ADDRESS teacher|rollout|learner|any [RAY_START_OPTION]..." >&2
  exit 2
fi
head=$1 role=$2
shift 2
labels=()
case $role in
  teacher | rollout | learner) labels=("--labels=switchkd.io/role=$role") ;;
  any) ;;
  *)
    echo "$0: $role is no role: give teacher, rollout, learner or any" >&2
    exit 2
    ;;
esac
need_token
# Actors of one machine share its cores: an OpenMP thread that waits spins for microseconds, then sleeps.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-3000}
exec ray start "--address=$head:6379" --disable-usage-stats "${labels[@]}" "$@"
