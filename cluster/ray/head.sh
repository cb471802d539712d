#!/usr/bin/env bash
# The first machine of a cluster. The dashboard, through which jobs are submitted, listens on loopback only.
#   cluster/ray/head.sh [ADDRESS [RAY_START_OPTION]...]
# ADDRESS: this machine's, as the other machines reach it. Without one, or with 127.0.0.1, all ports are on loopback
# and no other machine can join.
set -euo pipefail
# shellcheck source=cluster/ray/token.sh
. "$(dirname "${BASH_SOURCE[0]}")/token.sh"
make_token

address=${1:-127.0.0.1}
shift || true
if [ "$address" = 127.0.0.1 ]; then
  # Ray then takes loopback for all its ports; otherwise it listens on every interface.
  export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0
fi
# A stopped job has so long to write a checkpoint before it is killed; Ray's own default is 3.
export RAY_JOB_STOP_WAIT_TIME_S=${RAY_JOB_STOP_WAIT_TIME_S:-300}
# Actors of one machine share its cores: an OpenMP thread that waits spins for microseconds, then sleeps.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-3000}
exec ray start --head "--node-ip-address=$address" --port=6379 --dashboard-host=127.0.0.1 --disable-usage-stats "$@"
