#!/bin/bash
# A job on Slurm, from a checkout and its .venv that all nodes see:   sbatch cluster/slurm.sh
# Another command than the speedrun follows the file's name:          sbatch cluster/slurm.sh nanochat-ray pretrain …
# Options of sbatch before the file's name win over those here:       sbatch --nodes 8 --partition spot cluster/slurm.sh
#SBATCH --job-name=nanochat-ray
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=400G
#SBATCH --time=12:00:00
#SBATCH --ntasks-per-node=1
#SBATCH --output=slurm-%j.out
# A job that was preempted or lost a node is queued again. The same command then goes on from its newest checkpoint.
#SBATCH --requeue
#SBATCH --open-mode=append
# Five minutes before its time limit the job asks for that itself: see the trap of USR1.
#SBATCH --signal=B:USR1@300

set -euo pipefail
depth=24
export NANOCHAT_RAY_HOME=${NANOCHAT_RAY_HOME:-$HOME/.cache/nanochat_ray} # a folder that all nodes see, or s3://…
[ $# -gt 0 ] || set -- python -m experiments.speedrun --depth $depth
# module load python/3.11
source .venv/bin/activate # or put `apptainer exec --nv --bind /scratch nanochat-ray.sif` before `ray start` and "$@"

# Other jobs may have a Ray on the same node: this one has ten ports, a folder and a token of its own. It does without
# `ray symmetric-run`, which refuses to start beside another Ray and ends with `ray stop`, which ends all of them.
port=$((20000 + SLURM_JOB_ID % 1000 * 10))
export port folder=/tmp/ray-$SLURM_JOB_ID RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$HOME/.ray/slurm-$SLURM_JOB_ID
unset RAY_AUTH_TOKEN # sbatch passes on the shell's, which Ray would prefer to this job's file
mkdir -p "$HOME/.ray"
(umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$RAY_AUTH_TOKEN_PATH")
address=$(python -c 'import ray.util; print(ray.util.get_node_ip_address())')
export RAY_ADDRESS=$address:$port

start_ray() {
    rm -rf "$folder" # of this job's earlier start
    local memory=$((${SLURM_MEM_PER_NODE:-0} * 1048576)) where=(--address "$RAY_ADDRESS")
    [ "$SLURM_NODEID" != 0 ] || where=(--head --port "$port" --node-ip-address "${RAY_ADDRESS%:*}"
        --ray-client-server-port $((port + 1)) --include-dashboard false)
    [ $memory = 0 ] || where+=(--memory $((memory / 10 * 7)) --object-store-memory $((memory / 10 * 3)))
    set -a && source cluster/ray.env && set +a
    ray start "${where[@]}" --block --temp-dir "$folder" --min-worker-port 0 --max-worker-port 0 \
        --dashboard-agent-listen-port $((port + 2)) \
        --num-cpus "$SLURM_CPUS_PER_TASK" --num-gpus "${SLURM_GPUS_ON_NODE:-0}"
}
export -f start_ray
# Slurm sends SIGTERM some seconds before it kills. Ray leaves it to the command, which saves a checkpoint.
log=slurm-$SLURM_JOB_ID-ray.out
srun --cpus-per-task "$SLURM_CPUS_PER_TASK" env --block-signal=TERM bash -c start_ray >> "$log" 2>&1 &
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"; scancel --signal=KILL "$SLURM_JOB_ID.0"; wait; srun rm -rf "$folder"' EXIT
timeout 300 python -c "import os, ray, time
ray.init()
while sum(node['Alive'] for node in ray.nodes()) < int(os.environ['SLURM_NNODES']): time.sleep(1)" >> "$log" 2>&1 ||
    { echo "no Ray on $SLURM_NNODES nodes after 5 minutes: see $log" && exit 1; }

trap 'scontrol requeue "$SLURM_JOB_ID"' USR1
trap : TERM
srun --overlap --nodes 1 --ntasks 1 --cpus-per-task "$SLURM_CPUS_PER_TASK" "$@" &
while wait $! && code=0 || code=$? && kill -0 $! 2> /dev/null; do :; done # a signal ends a wait, not the command
# Preempted with a grace time, the job would end here for good.
! scontrol show job "$SLURM_JOB_ID" | grep -q 'PreemptTime=[0-9]' || scontrol requeue "$SLURM_JOB_ID"
exit $code
