#!/usr/bin/env bash
# A real Slurm cluster (munged + slurmctld + N slurmd) on one machine, for tests.
#
#   cluster.sh up [N]     start (or complete) a cluster of N nodes, default 2
#   cluster.sh down       end the daemons that `up` started, remove the state
#   cluster.sh status     daemons and nodes; exit 0 only if all are up
#   cluster.sh env        print `export SLURM_CONF=...` for `eval`
#   cluster.sh kill K     lose node K: SIGKILL its daemon (ns: and all its processes)
#   cluster.sh start K    bring node K back
#
# Environment: LDM_SLURM_DIR   all state          (${TMPDIR:-/tmp}/ldmscale-slurm)
#              LDM_SLURM_MODE  auto | ns | plain  (auto)
#              LDM_SLURM_GPUS  pretended GPUs per node, gres only, no device (1)
#              LDM_SLURM_CPUS  pretended CPUs per node (2)
#              LDM_SLURM_GRACE GraceTime of the preemptible partition, seconds (5)
#
# ns:    each node has its own hostname, /etc/hosts, PIDs and network (needs root
#        with CAP_SYS_ADMIN and CAP_NET_ADMIN); its death takes all its processes.
# plain: the nodes share the machine and differ by port only (any user).
# Needs: munge slurm-wlm (Debian 12: 22.05), iproute2 and util-linux for ns.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

# An absolute path, short: sun_path of the munge socket holds 107 characters.
dir=$(realpath -m "${LDM_SLURM_DIR:-${TMPDIR:-/tmp}/ldmscale-slurm}")
gpus=${LDM_SLURM_GPUS:-1} cpus=${LDM_SLURM_CPUS:-2} grace=${LDM_SLURM_GRACE:-5}
export SLURM_CONF=$dir/slurm.conf
key=$(printf %s "$dir" | cksum | cut -d' ' -f1)   # tells parallel clusters apart
port=$((20000 + key % 1000 * 10)) net=10.$((64 + key % 64)).$((key / 64 % 256))
br=ldm$((key % 1000000))

die() { echo "cluster.sh: $*" >&2; exit 1; }
# Start time of a process in ticks since boot (field 22 of stat; guards against a
# reused pid), nothing for a zombie (PID 1 of a container may never reap it).
ticks() { sed -n 's/.*) \([^ZX]\) /\1 /p' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }
# alive NAME: print the pid in $dir/NAME.pid if it still is the process recorded there.
alive() {
  local pid t
  { read -r pid t < "$dir/$1.pid"; } 2>/dev/null && [[ $(ticks "$pid") == "$t" ]] && echo "$pid"
}
# daemon NAME COMMAND...: run it in the background, detached, and record its pid.
daemon() {
  local name=$1; shift
  alive "$name" >/dev/null && return
  setsid "$@" </dev/null >>"$dir/log/$name.out" 2>&1 &
  echo "$! $(ticks $!)" > "$dir/$name.pid"
}
# stop NAME [SIGNAL]: signal the daemon, wait, SIGKILL after 5 s.
stop() {
  local pid i
  pid=$(alive "$1") || { rm -f "$dir/$1.pid"; return 0; }
  kill "-${2:-TERM}" "$pid" 2>/dev/null || :
  for i in {1..100}; do alive "$1" >/dev/null || break; sleep 0.05; done
  if alive "$1" >/dev/null; then kill -KILL "$pid" || :; sleep 0.2; fi
  rm -f "$dir/$1.pid"
}
until_ok() {   # until_ok SECONDS COMMAND...
  local i n=$(($1 * 5)); shift
  for ((i = 0; i < n; i++)); do "$@" >/dev/null 2>&1 && return; sleep 0.2; done
  return 1
}
nodes() { sed -n 's/^NodeName=node\([0-9]*\) .*/\1/p' "$SLURM_CONF"; }

pick_mode() {
  case ${LDM_SLURM_MODE:-auto} in
    ns|plain) echo "${LDM_SLURM_MODE}" ;;
    auto) if [[ $(id -u) == 0 ]] && unshare -mupnf true 2>/dev/null &&
             ip link add "$br" type bridge 2>/dev/null; then
            ip link del "$br"; echo ns
          else echo plain; fi ;;
    *) die "LDM_SLURM_MODE is auto, ns or plain" ;;
  esac
}

configure() {
  local n=$1 mode=$2 ctl=127.0.0.1 i addr
  mkdir -p "$dir"/{log,state,munge,dev}
  chmod 755 "$dir" "$dir/munge"
  echo "$mode" > "$dir/mode"
  if [[ ! -e $dir/munge/key ]]; then
    (umask 077; head -c 1024 /dev/urandom > "$dir/munge/key")
  fi
  [[ $mode == ns ]] && ctl=$net.254
  cat > "$SLURM_CONF" <<CONF
ClusterName=ldmscale
SlurmctldHost=$(hostname -s)($ctl)
SlurmctldPort=$port
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits cred_expire seconds (default 120) before it may start.
AuthInfo=socket=$dir/munge/socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmctldPidFile=$dir/log/slurmctld.own-pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdSpoolDir=$dir/state/%n
SlurmdPidFile=$dir/log/%n.own-pid
SlurmdLogFile=$dir/log/%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$dir/log/jobcomp
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1,sched_min_interval=0
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
KillWait=5
SlurmdTimeout=10
MinJobAge=3600
GresTypes=gpu
PartitionName=main Nodes=ALL Default=YES PriorityTier=10 PreemptMode=REQUEUE GraceTime=$grace MaxTime=60
PartitionName=urgent Nodes=ALL PriorityTier=100 PreemptMode=OFF MaxTime=60
CONF
  : > "$dir/gres.conf"
  # gres/gpu counts files only, so any file can stand for a GPU.
  for ((i = 0; i < gpus; i++)); do : > "$dir/dev/gpu$i"; done
  printf '127.0.0.1 localhost\n%s %s\n' "$ctl" "$(hostname -s)" > "$dir/hosts"
  for ((i = 1; i <= n; i++)); do
    addr=127.0.0.1
    [[ $mode == ns ]] && addr=$net.$i
    echo "$addr node$i" >> "$dir/hosts"
    # shellcheck disable=SC2015
    echo "NodeName=node$i NodeHostname=$([[ $mode == ns ]] && echo "node$i" || hostname -s)" \
         "NodeAddr=$addr Port=$((port + i)) CPUs=$cpus RealMemory=4096 Gres=gpu:$gpus State=UNKNOWN" >> "$SLURM_CONF"
    ((gpus == 0)) || echo "NodeName=node$i Name=gpu File=$dir/dev/gpu[0-$((gpus - 1))]" >> "$dir/gres.conf"
  done
}

# Runs as the first process of the node's own namespaces.
node_init() {   # node_init K
  hostname "node$1"
  mount --make-rprivate /
  mount -t proc proc /proc
  mount --bind "$dir/hosts" /etc/hosts
  mount --bind /dev/null /etc/resolv.conf   # no DNS: fail at once, not after 5 s each
  ip link set lo up
  until ip link set eth0 up 2>/dev/null; do sleep 0.02; done   # from start_node
  ip addr add "$net.$1/24" dev eth0
  mount -t tmpfs tmpfs /dev/shm
  slurmd -D -N "node$1" & wait $!   # bash stays as PID 1: it reaps orphans, slurmd does not
}

start_node() {
  local k=$1 pid
  alive "node$k" >/dev/null && return
  mkdir -p "$dir/state/node$k"
  if [[ $(<"$dir/mode") == plain ]]; then
    daemon "node$k" slurmd -D -N "node$k"
    return
  fi
  ip link del "$br.$k" 2>/dev/null || :
  # --kill-child: the end of this unshare ends the node's PID 1, hence all in it.
  daemon "node$k" unshare --mount --uts --net --pid --fork --kill-child \
    "$BASH" "$self" _node_init "$k"
  pid=$(alive "node$k")
  # Wait until unshare has left our network, then move one end of a veth there.
  # shellcheck disable=SC2016
  until_ok 5 eval '[[ $(readlink /proc/'"$pid"'/ns/net) != "$(readlink /proc/self/ns/net)" ]]'
  ip link add "$br.$k" type veth peer name eth0 netns "$pid"
  ip link set "$br.$k" master "$br" up
}

node_ready() { [[ $(sinfo -h -n "node$1" -o %T | sort -u) =~ ^(idle|mixed|allocated)$ ]]; }

up() {
  local n=${1:-2} mode k
  if [[ -e $SLURM_CONF ]]; then
    mode=$(<"$dir/mode")
    [[ $(nodes | wc -l) == "$n" ]] || die "$dir has a cluster of $(nodes | wc -l) nodes: down first"
  else
    mode=$(pick_mode)
    configure "$n" "$mode"
  fi
  if [[ $mode == ns && ! -e /sys/class/net/$br ]]; then
    ip link add "$br" type bridge
    ip addr add "$net.254/24" dev "$br"
    ip link set "$br" up
  fi
  daemon munged munged --foreground --key-file="$dir/munge/key" --socket="$dir/munge/socket" \
    --pid-file="$dir/munge/own-pid" --log-file="$dir/log/munged.log" --seed-file="$dir/munge/seed" --force
  until_ok 10 munge -n -S "$dir/munge/socket" || die "munged: see $dir/log"
  daemon slurmctld slurmctld -D
  for k in $(nodes); do start_node "$k"; done
  for k in $(nodes); do until_ok 30 node_ready "$k" || { status; die "node$k: see $dir/log"; }; done
  status
}

down() {
  local k
  [[ -e $SLURM_CONF ]] || return 0
  # In plain mode the steps outlive their slurmd, so end the jobs first.
  if [[ $(<"$dir/mode") == plain ]] && alive slurmctld >/dev/null; then
    for k in main urgent; do scontrol update partition=$k state=down || :; done
    # shellcheck disable=SC2046  # several numbers, as words
    scancel --quiet --signal=KILL --full $(squeue -h -t running -o %i) 2>/dev/null || :
    # shellcheck disable=SC2046
    scancel --quiet $(squeue -h -o %i) 2>/dev/null || :
    # shellcheck disable=SC2016  # eval expands them at each try
    until_ok 10 eval '[[ -z $(squeue -h) ]]' || :
  fi
  for k in $(nodes); do stop "node$k" KILL; ip link del "$br.$k" 2>/dev/null || :; done
  stop slurmctld
  stop munged
  if [[ $(<"$dir/mode") == ns ]]; then ip link del "$br" 2>/dev/null || :; fi
  rm -rf "$dir"
}

status() {
  local d ok=0
  [[ -e $SLURM_CONF ]] || { echo "no cluster in $dir"; return 1; }
  for d in munged slurmctld $(nodes | sed s/^/node/); do
    printf '%-10s %s\n' "$d" "$(alive "$d" || { echo down; })"
    alive "$d" >/dev/null || ok=1
  done
  sinfo -N -o '%N %P %T %c %G %E' || ok=1
  echo "export SLURM_CONF=$SLURM_CONF   # mode: $(<"$dir/mode")"
  return $ok
}

self=$(readlink -f "$0")
case ${1:-} in
  up|down|status) "$@" ;;
  env) echo "export SLURM_CONF=$SLURM_CONF" ;;
  kill) stop "node$2" KILL ;;
  start) start_node "$2"; until_ok 30 node_ready "$2" || die "node$2: see $dir/log" ;;
  _node_init) node_init "$2" ;;
  *) sed -n '2,22s/^# \{0,1\}//p' "$self"; exit 2 ;;
esac
