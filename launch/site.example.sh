# shellcheck shell=bash disable=SC2034
# What your cluster needs, in one place: copy this to launch/site.sh (which git ignores) and change it.
# Every script of launch/ sources that, on the node where it runs.

# Modules. The build and the ranks must see the same MPI.
# module purge
# module load gcc/13 openmpi/5 cuda/13

# The network that NCCL and MPI use. srun passes the environment on; mpirun what it is told with -x.
# export NCCL_IB_HCA=mlx5 NCCL_SOCKET_IFNAME=ib0
# site_mpirun_flags=(--mca pml ucx -x NCCL_IB_HCA -x NCCL_SOCKET_IFNAME)

# Where Open MPI's ranks sometimes end in MPI_Init at address 0 under srun --mpi=pmix (seen with Slurm 22.05):
# export SLURM_PMIX_FENCE=ring

# What goes in front of every rank: a container, numactl, a profiler.
# rank_prefix=(apptainer exec --nv --bind "$project_root,/shared" "$HOME/anabranch.sif")

# Further flags of srun. Ranks see all GPUs of their node, and anabranch-bind gives each its own:
# site_srun_flags=(--gpu-bind=none)
# Containers by Pyxis, instead of rank_prefix:
# site_srun_flags+=(--container-image="$HOME/anabranch.sqsh" --container-mounts="$project_root:$project_root")
