#!/usr/bin/env bash
# Runs a job on all devices of this node:  launch/local.sh [-n N] [--cpu] JOB [overrides ...]
#
# N is the number of GPUs unless given, or 1 on a machine without (`-n 2` starts two gloo ranks there).
# Works from any directory; relative paths are those of the directory it is called from, and overrides reach the job
# untouched. Ends with the job's exit status: 0 finished, 2 cannot work as configured, 75 stopped after a save.
set -euo pipefail

checkout=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd -P)
if [[ -x $checkout/.venv/bin/python ]]; then
  python=$checkout/.venv/bin/python
else
  python=${PYTHON:-python3}
  # Not installed into this Python, perhaps: then the checkout itself is the package.
  if [[ -f $checkout/ldmscale/launcher.py ]]; then
    export PYTHONPATH=$checkout${PYTHONPATH:+:$PYTHONPATH}
  fi
fi
exec "$python" -m ldmscale.launcher "$@"
