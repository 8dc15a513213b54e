#!/usr/bin/env bash
# Runs a real Slurm cluster of several nodes on one machine, from Debian's or Ubuntu's packages, for job scripts and tests.
# All its files are in one directory. Outside of it are only the nodes' names in the hosts file and, with --network, the
# nodes' network namespaces.
set -euo pipefail

DIR=${SYNCBN_SLURM_DIR:-/var/tmp/syncbn-slurm}
CONF=$DIR/slurm.conf
CPUS=4     # CPUs of each node, independent of this machine
PORT=16817 # port of slurmctld; node K listens on PORT + K
HOSTS=/etc/hosts
MARK="# syncbn local slurm in $DIR" # the first line of slurm.conf, and the end of our lines in the hosts file
POLICY=/usr/sbin/policy-rc.d
NET=198.18.77    # with --network, node K has the address NET.K, in a range reserved for tests (RFC 2544)
BRIDGE=syncbn0   # bridge that connects the nodes' links; this machine has the address NET.254 on it
PATH=$PATH:/usr/sbin:/sbin
umask 022

usage() {
  cat <<END
usage: slurm/local_cluster.sh up [NODES] [--network] | down | status | kill-node NAME | start-node NAME
                              | cut-link NAME | mend-link NAME

  up [NODES]       start NODES nodes (default 2), syncbn1, syncbn2, ..., of $CPUS CPUs each; install missing packages
    --network      give each node its own network namespace, link, address and host name
  down             end the cluster and its jobs, and remove all its files
  status           show nodes and jobs; exit code 0 if all nodes are idle, mixed or allocated
  kill-node NAME   send SIGKILL to all processes of the node, as in a power failure
  start-node NAME  start a killed node again
  cut-link NAME    take down the node's network link: packets are lost
  mend-link NAME   bring the link up again

Partitions: low, the default, and high, which preempts: jobs in low are warned, ended, and requeued.
Its directory is \$SYNCBN_SLURM_DIR ($DIR); Slurm's commands find the cluster by SLURM_CONF, which up prints.
END
}

fail() {
  echo "error: $*" >&2
  exit 1
}

# wait_for SECONDS COMMAND...: wait until the command succeeds
wait_for() {
  local end=$((SECONDS + $1))
  until "${@:2}"; do
    ((SECONDS < end)) || return 1
    sleep 0.2
  done
}

# --- Our processes: those with a path in our directory among their arguments, and their descendants

is_up() { [[ $(ours slurmctld) ]]; }
ours() { ps -C "$1" -o pid=,args= | awk -v dir="[ =]$DIR/" '$0 ~ dir { print $1 }' || true; }
others() { ps -C "$1" -o pid=,args= | awk -v dir="[ =]$DIR/" '$0 !~ dir && !/<defunct>/' || true; }

slurmd_of() { pgrep -xf "slurmd (-b )?-N $1 -f $CONF" || true; }

# node_processes NODE: its slurmd; its slurmstepds, which write to the node's log, and their descendants; and processes
# with the environment of its jobs, whose slurmstepd may have ended
node_processes() {
  local pid steps=()
  slurmd_of "$1"
  for pid in $(pgrep -x slurmstepd); do
    if readlink "/proc/$pid/fd/"* | grep -qxF "$DIR/log/slurmd.$1.log"; then steps+=("$pid"); fi
  done
  ps -eo pid=,ppid= | awk -v steps="${steps[*]}" '
    BEGIN { for (n = split(steps, pids, " "); n; n--) found[pids[n]] }
    { parent[$1] = $2 }
    END {
      do { more = 0; for (p in parent) if (!(p in found) && parent[p] in found) { found[p]; more = 1 } } while (more)
      for (p in found) print p
    }'
  grep -lszxF "SLURMD_NODENAME=$1" /proc/[0-9]*/environ | xargs -r grep -lszxF "SLURM_CONF=$CONF" | tr -dc '0-9\n'
} 2>/dev/null

kill_node() {
  # A job may kill its own node; without SLURMD_NODENAME, this script is not among the processes to kill.
  [[ ${SLURMD_NODENAME:-} != "$1" ]] || exec env -u SLURMD_NODENAME bash "$0" kill-node "$1"
  local pids
  for _ in {1..100}; do
    pids=$({ node_processes "$1" || true; } | grep -vx $$ || true)
    [[ $pids ]] || return 0
    xargs kill -KILL <<<"$pids" 2>/dev/null || true # slurmd first, so that no process reports the end of another one
    sleep 0.05
  done
  fail "processes of node $1 do not end: $(xargs <<<"$pids")"
}

# --- Files and network

nodes() { sed -n 's/^NodeName=\([^ ]*\).*/\1/p' "$CONF"; }

# name_nodes NAMES...: put these nodes and no others into the hosts file; written in place, since in containers it is a mount
name_nodes() {
  local kept name
  kept=$(grep -v " $MARK\$" "$HOSTS"; echo .)
  printf '%s' "${kept%.}" >"$HOSTS"
  for name in "$@"; do echo "$(address_of "$name") $name $MARK" >>"$HOSTS"; done
}

has_network() { grep -qs "NodeAddr=$NET" "$CONF"; }
address_of() { if has_network; then echo "$NET.${1#syncbn}"; else echo 127.0.0.1; fi; }

# link NODES...: create a network namespace with the name of each node, and a link from it to the bridge
link() {
  local name
  ip link add "$BRIDGE" type bridge
  ip address add "$NET.254/24" dev "$BRIDGE"
  ip link set "$BRIDGE" up
  for name in "$@"; do
    ip netns add "$name"
    ip link add "$name" master "$BRIDGE" type veth peer name eth0 netns "$name"
    ip link set "$name" up
    ip -n "$name" address add "$(address_of "$name")/24" dev eth0
    ip -n "$name" link set eth0 up
    ip -n "$name" link set lo up
  done
}

drop_links() {
  local name
  for name in $(nodes); do
    if ip link show "$name" >/dev/null 2>&1; then ip link delete "$name"; fi
    if [[ -e /run/netns/$name ]]; then ip netns delete "$name"; fi
  done
  if ip link show "$BRIDGE" >/dev/null 2>&1; then ip link delete "$BRIDGE"; fi
}

write_conf() { # NODES NETWORK
  local host k memory at=127.0.0.1
  if [[ $2 ]]; then at=$NET.254; fi
  host=$(hostname -s)
  memory=$(awk '/^MemTotal/ { print int($2 / 1024) }' /proc/meminfo) # of each node, not divided between them: the maximum request of a job
  cat <<END
$MARK
ClusterName=syncbn
SlurmctldHost=$host($at)
SlurmctldPort=$PORT
SlurmUser=root
AuthType=auth/munge
# A requeued job waits until its old credentials have expired; the default of cred_expire is two minutes.
AuthInfo=socket=$DIR/run/munge.socket,cred_expire=10
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/slurmd.%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd.%n.log
# One line per attempt of a job, with its exit status.
JobCompType=jobcomp/filetxt
JobCompLoc=$DIR/log/jobs.txt
# No cgroups, no accounting, no mail; config_overrides allows more CPUs than the machine has.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# Jobs start at once, and scontrol show job lists them for an hour after their end.
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
MinJobAge=3600
JobRequeue=1
KillWait=10
OverTimeLimit=0
# A node that does not respond for this time is set down at the next check; a node that responds again is used again.
SlurmdTimeout=15
ReturnToService=1
# A preempted job gets the signal of its --signal, or SIGTERM, and is ended after GraceTime. Slurm checks GraceTime and
# time limits every 30 seconds.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF
END
  for ((k = 1; k <= $1; k++)); do
    if [[ $2 ]]; then host=syncbn$k at=$NET.$k; fi
    echo "NodeName=syncbn$k NodeHostname=$host NodeAddr=$at Port=$((PORT + k)) CPUs=$CPUS RealMemory=$memory"
  done
}

# --- Preconditions

need_root() { [[ $EUID == 0 ]] || fail "$1 needs root, as Slurm's daemons do: sudo slurm/local_cluster.sh $1"; }
need_no_job() { [[ -z ${SLURM_JOB_ID:-} ]] || fail "this is within Slurm job $SLURM_JOB_ID; $1 works outside of jobs"; }

need_node() {
  [[ -e $CONF ]] || fail "no cluster is up in $DIR; start one: slurm/local_cluster.sh up"
  nodes | grep -qxF -e "$1" || fail "there is no node '$1', only: $(nodes | xargs)"
}

need_no_other_slurm() {
  local found
  [[ ${SLURM_CONF:-$CONF} == "$CONF" ]] || fail "SLURM_CONF is $SLURM_CONF, another cluster's; unset SLURM_CONF first"
  for found in /etc/slurm/slurm.conf /etc/slurm-llnl/slurm.conf; do
    [[ ! -e $found ]] || fail "this machine belongs to a cluster, for there is $found; use that, or another machine"
  done
  found=$(others slurmctld,slurmd,munged | cut -c 1-80 | head -n 1)
  [[ -z $found ]] || fail "another Slurm runs here: process $found; stop it if nobody needs it (systemctl stop)"
  if [[ -d $DIR && ! -e $CONF && $(ls -A "$DIR") ]]; then
    fail "$DIR has files that this script did not write; set SYNCBN_SLURM_DIR to another directory"
  fi
}

need_no_other_network() {
  local name found
  for name in "$@" "$BRIDGE"; do
    if [[ -e /run/netns/$name ]] || ip link show "$name" >/dev/null 2>&1; then
      fail "there is a network of the name $name already; if nobody needs it: ip link delete $name, ip netns delete $name"
    fi
  done
  found=$(ip -o address show to "$NET.0/24" | awk '{ print $2 " has " $4; exit }')
  [[ -z $found ]] || fail "--network gives the nodes addresses in $NET.0/24, and $found"
}

need_packages() { # PACKAGES...
  local missing=() name output made_policy=
  for name in "$@"; do
    if [[ $(dpkg-query -Wf '${db:Status-Status}' "$name" 2>/dev/null) != installed ]]; then missing+=("$name"); fi
  done
  ((${#missing[@]})) || return 0
  command -v apt-get >/dev/null || fail "Slurm's packages are Debian's or Ubuntu's, and there is no apt-get here"
  [[ $EUID == 0 ]] || fail "packages are missing: sudo apt-get install --no-install-recommends ${missing[*]}"
  echo "installing ${missing[*]}"
  if [[ ! -e $POLICY ]]; then # with this file, Debian packages do not start daemons on installation
    made_policy=yes
    trap 'rm -f "$POLICY"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$POLICY"
    chmod +x "$POLICY"
  fi
  export DEBIAN_FRONTEND=noninteractive
  output=$(apt-get -qq update 2>&1 && apt-get -qqy install --no-install-recommends "${missing[@]}" 2>&1) ||
    fail "apt-get could not install ${missing[*]}: $(tail -n 3 <<<"$output")"
  if [[ $made_policy ]]; then rm -f "$POLICY" && trap - EXIT; fi
}

# --- The commands

# start LOG COMMAND...: start a daemon, which inherits nothing from its caller
start() {
  LOG=$DIR/log/$1.log
  (cd / && exec env -i PATH="$PATH" LANG=C.UTF-8 SLURM_CONF="$CONF" "${@:2}" </dev/null >>"$LOG" 2>&1)
}

# nodes_are STATES [NODE]: whether all nodes, or this one, are in one of these states
nodes_are() {
  local states
  states=$(SLURM_CONF=$CONF sinfo -hN -p low ${2:+-n "$2"} -o %t 2>/dev/null) || return 1
  [[ $states ]] && ! grep -qvxE "$1" <<<"$states"
}

all_idle() {
  local name
  LOG=$DIR/log/slurmctld.log
  is_up || fail "slurmctld has ended"
  for name in $(nodes); do
    [[ $(slurmd_of "$name") ]] || { LOG=$DIR/log/slurmd.$name.log && fail "slurmd of node $name has ended"; }
  done
  nodes_are idle
}

failed_up() {
  if [[ -e ${LOG:-} ]]; then echo "the end of $LOG:" && tail -n 12 "$LOG"; fi >&2
  take_down
}

# daemon_of NODE: start its slurmd
daemon_of() {
  local within=()
  # shellcheck disable=SC2016  # expanded by the inner shell
  if has_network; then within=(nsenter --net="/run/netns/$1" unshare --uts sh -c 'hostname "$0" && exec "$@"' "$1"); fi
  start "slurmd.$1" "${within[@]}" slurmd "${@:2}" -N "$1" -f "$CONF"
}

up() {
  local name network='' names packages=(slurmctld slurmd slurm-client munge)
  if [[ ${*: -1} == --network ]]; then network=yes && packages+=(iproute2) && set -- "${@:1:$#-1}"; fi
  (($# <= 1)) || fail "up takes a number of nodes and --network, not '$*'"
  [[ ${1:-2} =~ ^[1-9][0-9]?$ ]] || fail "NODES is '$1'; it is a number from 1 to 99"
  [[ $DIR =~ ^(/[A-Za-z0-9_-][A-Za-z0-9._-]*)+$ && ${#DIR} -le 60 ]] ||
    fail "SYNCBN_SLURM_DIR is '$DIR'; an absolute path of 60 plain characters at most works, as sockets are in it"
  need_no_job up
  need_no_other_slurm
  if is_up; then
    [[ $(nodes | wc -l) == "${1:-$(nodes | wc -l)}" ]] || fail "up with other nodes, $(nodes | xargs); down first"
    [[ ! $network ]] || has_network || fail "up without --network; down first"
    echo "up already, nodes $(nodes | xargs):"
    echo "export SLURM_CONF=$CONF"
    return
  fi
  need_packages "${packages[@]}"
  need_root up
  need_no_other_slurm # again, since the packages may have started one
  [[ -w $HOSTS ]] || fail "$HOSTS cannot be written, and the nodes need names in it"
  take_down # remains of a cluster whose machine was switched off
  mapfile -t names < <(seq -f "syncbn%g" "${1:-2}")
  if [[ $network ]]; then need_no_other_network "${names[@]}"; fi

  trap failed_up EXIT
  mkdir -p "$DIR"
  write_conf "${#names[@]}" "$network" >"$CONF"
  mkdir -p "$DIR"/{log,run,spool,state}
  chmod 755 "$DIR"
  (umask 077 && head -c 128 /dev/urandom >"$DIR/munge.key")
  name_nodes "${names[@]}"
  if [[ $network ]]; then link "${names[@]}"; fi
  start munged munged --key-file="$DIR/munge.key" --socket="$DIR/run/munge.socket" --pid-file="$DIR/run/munged.pid" \
    --log-file="$DIR/log/munged.log" --seed-file="$DIR/run/munged.seed"
  start slurmctld slurmctld -f "$CONF"
  for name in "${names[@]}"; do daemon_of "$name"; done
  wait_for 30 all_idle || fail "not all nodes are idle after 30 seconds"
  SLURM_CONF=$CONF timeout 30 srun --quiet --nodes="${#names[@]}" --chdir=/ true || fail "srun runs no command on all nodes"
  trap - EXIT
  echo "up, nodes $(nodes | xargs):"
  echo "export SLURM_CONF=$CONF"
}

# End and remove the cluster, or parts of one. Jobs are cancelled first, so that srun and salloc in other shells end too.
take_down() {
  local name
  if is_up; then SLURM_CONF=$CONF timeout 5 bash -c 'squeue -ho %A | xargs -r scancel' 2>/dev/null || true; fi
  ours slurmctld | xargs -r kill -KILL
  if [[ -e $CONF ]]; then for name in $(nodes); do kill_node "$name"; done; fi
  ours munged | xargs -r kill -KILL
  if has_network; then drop_links; fi
  if grep -q " $MARK\$" "$HOSTS"; then name_nodes; fi
  if [[ -e $CONF ]]; then rm -rf "$DIR"; fi
}

down() {
  need_no_job down
  need_root down
  if [[ ! -e $CONF && -z $(ours slurmctld,slurmd,munged) ]] && ! grep -q " $MARK\$" "$HOSTS"; then
    echo "nothing is up in $DIR"
    return
  fi
  take_down
  echo "down: processes, files and host names are gone"
}

status() {
  is_up || fail "no cluster is up in $DIR; start one: slurm/local_cluster.sh up"
  SLURM_CONF=$CONF sinfo -N -p low -o '%10N %12T %E'
  SLURM_CONF=$CONF squeue -o '%8i %10P %20j %12T %10M %R'
  nodes_are 'idle|mix|alloc'
}

# slurmd -b reports a reboot of the node. Slurm then knows that its jobs are gone, even if it has not noticed the failure
# yet, and does not use the node until it is resumed.
start_node() {
  local before
  if [[ $(slurmd_of "$1") ]]; then echo "node $1 runs already" && return; fi
  export SLURM_CONF=$CONF
  start_time() { scontrol show node "$1" | grep -o 'SlurmdStartTime=[^ ]*'; }
  is_new() { [[ $(start_time "$1") != "$before" ]]; }
  before=$(start_time "$1")
  daemon_of "$1" -b || fail "slurmd of node $1 does not start: $(tail -n 1 "$LOG")"
  wait_for 15 is_new "$1" || fail "Slurm does not hear of node $1; see $LOG"
  use "$1"
}

# use NODE: resume the node until Slurm uses it; Slurm may have set it down
use() {
  is_used() { nodes_are 'idle|mix|alloc|comp' "$1" || { scontrol update nodename="$1" state=resume && false; }; }
  export SLURM_CONF=$CONF
  wait_for 15 is_used "$1" 2>/dev/null || fail "Slurm does not use node $1; see $DIR/log/slurmctld.log"
}

# set_link NODE up|down: set the state of the bridge's end of the node's link
set_link() {
  has_network || fail "the nodes have no links of their own; start them with: slurm/local_cluster.sh up --network"
  ip link set "$1" "$2"
}

case ${1:-}/$# in
  up/[1-3]) up "${@:2}" ;;
  down/1) down ;;
  status/1) status ;;
  kill-node/2) need_root kill-node && need_node "$2" && kill_node "$2" ;;
  cut-link/2) need_root cut-link && need_node "$2" && set_link "$2" down ;;
  mend-link/2) need_root mend-link && need_node "$2" && set_link "$2" up && use "$2" ;;
  start-node/2) need_root start-node && need_node "$2" && start_node "$2" ;;
  -h/1 | --help/1 | help/1) usage ;;
  *) usage >&2 && exit 2 ;;
esac
