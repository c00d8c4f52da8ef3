# shellcheck shell=bash disable=SC2034
# What your cluster needs, in one place: copy this to launch/site.sh (which git ignores) and change it.
# Every script of launch/ sources that, on the node where it runs.

# Modules. The build and the ranks must see the same MPI.
# module purge
# module load gcc/13 openmpi/5 cuda/13

# What goes in front of every rank: a container, numactl, a profiler.
# rank_prefix=(apptainer exec --nv --bind "$project_root" "$HOME/anabranch.sif")

# Further flags of mpirun and srun: the network, for example.
# site_mpirun_flags=(--mca pml ucx --mca btl '^openib')
# site_srun_flags=(--gpus-per-task=1 --gpu-bind=none)
