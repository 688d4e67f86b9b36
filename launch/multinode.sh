#!/usr/bin/env bash
# Runs a job on several hosts without Slurm:  launch/multinode.sh -H host1,host2,... [-n N] JOB [overrides ...]
#
# Starts torchrun on each host by ssh, N ranks on each (one a GPU unless given); the first host is the meeting point. The
# checkout must lie at the same path on all hosts. Variables of this shell that ranks need are named in LDMSCALE_EXPORT
# (for instance LDMSCALE_EXPORT="WANDB_API_KEY NCCL_DEBUG"). Where something else starts the same command on every host,
# call it there with -r NUMBER (this host's place in the list) and no ssh is used.
#
# torchrun turns every status of a rank into 1; 75 (stopped after a save) is told by the run's log and run.json. USR1 would
# kill torchrun: to stop a run, send TERM, which it passes on.
set -euo pipefail

usage() { sed -n '2,4s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
hosts='' ranks='' node=''
while getopts 'H:n:r:' option; do
  case $option in
    H) hosts=$OPTARG ;;
    n) ranks=$OPTARG ;;
    r) node=$OPTARG ;;
    *) usage ;;
  esac
done
shift $((OPTIND - 1))
[[ -n $hosts && $# -gt 0 ]] || usage
IFS=, read -ra list <<<"$hosts"

checkout=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd -P)
python=$checkout/.venv/bin/python
[[ -x $python ]] || python=${PYTHON:-python3}
port=${MASTER_PORT:-29400}
if [[ -z $ranks ]]; then
  ranks=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || :)
  ((ranks > 0)) || ranks=1
fi

command=("$python" -m torch.distributed.run --nnodes "${#list[@]}" --nproc-per-node "$ranks"
  --master-addr "${list[0]}" --master-port "$port")
if [[ -n $node ]]; then
  # Not installed into this Python, perhaps: then the checkout itself is the package.
  export PYTHONPATH=$checkout${PYTHONPATH:+:$PYTHONPATH}
  exec "${command[@]}" --node-rank "$node" -m ldmscale "$@"
fi

variables=("PYTHONPATH=$checkout")
for name in ${LDMSCALE_EXPORT:-}; do variables+=("$name=${!name:-}"); done
pids=()
# shellcheck disable=SC2329  # called by the trap
stop() { for pid in "${pids[@]}"; do kill -TERM "$pid" 2>/dev/null || :; done; }
trap stop TERM INT
for i in "${!list[@]}"; do
  # shellcheck disable=SC2029  # quoted here for the shell over there
  ssh -o BatchMode=yes -tt "${list[i]}" "cd $(printf %q "$PWD") && exec env $(printf '%q ' "${variables[@]}") $(
    printf '%q ' "${command[@]}" --node-rank "$i" -m ldmscale "$@")" &
  pids+=("$!")
done
status=0
for pid in "${pids[@]}"; do
  while kill -0 "$pid" 2>/dev/null; do wait "$pid" || :; done
  wait "$pid" || status=$?
done
exit "$status"
